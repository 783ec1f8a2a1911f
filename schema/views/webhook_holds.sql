-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Why deliveries are held: due, but not to be claimed. The reason is a state of the endpoint. The first reason that applies
-- counts: a disabled endpoint counts as paused, even if its circuit or a limit would hold deliveries, too.
CREATE VIEW webhook_holds AS
 SELECT c.id AS config_id,
        CASE
            WHEN (NOT c.enabled) THEN 'paused'::text
            WHEN (c.circuit_state <> 'closed'::text) THEN 'circuit_open'::text
            WHEN ((c.max_in_flight IS NOT NULL) OR (c.rate_limit_per_second IS NOT NULL)) THEN 'limited'::text
            ELSE NULL::text
        END AS held_by
   FROM webhook_configs c;

COMMENT ON VIEW webhook_holds IS 'Why due deliveries of an endpoint wait: paused, circuit_open (also if half open), limited (max_in_flight or rate_limit_per_second); NULL: they could be claimed now.';
