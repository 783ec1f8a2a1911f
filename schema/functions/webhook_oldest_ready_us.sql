-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- How long the oldest claimable delivery has waited, in microseconds, found by a walk over the endpoints. Endpoints with limits
-- are left out, because their deliveries may rightly wait long.
CREATE OR REPLACE FUNCTION webhook_oldest_ready_us(p_config_id bigint)
 RETURNS bigint
 LANGUAGE sql
 STABLE
 SET enable_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_hashjoin TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
AS $function$
  SELECT (extract(epoch FROM now() - min(d.ready_since)) * 1000000)::bigint
  FROM generate_series(0, 3) AS p (priority)
  CROSS JOIN LATERAL (
    WITH RECURSIVE ring AS (
      (SELECT q.config_id FROM webhook_queue_open q
       WHERE q.ready_since IS NOT NULL AND q.priority = p.priority
       ORDER BY q.config_id LIMIT 1)
      UNION ALL
      SELECT (SELECT q.config_id FROM webhook_queue_open q
              WHERE q.ready_since IS NOT NULL AND q.priority = p.priority AND q.config_id > ring.config_id
              ORDER BY q.config_id LIMIT 1)
      FROM ring WHERE ring.config_id IS NOT NULL
    )
    SELECT ring.config_id
    FROM ring JOIN webhook_configs c ON c.id = ring.config_id AND c.enabled AND c.circuit_state = 'closed'
      AND (p_config_id IS NOT NULL OR num_nonnulls(c.max_in_flight, c.rate_limit_per_second) = 0)
    WHERE p_config_id IS NULL OR ring.config_id = p_config_id) AS e
  CROSS JOIN LATERAL (
    SELECT q.ready_since FROM webhook_queue_open q
    WHERE q.ready_since IS NOT NULL AND q.priority = p.priority AND q.config_id = e.config_id AND q.status = 'pending'
    ORDER BY q.ready_since LIMIT 1) AS d
$function$;

COMMENT ON FUNCTION webhook_oldest_ready_us IS 'How long the oldest delivery that could be claimed has waited.';
