-- The statements that run for every delivery, as functions, because a function can pin its plan: the planner must not
-- choose a sequential scan or a sort on the strength of statistics that are missing or old. It holds behind a pooler too.

-- Takes leases on at most p_limit deliveries for p_worker_id, fairly: for each priority a loose index scan walks the
-- endpoints that have ready deliveries, first those after p_after, then the others, until the batch is full. So an
-- endpoint with a million waiting deliveries costs the others one index probe. Every filter stands before a LIMIT.
-- A delivery whose lease has expired is taken over too; `abandoned_at` then says when the lost attempt began.
-- p_share bounds what is taken from one endpoint; for those in p_config_ids, p_rooms does. So the caller sees to it that
-- a slow endpoint never holds all of its leases.
-- With p_held it takes instead the expired leases of endpoints that are disabled, which would otherwise stay leased.
CREATE FUNCTION webhook_claim(p_worker_id text, p_limit int, p_lease interval, p_after bigint, p_held boolean,
                              p_share int, p_config_ids bigint[], p_rooms int[])
RETURNS TABLE (
  queue_id uuid, config_id bigint, config_revision timestamptz, event_id text, webhook_url text,
  traceparent text, retry_count smallint, max_retries smallint,
  locked_at timestamptz, abandoned_at timestamptz, waited_us bigint
)
LANGUAGE plpgsql
SET enable_sort = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
  WITH due AS MATERIALIZED (
    SELECT d.queue_id, d.abandoned_at, e.config_revision
    FROM generate_series(0, 3) AS p (priority)
    CROSS JOIN LATERAL (VALUES (p_after, 9223372036854775807), (0, p_after)) AS half (after, upto)
    CROSS JOIN LATERAL (
      WITH RECURSIVE ring AS (
        (SELECT q.config_id FROM webhook_queue_open q
         WHERE q.ready_since IS NOT NULL AND q.priority = p.priority
           AND q.config_id > half.after AND q.config_id <= half.upto
         ORDER BY q.config_id LIMIT 1)
        UNION ALL
        SELECT (SELECT q.config_id FROM webhook_queue_open q
                WHERE q.ready_since IS NOT NULL AND q.priority = p.priority
                  AND q.config_id > ring.config_id AND q.config_id <= half.upto
                ORDER BY q.config_id LIMIT 1)
        FROM ring WHERE ring.config_id IS NOT NULL
      )
      SELECT ring.config_id, c.updated_at AS config_revision
      FROM ring
      CROSS JOIN LATERAL (
        SELECT c.updated_at FROM webhook_configs c
        WHERE c.id = ring.config_id AND c.enabled <> p_held) AS c
      WHERE ring.config_id IS NOT NULL) AS e
    CROSS JOIN LATERAL (
      SELECT q.queue_id, q.locked_at AS abandoned_at FROM webhook_queue_open q
      WHERE q.ready_since IS NOT NULL AND q.priority = p.priority AND q.config_id = e.config_id
        AND (q.status = 'pending' AND NOT p_held OR q.lock_expires_at < now())
      ORDER BY q.ready_since
      LIMIT coalesce(p_rooms[array_position(p_config_ids, e.config_id)], p_share)
      FOR UPDATE SKIP LOCKED) AS d
    LIMIT p_limit
  )
  UPDATE webhook_queue_open q
  SET status = 'processing', worker_id = p_worker_id, locked_at = now(), lock_expires_at = now() + p_lease, updated_at = now()
  FROM due WHERE q.queue_id = due.queue_id
  RETURNING q.queue_id, q.config_id, due.config_revision, q.event_id, q.webhook_url,
            q.traceparent, q.retry_count, q.max_retries, q.locked_at, due.abandoned_at,
            (extract(epoch FROM clock_timestamp() - greatest(q.created_at, q.next_retry_at)) * 1000000)::bigint;
END $$;
COMMENT ON FUNCTION webhook_claim IS 'Takes leases on a fair batch of ready deliveries.';

