-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE OR REPLACE FUNCTION webhook_settle_3_retry(p_queue_ids uuid[], p_workers text[], p_locked_ats timestamp with time zone[], p_ages_us bigint[], p_lengths_us bigint[], p_durations_ms integer[], p_http_statuses smallint[], p_bodies text[], p_errors text[], p_delays_us bigint[], p_error_kinds text[] DEFAULT '{}'::text[], p_evidence text[] DEFAULT '{}'::text[])
 RETURNS SETOF uuid
 LANGUAGE plpgsql
 SET enable_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_hashjoin TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET lock_timeout TO '10s'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
      BEGIN
        RETURN QUERY
        WITH outcome AS MATERIALIZED (SELECT * FROM unnest(
    p_queue_ids, p_workers, p_locked_ats, p_ages_us, p_lengths_us, p_durations_ms, p_http_statuses, p_bodies, p_errors,
    p_error_kinds, p_evidence, p_delays_us) AS o (queue_id, worker, locked_at, age_us, length_us, duration_ms, http_status, body, error, error_kind, evidence, delay_us))
        UPDATE webhook_queue_open q
        SET status = 'pending', worker_id = NULL, locked_at = NULL, lock_expires_at = NULL, updated_at = now(),
            -- an outcome without a duration is unknown: a known one may still come until the delivery is sent again
            abandoned_by = CASE WHEN o.duration_ms IS NULL THEN q.abandoned_by END,
            abandoned_at = CASE WHEN o.duration_ms IS NULL THEN q.abandoned_at END,
            retry_count = 3 + 1,
            next_retry_at = now() + o.delay_us * interval '1 microsecond',
            ready_since = NULL,
            retry_3_started_at = now() - o.age_us * interval '1 microsecond',
            retry_3_completed_at = now() - (o.age_us - o.length_us) * interval '1 microsecond',
            retry_3_duration_ms = o.duration_ms,
            retry_3_http_status = o.http_status,
            retry_3_response_body = o.body,
            retry_3_error = o.error,
            retry_3_error_kind = o.error_kind,
            retry_3_evidence = o.evidence::json
        FROM outcome o
        WHERE q.queue_id = o.queue_id
            AND (q.worker_id = o.worker AND q.locked_at = o.locked_at AND q.retry_count = 3
                 OR q.abandoned_by = o.worker AND q.abandoned_at = o.locked_at AND q.retry_count IN (3, 3 + 1))
        RETURNING q.queue_id;
      END $function$;

COMMENT ON FUNCTION webhook_settle_3_retry IS 'Writes attempts with the number 3 that are followed by another attempt.';
