-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Rounds to three significant digits: exact below one second, and at most 2,800 different values up to 5 minutes.
CREATE OR REPLACE FUNCTION webhook_rounded_duration(p_ms integer)
 RETURNS integer
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN (p_ms IS NULL) THEN '-1'::integer WHEN (p_ms < 1000) THEN p_ms WHEN (p_ms < 10000) THEN ((p_ms / 10) * 10) WHEN (p_ms < 100000) THEN ((p_ms / 100) * 100) ELSE ((p_ms / 1000) * 1000) END;

COMMENT ON FUNCTION webhook_rounded_duration IS 'A duration in milliseconds to three significant digits; -1 for an unknown one.';
