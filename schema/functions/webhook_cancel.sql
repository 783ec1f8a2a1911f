-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE OR REPLACE FUNCTION webhook_cancel(p_queue_ids uuid[], p_reason text)
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
      WITH wanted AS MATERIALIZED (SELECT w.queue_id FROM unnest(p_queue_ids) AS w (queue_id)),
      cancelled AS (
        DELETE FROM webhook_queue_open q USING wanted w
        WHERE q.queue_id = w.queue_id AND q.status = 'pending'
        RETURNING q.*),
      -- anyone who sends the event again must learn that it was cancelled
      noted AS (
        UPDATE webhook_event_keys k SET cancelled_at = now() FROM cancelled c
        WHERE k.config_id = c.config_id AND k.queue_id = c.queue_id
          -- the key of the event, the key of the replay if the delivery is one, or both
          AND (k.event_id, k.event_type) IN ((c.event_id, c.event_type), (c.replay_of::text, 'replay')))
      INSERT INTO webhook_queue (id, queue_id, event_type, event_id, config_id, webhook_url, url_params, priority, max_retries, correlation_id, traceparent, replay_of, created_at, next_retry_at, deleted_at, retry_count, retry_0_started_at, retry_0_completed_at, retry_0_duration_ms, retry_0_http_status, retry_0_response_body, retry_0_error, retry_0_error_kind, retry_0_evidence, retry_1_started_at, retry_1_completed_at, retry_1_duration_ms, retry_1_http_status, retry_1_response_body, retry_1_error, retry_1_error_kind, retry_1_evidence, retry_2_started_at, retry_2_completed_at, retry_2_duration_ms, retry_2_http_status, retry_2_response_body, retry_2_error, retry_2_error_kind, retry_2_evidence, retry_3_started_at, retry_3_completed_at, retry_3_duration_ms, retry_3_http_status, retry_3_response_body, retry_3_error, retry_3_error_kind, retry_3_evidence, retry_4_started_at, retry_4_completed_at, retry_4_duration_ms, retry_4_http_status, retry_4_response_body, retry_4_error, retry_4_error_kind, retry_4_evidence, retry_5_started_at, retry_5_completed_at, retry_5_duration_ms, retry_5_http_status, retry_5_response_body, retry_5_error, retry_5_error_kind, retry_5_evidence, retry_6_started_at, retry_6_completed_at, retry_6_duration_ms, retry_6_http_status, retry_6_response_body, retry_6_error, retry_6_error_kind, retry_6_evidence, status, status_reason, ready_since, completed_at, updated_at, settled_in)
      SELECT id, queue_id, event_type, event_id, config_id, webhook_url, url_params, priority, max_retries, correlation_id, traceparent, replay_of, created_at, next_retry_at, deleted_at, c.retry_count, retry_0_started_at, retry_0_completed_at, retry_0_duration_ms, retry_0_http_status, retry_0_response_body, retry_0_error, retry_0_error_kind, retry_0_evidence, retry_1_started_at, retry_1_completed_at, retry_1_duration_ms, retry_1_http_status, retry_1_response_body, retry_1_error, retry_1_error_kind, retry_1_evidence, retry_2_started_at, retry_2_completed_at, retry_2_duration_ms, retry_2_http_status, retry_2_response_body, retry_2_error, retry_2_error_kind, retry_2_evidence, retry_3_started_at, retry_3_completed_at, retry_3_duration_ms, retry_3_http_status, retry_3_response_body, retry_3_error, retry_3_error_kind, retry_3_evidence, retry_4_started_at, retry_4_completed_at, retry_4_duration_ms, retry_4_http_status, retry_4_response_body, retry_4_error, retry_4_error_kind, retry_4_evidence, retry_5_started_at, retry_5_completed_at, retry_5_duration_ms, retry_5_http_status, retry_5_response_body, retry_5_error, retry_5_error_kind, retry_5_evidence, retry_6_started_at, retry_6_completed_at, retry_6_duration_ms, retry_6_http_status, retry_6_response_body, retry_6_error, retry_6_error_kind, retry_6_evidence, 'cancelled', p_reason, NULL, now(), now(), pg_current_xact_id()::text::bigint
      FROM cancelled c
      RETURNING webhook_queue.queue_id;
    END $function$;

COMMENT ON FUNCTION webhook_cancel IS 'Cancels pending deliveries with a reason, and returns them. Deliveries under a lease are left as they are.';
