-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Sends a waiting delivery to another URL: cancels it and stores a new delivery that refers to it, in one transaction.
-- Returns no row if the delivery no longer waits. Otherwise returns one row: NULLs if the new delivery is stored, or else what
-- webhook_enqueue returned.
CREATE OR REPLACE FUNCTION webhook_reroute(p_replay_of uuid, p_reason text, p_queue_id uuid, p_event_type text, p_event_id text, p_config_id bigint, p_config_revision timestamp with time zone, p_url text, p_params text, p_priority smallint, p_max_retries smallint, p_scheduled_at timestamp with time zone, p_correlation_id text, p_traceparent text)
 RETURNS TABLE(queue_id uuid, first_queue_id uuid, locked_at timestamp with time zone, first_cancelled boolean)
 LANGUAGE plpgsql
 SET lock_timeout TO '10s'
AS $function$
#variable_conflict use_column
BEGIN
  -- checked before anything is cancelled: the endpoint may have changed since the caller read it
  PERFORM FROM webhook_configs c
  WHERE c.id = p_config_id AND c.updated_at = p_config_revision AND c.deleted_at IS NULL FOR KEY SHARE;
  IF NOT FOUND THEN
    RETURN QUERY SELECT p_queue_id, NULL::uuid, NULL::timestamptz, false;
    RETURN;
  END IF;
  IF (SELECT count(*) FROM webhook_cancel(ARRAY[p_replay_of], p_reason)) = 0 THEN RETURN; END IF;
  RETURN QUERY
  SELECT p_queue_id, e.first_queue_id, NULL::timestamptz, e.first_cancelled
  FROM (SELECT 1) AS one
  LEFT JOIN webhook_enqueue(
    ARRAY[p_queue_id], ARRAY[p_event_type], ARRAY[p_event_id], ARRAY[true], ARRAY[p_config_id], ARRAY[p_config_revision],
    ARRAY[p_url], ARRAY[p_params], ARRAY[p_priority], ARRAY[p_max_retries], ARRAY[p_scheduled_at], ARRAY[p_correlation_id],
    ARRAY[p_traceparent], ARRAY[p_replay_of], ARRAY[NULL]::text[], ARRAY[NULL]::bigint[]) AS e ON true;
  IF NOT EXISTS (SELECT FROM webhook_event_keys k
                 WHERE k.event_id = p_replay_of::text AND k.event_type = 'replay' AND k.config_id = p_config_id) THEN
    -- the endpoint has changed at this moment: nothing is done
    RAISE EXCEPTION 'the endpoint has changed' USING ERRCODE = 'serialization_failure';
  END IF;
  -- the event's key now belongs to the new delivery: anyone who sends the event again gets that id
  UPDATE webhook_event_keys k SET queue_id = p_queue_id, cancelled_at = NULL
  WHERE k.event_id = p_event_id AND k.config_id = p_config_id AND k.queue_id = p_replay_of AND k.event_type <> 'replay';
END $function$;

COMMENT ON FUNCTION webhook_reroute IS 'Cancels a waiting delivery, and stores a new one to another URL in its place.';
