-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE OR REPLACE FUNCTION webhook_settle_2_terminal(p_queue_ids uuid[], p_workers text[], p_locked_ats timestamp with time zone[], p_ages_us bigint[], p_lengths_us bigint[], p_durations_ms integer[], p_http_statuses smallint[], p_bodies text[], p_errors text[], p_statuses text[], p_reasons text[], p_error_kinds text[] DEFAULT '{}'::text[], p_evidence text[] DEFAULT '{}'::text[])
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
    p_error_kinds, p_evidence, p_statuses, p_reasons) AS o (queue_id, worker, locked_at, age_us, length_us, duration_ms, http_status, body, error, error_kind, evidence, final_status, reason)),
        settled AS (
          DELETE FROM webhook_queue_open q USING outcome o
          WHERE q.queue_id = o.queue_id
            AND (q.worker_id = o.worker AND q.locked_at = o.locked_at AND q.retry_count = 2
                 OR q.abandoned_by = o.worker AND q.abandoned_at = o.locked_at AND q.retry_count IN (2, 2 + 1))
          RETURNING q.*, o.age_us, o.length_us, o.duration_ms, o.http_status, o.body, o.error, o.error_kind, o.evidence, o.final_status, o.reason)
        INSERT INTO webhook_queue (id, queue_id, event_type, event_id, config_id, webhook_url, url_params, priority, max_retries, correlation_id, traceparent, replay_of, created_at, next_retry_at, deleted_at, retry_count, retry_0_started_at, retry_0_completed_at, retry_0_duration_ms, retry_0_http_status, retry_0_response_body, retry_0_error, retry_0_error_kind, retry_0_evidence, retry_1_started_at, retry_1_completed_at, retry_1_duration_ms, retry_1_http_status, retry_1_response_body, retry_1_error, retry_1_error_kind, retry_1_evidence,
          retry_2_started_at, retry_2_completed_at, retry_2_duration_ms, retry_2_http_status, retry_2_response_body, retry_2_error, retry_2_error_kind, retry_2_evidence,
          status, status_reason, ready_since, completed_at, updated_at, settled_in)
        SELECT id, queue_id, event_type, event_id, config_id, webhook_url, url_params, priority, max_retries, correlation_id, traceparent, replay_of, created_at, next_retry_at, deleted_at, 2, retry_0_started_at, retry_0_completed_at, retry_0_duration_ms, retry_0_http_status, retry_0_response_body, retry_0_error, retry_0_error_kind, retry_0_evidence, retry_1_started_at, retry_1_completed_at, retry_1_duration_ms, retry_1_http_status, retry_1_response_body, retry_1_error, retry_1_error_kind, retry_1_evidence,
          now() - age_us * interval '1 microsecond', now() - (age_us - length_us) * interval '1 microsecond', duration_ms, http_status, body, error,
          error_kind, evidence::json,
          final_status, reason, NULL, now(), now(), pg_current_xact_id()::text::bigint
        FROM settled
        RETURNING webhook_queue.queue_id;
      END $function$;

COMMENT ON FUNCTION webhook_settle_2_terminal IS 'Writes attempts with the number 2 that ended their deliveries.';
