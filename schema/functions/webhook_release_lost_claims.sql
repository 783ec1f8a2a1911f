-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- The same for all leases of worker names that are no longer in use, except for the deliveries in p_kept. It reads the whole
-- open partition, so it is called only after a claim whose answer was lost.
CREATE OR REPLACE FUNCTION webhook_release_lost_claims(p_worker_ids text[], p_kept uuid[])
 RETURNS bigint
 LANGUAGE plpgsql
 SET jit TO 'off'
 SET lock_timeout TO '10s'
AS $function$
DECLARE
  released bigint;
BEGIN
  SELECT count(*) INTO released
  FROM (SELECT array_agg(lost.queue_id ORDER BY lost.queue_id) AS queue_ids,
               array_agg(lost.worker_id ORDER BY lost.queue_id) AS worker_ids,
               array_agg(lost.locked_at ORDER BY lost.queue_id) AS locked_ats
        FROM (SELECT q.queue_id, CASE WHEN q.worker_id = ANY (p_worker_ids) THEN q.worker_id ELSE q.abandoned_by END AS worker_id,
                     CASE WHEN q.worker_id = ANY (p_worker_ids) THEN q.locked_at ELSE q.abandoned_at END AS locked_at
              FROM webhook_queue_open q
              WHERE q.status = 'processing' AND (q.worker_id = ANY (p_worker_ids) OR q.abandoned_by = ANY (p_worker_ids))
                AND q.queue_id <> ALL (p_kept)) AS lost) AS lost_claims
  CROSS JOIN LATERAL webhook_release(lost_claims.queue_ids, lost_claims.worker_ids, lost_claims.locked_ats);
  RETURN released;
END $function$;

COMMENT ON FUNCTION webhook_release_lost_claims IS 'Gives back the leases of claims whose answers were lost.';
