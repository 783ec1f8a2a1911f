-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Stores deliveries in one transaction, with the keys of named events and replays.
-- p_worker_ids and p_leases_us ask for a lease per delivery; NULL asks for none. A lease is granted if the endpoint is enabled,
-- its circuit is closed, it is not recovering, and it has no limits. Limits, probes and pacing are left to the claims.
-- Returns a row for each delivery that was stored under a lease, with the start of the lease, and for each that was not stored:
-- with the delivery that the same event made before, and whether that one was cancelled. NULL instead of that delivery means
-- that the endpoint has changed or gone since the caller read it (p_config_revisions); the caller then reads it again.
-- The caller sorts the arrays by the event's key.
CREATE OR REPLACE FUNCTION webhook_enqueue(p_queue_ids uuid[], p_event_types text[], p_event_ids text[], p_named boolean[], p_config_ids bigint[], p_config_revisions timestamp with time zone[], p_urls text[], p_params text[], p_priorities smallint[], p_max_retries smallint[], p_scheduled_ats timestamp with time zone[], p_correlation_ids text[], p_traceparents text[], p_replays uuid[], p_worker_ids text[], p_leases_us bigint[])
 RETURNS TABLE(queue_id uuid, first_queue_id uuid, locked_at timestamp with time zone, first_cancelled boolean)
 LANGUAGE plpgsql
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET lock_timeout TO '10s'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
DECLARE
  stored_ids uuid[];
  leased_ids uuid[];
BEGIN
  WITH incoming AS MATERIALIZED (
    SELECT i.queue_id, i.event_type, i.event_id, i.named, i.config_id, i.url, i.params, i.priority, i.max_retries,
           i.scheduled_at, i.correlation_id, i.traceparent, i.replay_of, i.lease_us,
           CASE WHEN c.enabled AND c.circuit_state = 'closed' AND num_nonnulls(c.max_in_flight, c.rate_limit_per_second) = 0
                     AND webhook_ramp_rate(c.circuit_state, c.circuit_changed_at) IS NULL
                     AND (i.scheduled_at > now()) IS NOT TRUE
                THEN i.worker_id END AS worker_id
    FROM unnest(p_queue_ids, p_event_types, p_event_ids, p_named, p_config_ids, p_config_revisions, p_urls, p_params,
                p_priorities, p_max_retries, p_scheduled_ats, p_correlation_ids, p_traceparents, p_replays,
                p_worker_ids, p_leases_us)
      AS i (queue_id, event_type, event_id, named, config_id, config_revision, url, params,
            priority, max_retries, scheduled_at, correlation_id, traceparent, replay_of, worker_id, lease_us)
    -- OFFSET 0 makes the planner look endpoints up one by one: a batch has few endpoints, the table may have thousands
    CROSS JOIN LATERAL (SELECT * FROM webhook_configs c
                        WHERE c.id = i.config_id AND c.updated_at = i.config_revision AND c.deleted_at IS NULL OFFSET 0) AS c
  ), remembered AS (
    INSERT INTO webhook_event_keys (config_id, event_type, event_id, queue_id)
    SELECT i.config_id, CASE WHEN i.replay_of IS NULL THEN i.event_type ELSE 'replay' END,
           coalesce(i.replay_of::text, i.event_id), i.queue_id
    FROM incoming i WHERE i.named
    ON CONFLICT DO NOTHING
    RETURNING webhook_event_keys.queue_id
  ), stored AS (
    INSERT INTO webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, url_params, priority, max_retries,
                               next_retry_at, ready_since, correlation_id, traceparent, replay_of,
                               status, worker_id, locked_at, lock_expires_at)
    SELECT i.queue_id, i.event_type, i.event_id, i.config_id, i.url, i.params::json, i.priority, i.max_retries,
           greatest(i.scheduled_at, now()), CASE WHEN i.scheduled_at > now() THEN NULL ELSE now() END,
           i.correlation_id, i.traceparent, i.replay_of,
           CASE WHEN i.worker_id IS NULL THEN 'pending' ELSE 'processing' END, i.worker_id,
           CASE WHEN i.worker_id IS NOT NULL THEN now() END,
           CASE WHEN i.worker_id IS NOT NULL THEN now() + i.lease_us * interval '1 microsecond' END
    FROM incoming i
    WHERE NOT i.named OR i.queue_id IN (SELECT r.queue_id FROM remembered r)
    RETURNING webhook_queue.queue_id, webhook_queue.worker_id
  )
  SELECT coalesce(array_agg(s.queue_id), '{}'), array_agg(s.queue_id) FILTER (WHERE s.worker_id IS NOT NULL)
  INTO stored_ids, leased_ids FROM stored s;

  IF leased_ids IS NOT NULL THEN
    RETURN QUERY SELECT l.queue_id, NULL::uuid, now(), false FROM unnest(leased_ids) AS l (queue_id);
  END IF;
  IF cardinality(stored_ids) < cardinality(p_queue_ids) THEN
    -- a new statement has a new snapshot, which sees the rows that caused the conflict
    RETURN QUERY
    SELECT i.queue_id, k.queue_id, NULL::timestamptz, k.cancelled_at IS NOT NULL
    FROM unnest(p_queue_ids, p_event_types, p_event_ids, p_named, p_config_ids, p_replays)
      AS i (queue_id, event_type, event_id, named, config_id, replay_of)
    LEFT JOIN LATERAL (
      SELECT k.queue_id, k.cancelled_at FROM webhook_event_keys k
      WHERE i.named AND k.event_id = coalesce(i.replay_of::text, i.event_id) AND k.config_id = i.config_id
        AND k.event_type = CASE WHEN i.replay_of IS NULL THEN i.event_type ELSE 'replay' END OFFSET 0) AS k ON true
    WHERE i.queue_id <> ALL (stored_ids);
  END IF;
END $function$;

COMMENT ON FUNCTION webhook_enqueue IS 'Stores deliveries, each event once per endpoint, under a lease if one is wanted and possible. Returns those that are leased, and those that it did not store.';
