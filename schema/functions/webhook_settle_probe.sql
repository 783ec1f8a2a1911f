-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Writes probes that failed. Their deliveries keep waiting as if nothing had been sent, but behind the others: a delivery that
-- its receiver never accepts must not keep the circuit open. The delay is one second and doubles each time, up to an hour.
-- Parameters and result are the same as for webhook_settle_N_retry. Probes are numbered; only the newest 100 per delivery are
-- kept. An outcome also counts after a takeover, until the takeover has recorded it as unknown: that uses up an attempt.
CREATE OR REPLACE FUNCTION webhook_settle_probe(p_queue_ids uuid[], p_workers text[], p_locked_ats timestamp with time zone[], p_ages_us bigint[], p_lengths_us bigint[], p_durations_ms integer[], p_http_statuses smallint[], p_bodies text[], p_errors text[], p_postponed boolean[], p_error_kinds text[] DEFAULT '{}'::text[], p_evidence text[] DEFAULT '{}'::text[])
 RETURNS SETOF uuid
 LANGUAGE plpgsql
 SET lock_timeout TO '10s'
 SET enable_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_hashjoin TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
BEGIN
  RETURN QUERY
  WITH outcome AS MATERIALIZED (
    SELECT o.*, 1 + coalesce((SELECT max(p.number) FROM webhook_probes p WHERE p.queue_id = o.queue_id), 0) AS number
    FROM unnest(p_queue_ids, p_workers, p_locked_ats, p_ages_us, p_lengths_us, p_durations_ms, p_http_statuses, p_bodies, p_errors, p_postponed,
                p_error_kinds, p_evidence)
      AS o (queue_id, worker, locked_at, age_us, length_us, duration_ms, http_status, body, error, postponed, error_kind, evidence)
  ), released AS (
    UPDATE webhook_queue_open q
    SET status = 'pending', worker_id = NULL, locked_at = NULL, lock_expires_at = NULL, updated_at = now(),
        abandoned_by = NULL, abandoned_at = NULL,
        ready_since = CASE WHEN NOT o.postponed THEN now() END,
        next_retry_at = CASE WHEN o.postponed THEN now() + least(2 ^ least(o.number - 1, 20), 3600) * interval '1 second'
                             ELSE q.next_retry_at END
    FROM outcome o
    WHERE q.queue_id = o.queue_id AND q.status = 'processing'
      AND (q.worker_id = o.worker AND q.locked_at = o.locked_at
           -- taken over, but the loss is not recorded yet
           OR q.abandoned_by = o.worker AND q.abandoned_at = o.locked_at)
    RETURNING o.*, q.retry_count
  ), written AS (
    INSERT INTO webhook_probes (queue_id, number, attempt, started_at, completed_at, duration_ms, http_status, response_body, error,
                                error_kind, evidence)
    SELECT r.queue_id, r.number, r.retry_count, now() - r.age_us * interval '1 microsecond',
           now() - (r.age_us - r.length_us) * interval '1 microsecond', r.duration_ms, r.http_status, r.body, r.error,
           r.error_kind, r.evidence::json
    FROM released r
    RETURNING webhook_probes.queue_id, webhook_probes.number
  ), removed AS (
    DELETE FROM webhook_probes p USING written w WHERE p.queue_id = w.queue_id AND p.number <= w.number - 100
  )
  SELECT w.queue_id FROM written w;
END $function$;

COMMENT ON FUNCTION webhook_settle_probe IS 'Writes failed probes, which use up no attempt, and lets their deliveries wait on.';