-- Makes ready what was scheduled for a time that has come. So a claim never steps over a million future retries.
-- Answers how many, and the microseconds until the next one is due, NULL if none is scheduled.
CREATE FUNCTION webhook_promote(p_limit int) RETURNS TABLE (promoted bigint, next_due_us bigint)
LANGUAGE plpgsql
SET enable_sort = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
  WITH due AS MATERIALIZED (
    SELECT q.queue_id FROM webhook_queue_open q
    WHERE q.ready_since IS NULL AND q.next_retry_at <= now()
    ORDER BY q.next_retry_at LIMIT p_limit FOR UPDATE SKIP LOCKED
  )
  UPDATE webhook_queue_open q SET ready_since = now(), updated_at = now()
  FROM due WHERE q.queue_id = due.queue_id;
  GET DIAGNOSTICS promoted = ROW_COUNT;
  next_due_us := (
    SELECT extract(epoch FROM q.next_retry_at - clock_timestamp()) * 1000000 FROM webhook_queue_open q
    WHERE q.ready_since IS NULL ORDER BY q.next_retry_at LIMIT 1)::bigint;
  RETURN NEXT;
END $$;
COMMENT ON FUNCTION webhook_promote IS 'Makes ready what was scheduled for a time that has come.';

-- Settling comes in seven pairs, one for each attempt number, since each writes columns of its own:
--   webhook_settle_N_retry     the attempt failed and another is due after p_delays_us
--   webhook_settle_N_terminal  the attempt ended the delivery, which moves to the archive of the day: by DELETE and
--                              INSERT, since an UPDATE that moves a row between partitions breaks concurrent claims
-- Each entry names its lease (worker and locked_at). A delivery that another worker has taken over meanwhile does not
-- match, is left as it is, and is missing from the answer. Times are told as ages, in microseconds, so that the clock
-- of the database is the only one. Arrays are sorted by queue_id by the caller, so that two settles never deadlock.
DO $create$
DECLARE
  pinned CONSTANT text := 'LANGUAGE plpgsql
    SET enable_sort = off SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
    SET plan_cache_mode = force_generic_plan';
  attempt_parameters CONSTANT text := '
    p_queue_ids uuid[], p_workers text[], p_locked_ats timestamptz[],
    p_ages_us bigint[], p_lengths_us bigint[], p_durations_ms int[], p_http_statuses smallint[],
    p_bodies text[], p_errors text[]';
  attempt_arrays CONSTANT text := '
    p_queue_ids, p_workers, p_locked_ats, p_ages_us, p_lengths_us, p_durations_ms, p_http_statuses, p_bodies, p_errors';
  attempt_columns CONSTANT text := 'queue_id, worker, locked_at, age_us, length_us, duration_ms, http_status, body, error';
  kept CONSTANT text := 'id, queue_id, event_type, event_id, config_id, webhook_url, url_params, priority, max_retries,
    correlation_id, traceparent, replay_of, created_at, retry_count, next_retry_at, deleted_at';
  earlier text;
