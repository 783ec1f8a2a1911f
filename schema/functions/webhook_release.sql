-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Gives back leases that nobody uses: their deliveries are ready again, as if nobody had taken them. Returns the deliveries.
-- Each entry names a lease. If p_locked_ats is NULL, it is the lease that the delivery was stored under. If the lease was taken
-- over from an expired one, the expired one is restored. If the lease has been taken over itself, the takeover is void: there is
-- no loss to record.
CREATE OR REPLACE FUNCTION webhook_release(p_queue_ids uuid[], p_worker_ids text[], p_locked_ats timestamp with time zone[])
 RETURNS SETOF uuid
 LANGUAGE sql
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_hashjoin TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET lock_timeout TO '10s'
AS $function$
  -- if one was a probe, the next probe is due now: the claim gave the lease and the next probe the same time
  UPDATE webhook_configs c SET circuit_probe_at = now()
  FROM unnest(p_queue_ids, p_worker_ids, p_locked_ats) AS r (queue_id, worker_id, locked_at)
  JOIN webhook_queue_open q ON q.queue_id = r.queue_id AND q.status = 'processing' AND q.worker_id = r.worker_id
    AND q.locked_at = coalesce(r.locked_at, CASE WHEN q.retry_count = 0 THEN q.created_at END)
  WHERE c.id = q.config_id AND c.circuit_state = 'half_open' AND c.circuit_probe_at = q.lock_expires_at;
  UPDATE webhook_queue_open q
  SET status = CASE WHEN kept.is_lease THEN 'processing' ELSE 'pending' END,
      worker_id = CASE WHEN kept.is_lease THEN q.abandoned_by END,
      locked_at = CASE WHEN kept.is_lease THEN q.abandoned_at END,
      lock_expires_at = CASE WHEN kept.is_lease THEN now() END,
      abandoned_by = NULL, abandoned_at = NULL, updated_at = now()
  FROM (
    SELECT o.queue_id, o.locked_at, given_back.locked_at AS given_back, r.worker_id,
           o.abandoned_at IS NOT NULL
             AND (o.abandoned_by, o.abandoned_at) IS DISTINCT FROM (r.worker_id, given_back.locked_at) AS is_lease
    FROM unnest(p_queue_ids, p_worker_ids, p_locked_ats) AS r (queue_id, worker_id, locked_at)
    JOIN webhook_queue_open o ON o.queue_id = r.queue_id
    CROSS JOIN LATERAL (SELECT coalesce(r.locked_at, CASE WHEN o.retry_count = 0 THEN o.created_at END)) AS given_back (locked_at)
  ) AS kept
  WHERE q.queue_id = kept.queue_id AND q.status = 'processing' AND q.locked_at = kept.locked_at
    AND (q.worker_id = kept.worker_id AND q.locked_at = kept.given_back
         -- taken over after its end to record a loss that did not happen: nobody uses that lease either
         OR q.abandoned_by = kept.worker_id AND q.abandoned_at = kept.given_back)
  RETURNING q.queue_id
$function$;

COMMENT ON FUNCTION webhook_release IS 'Gives back leases that nobody uses.';
