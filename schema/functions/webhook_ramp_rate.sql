-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- How many attempts per second may begin at an endpoint whose circuit has just closed: 10 in the first second, then twice as
-- many in each second, for ten seconds. NULL: as many as its limits allow.
CREATE OR REPLACE FUNCTION webhook_ramp_rate(p_state text, p_changed_at timestamp with time zone)
 RETURNS integer
 LANGUAGE sql
 STABLE
RETURN CASE WHEN ((p_state = 'closed'::text) AND (p_changed_at > (now() - '00:00:10'::interval)) AND (p_changed_at < (now() + '00:00:01'::interval))) THEN (((10)::numeric * ((2)::numeric ^ floor(GREATEST(EXTRACT(epoch FROM (now() - p_changed_at)), (0)::numeric)))))::integer ELSE NULL::integer END;

COMMENT ON FUNCTION webhook_ramp_rate IS 'The rate to which an endpoint is limited while it recovers.';
