-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- What is held. A delivery that is due but may not be claimed is held, and its endpoint says why. The order is that of the
-- reasons: one that is paused is paused, whatever else it is.
CREATE VIEW webhook_holds AS
 SELECT c.id AS config_id,
        CASE
            WHEN (NOT c.enabled) THEN 'paused'::text
            WHEN (c.circuit_state <> 'closed'::text) THEN 'circuit_open'::text
            WHEN ((c.max_in_flight IS NOT NULL) OR (c.rate_limit_per_second IS NOT NULL)) THEN 'limited'::text
            ELSE NULL::text
        END AS held_by
   FROM webhook_configs c;

COMMENT ON VIEW webhook_holds IS 'Why due deliveries of an endpoint wait: paused, circuit_open (half open, too), limited (max_in_flight or rate_limit_per_second); NULL: they could be claimed now.';