BEGIN
  FOR n IN 0..6 LOOP
    SELECT coalesce(string_agg(format(
      'retry_%1$s_started_at, retry_%1$s_completed_at, retry_%1$s_duration_ms, retry_%1$s_http_status, retry_%1$s_response_body, retry_%1$s_error, ', k), '' ORDER BY k), '')
    INTO earlier FROM generate_series(0, n - 1) AS k;

    IF n < 6 THEN  -- attempt 6 is the last: nothing follows it
    EXECUTE format($f$
      CREATE FUNCTION webhook_settle_%1$s_retry(%3$s, p_delays_us bigint[]) RETURNS SETOF uuid %2$s AS $body$
      BEGIN
        RETURN QUERY
        WITH outcome AS MATERIALIZED (SELECT * FROM unnest(%4$s, p_delays_us) AS o (%5$s, delay_us))
        UPDATE webhook_queue_open q
        SET status = 'pending', worker_id = NULL, locked_at = NULL, lock_expires_at = NULL, updated_at = now(),
            retry_count = q.retry_count + 1,
            next_retry_at = now() + o.delay_us * interval '1 microsecond',
            ready_since = NULL,
            retry_%1$s_started_at = now() - o.age_us * interval '1 microsecond',
            retry_%1$s_completed_at = now() - (o.age_us - o.length_us) * interval '1 microsecond',
            retry_%1$s_duration_ms = o.duration_ms,
            retry_%1$s_http_status = o.http_status,
            retry_%1$s_response_body = o.body,
            retry_%1$s_error = o.error
        FROM outcome o
        WHERE q.queue_id = o.queue_id AND q.worker_id = o.worker AND q.locked_at = o.locked_at AND q.retry_count = %1$s
        RETURNING q.queue_id;
      END $body$ $f$, n, pinned, attempt_parameters, attempt_arrays, attempt_columns);
    EXECUTE format('COMMENT ON FUNCTION webhook_settle_%s_retry IS %L', n, format('Writes attempts of number %s that another one follows.', n));
    END IF;

    EXECUTE format($f$
      CREATE FUNCTION webhook_settle_%1$s_terminal(%3$s, p_statuses text[], p_reasons text[]) RETURNS SETOF uuid %2$s AS $body$
      BEGIN
        RETURN QUERY
        WITH outcome AS MATERIALIZED (SELECT * FROM unnest(%4$s, p_statuses, p_reasons) AS o (%5$s, final_status, reason)),
        settled AS (
          DELETE FROM webhook_queue_open q USING outcome o
          WHERE q.queue_id = o.queue_id AND q.worker_id = o.worker AND q.locked_at = o.locked_at AND q.retry_count = %1$s
          RETURNING q.*, o.age_us, o.length_us, o.duration_ms, o.http_status, o.body, o.error, o.final_status, o.reason)
        INSERT INTO webhook_queue (%6$s, %7$s
          retry_%1$s_started_at, retry_%1$s_completed_at, retry_%1$s_duration_ms, retry_%1$s_http_status, retry_%1$s_response_body, retry_%1$s_error,
          status, status_reason, ready_since, completed_at, updated_at, settled_in)
        SELECT %6$s, %7$s
          now() - age_us * interval '1 microsecond', now() - (age_us - length_us) * interval '1 microsecond', duration_ms, http_status, body, error,
          final_status, reason, NULL, now(), now(), pg_current_xact_id()::text::bigint
        FROM settled
        RETURNING webhook_queue.queue_id;
      END $body$ $f$, n, pinned, attempt_parameters, attempt_arrays, attempt_columns, kept, earlier);
    EXECUTE format('COMMENT ON FUNCTION webhook_settle_%s_terminal IS %L', n, format('Writes attempts of number %s that ended their deliveries.', n));
  END LOOP;

  SELECT string_agg(format(
    'retry_%1$s_started_at, retry_%1$s_completed_at, retry_%1$s_duration_ms, retry_%1$s_http_status, retry_%1$s_response_body, retry_%1$s_error', k), ', ' ORDER BY k)
  INTO earlier FROM generate_series(0, 6) AS k;
  EXECUTE format($f$
    CREATE FUNCTION webhook_cancel(p_queue_ids uuid[], p_reason text) RETURNS SETOF uuid %1$s AS $body$
    BEGIN
      RETURN QUERY
      WITH wanted AS MATERIALIZED (SELECT w.queue_id FROM unnest(p_queue_ids) AS w (queue_id)),
      cancelled AS (
        DELETE FROM webhook_queue_open q USING wanted w
        WHERE q.queue_id = w.queue_id AND q.status = 'pending'
        RETURNING q.*)
      INSERT INTO webhook_queue (%2$s, %3$s, status, status_reason, ready_since, completed_at, updated_at, settled_in)
      SELECT %2$s, %3$s, 'cancelled', p_reason, NULL, now(), now(), pg_current_xact_id()::text::bigint
      FROM cancelled
      RETURNING webhook_queue.queue_id;
    END $body$ $f$, pinned, kept, earlier);
