-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Open deliveries by state, each state with the age of its oldest delivery. The states are ready, scheduled, processing, and the
-- reasons why deliveries are held. Age counts from when the delivery could be claimed. For a held delivery it counts from when it
-- was due, which a failed probe does not change.
CREATE OR REPLACE FUNCTION webhook_open_deliveries(p_config_id bigint)
 RETURNS TABLE(state text, deliveries bigint, oldest_us bigint)
 LANGUAGE sql
 STABLE
 SET jit TO 'off'
AS $function$
  SELECT coalesce(o.state, h.held_by, 'ready'), sum(o.deliveries)::bigint,
         (extract(epoch FROM now() - min(CASE WHEN h.held_by IS NULL THEN o.ready_since ELSE o.due_since END)) * 1000000)::bigint
  FROM (
    SELECT q.config_id,
           CASE WHEN q.status = 'processing' THEN 'processing' WHEN q.ready_since IS NULL THEN 'scheduled' END AS state,
           count(*) AS deliveries, min(q.ready_since) AS ready_since, min(q.next_retry_at) AS due_since
    FROM webhook_queue_open q
    WHERE p_config_id IS NULL OR q.config_id = p_config_id
    GROUP BY 1, 2
  ) AS o
  LEFT JOIN webhook_holds h ON h.config_id = o.config_id
  GROUP BY 1
$function$;

COMMENT ON FUNCTION webhook_open_deliveries IS 'The number and age of open deliveries: ready, scheduled, processing, and held deliveries by their reason.';
