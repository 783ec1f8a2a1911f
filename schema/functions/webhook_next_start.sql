-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- When the next attempt may start. Starts are granted at most 100 ms ahead, or one start ahead. A noted time further ahead comes
-- from a clock that was ahead, and is cut down.
CREATE OR REPLACE FUNCTION webhook_next_start(p_noted timestamp with time zone, p_rate integer)
 RETURNS timestamp with time zone
 LANGUAGE sql
 STABLE
RETURN CASE WHEN (p_noted > ((now() + '00:00:01'::interval) + ('00:00:02'::interval / (p_rate)::double precision))) THEN now() ELSE p_noted END;

COMMENT ON FUNCTION webhook_next_start IS 'When the next attempt may begin at an endpoint whose rate is limited.';