END $create$;
COMMENT ON FUNCTION webhook_cancel IS 'Ends pending deliveries with a reason; those under a lease are left as they are, and are missing from the answer.';


-- Stores deliveries and remembers the events that callers named, and replays, in one transaction. Answers only the entries that were
-- not stored: with the delivery that the same event made before, or with NULL where the endpoint has changed or gone
-- since the caller looked (p_config_revisions), who then looks again. Arrays are sorted by the caller by the event's key.
CREATE FUNCTION webhook_enqueue(
  p_queue_ids uuid[], p_event_types text[], p_event_ids text[], p_named boolean[], p_config_ids bigint[],
  p_config_revisions timestamptz[], p_urls text[], p_params text[], p_priorities smallint[], p_max_retries smallint[],
  p_scheduled_ats timestamptz[], p_correlation_ids text[], p_traceparents text[], p_replays uuid[])
RETURNS TABLE (queue_id uuid, first_queue_id uuid)
LANGUAGE plpgsql
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_mergejoin = off
SET jit = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
  stored_ids uuid[];
BEGIN
  WITH incoming AS MATERIALIZED (
    SELECT i.*
    FROM unnest(p_queue_ids, p_event_types, p_event_ids, p_named, p_config_ids, p_config_revisions, p_urls, p_params,
                p_priorities, p_max_retries, p_scheduled_ats, p_correlation_ids, p_traceparents, p_replays)
      AS i (queue_id, event_type, event_id, named, config_id, config_revision, url, params,
            priority, max_retries, scheduled_at, correlation_id, traceparent, replay_of)
    WHERE (SELECT c.updated_at = i.config_revision AND c.deleted_at IS NULL FROM webhook_configs c WHERE c.id = i.config_id)
  ), remembered AS (
    INSERT INTO webhook_event_keys (config_id, event_type, event_id, queue_id)
    SELECT i.config_id, CASE WHEN i.replay_of IS NULL THEN i.event_type ELSE 'replay' END,
           coalesce(i.replay_of::text, i.event_id), i.queue_id
    FROM incoming i WHERE i.named
    ON CONFLICT DO NOTHING
    RETURNING webhook_event_keys.queue_id
  ), stored AS (
    INSERT INTO webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, url_params, priority, max_retries,
                               next_retry_at, ready_since, correlation_id, traceparent, replay_of)
    SELECT i.queue_id, i.event_type, i.event_id, i.config_id, i.url, i.params::json, i.priority, i.max_retries,
           greatest(i.scheduled_at, now()), CASE WHEN i.scheduled_at > now() THEN NULL ELSE now() END,
           i.correlation_id, i.traceparent, i.replay_of
    FROM incoming i
    WHERE NOT i.named OR i.queue_id IN (SELECT r.queue_id FROM remembered r)
    RETURNING webhook_queue.queue_id
  )
  SELECT coalesce(array_agg(s.queue_id), '{}') INTO stored_ids FROM stored s;

  IF cardinality(stored_ids) < cardinality(p_queue_ids) THEN
    -- a new statement, so a new snapshot: it sees the rows that the conflict was with
    RETURN QUERY
    SELECT i.queue_id, CASE WHEN i.named THEN
             (SELECT k.queue_id FROM webhook_event_keys k
              WHERE k.event_id = coalesce(i.replay_of::text, i.event_id) AND k.config_id = i.config_id
                AND k.event_type = CASE WHEN i.replay_of IS NULL THEN i.event_type ELSE 'replay' END) END
    FROM unnest(p_queue_ids, p_event_types, p_event_ids, p_named, p_config_ids, p_replays)
      AS i (queue_id, event_type, event_id, named, config_id, replay_of)
    WHERE i.queue_id <> ALL (stored_ids);
  END IF;
END $$;
COMMENT ON FUNCTION webhook_enqueue IS 'Stores deliveries, each event once an endpoint; answers those that it did not store.';
