-- How deliveries move on or end: by the outcome of an attempt, or without one.

-- Settles are seven pairs of functions, one pair per attempt number, because each number has its own columns:
--   webhook_settle_N_retry     the attempt failed and another is due after p_delays_us
--   webhook_settle_N_terminal  the attempt ended the delivery, which moves to the archive of the day: by DELETE and
--                              INSERT, since an UPDATE that moves a row between partitions breaks concurrent claims
-- Each entry names its lease (worker and locked_at). A delivery that another worker has taken over meanwhile does not match. It
-- is left as it is and is missing from the result. Times are given as ages in microseconds, so that the database's clock is the
-- only one. The caller sorts the arrays by queue_id, so that two settles never deadlock.
-- An outcome also counts if its lease expired and was taken over, as long as the delivery has not been sent since. The entry
-- then names the abandoned lease. If the takeover has already recorded the outcome as unknown, the known outcome replaces it.
CREATE FUNCTION webhook_write_settles() RETURNS void
LANGUAGE plpgsql
AS $write$
DECLARE
  pinned CONSTANT text := $pinned$LANGUAGE plpgsql
    SET enable_sort = off SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
    SET lock_timeout = '10s'
    SET plan_cache_mode = force_generic_plan$pinned$;
  attempt_parameters CONSTANT text := '
    p_queue_ids uuid[], p_workers text[], p_locked_ats timestamptz[],
    p_ages_us bigint[], p_lengths_us bigint[], p_durations_ms int[], p_http_statuses smallint[],
    p_bodies text[], p_errors text[]';
  -- last, because a parameter with a default is; unnest fills a short array up with NULLs
  optional_parameters CONSTANT text := 'p_error_kinds text[] DEFAULT ''{}'', p_evidence text[] DEFAULT ''{}''';
  attempt_arrays CONSTANT text := '
    p_queue_ids, p_workers, p_locked_ats, p_ages_us, p_lengths_us, p_durations_ms, p_http_statuses, p_bodies, p_errors,
    p_error_kinds, p_evidence';
  attempt_columns CONSTANT text := 'queue_id, worker, locked_at, age_us, length_us, duration_ms, http_status, body, error, error_kind, evidence';
  -- what is kept of one attempt
  columns_of_attempt CONSTANT text := 'retry_%1$s_started_at, retry_%1$s_completed_at, retry_%1$s_duration_ms, retry_%1$s_http_status, retry_%1$s_response_body, retry_%1$s_error, retry_%1$s_error_kind, retry_%1$s_evidence';
  fence CONSTANT text := 'q.queue_id = o.queue_id
            AND (q.worker_id = o.worker AND q.locked_at = o.locked_at AND q.retry_count = %1$s
                 OR q.abandoned_by = o.worker AND q.abandoned_at = o.locked_at AND q.retry_count IN (%1$s, %1$s + 1))';
  -- the columns that are copied to the archive unchanged: all that the settle does not write itself
  kept CONSTANT text := (
    SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a
    WHERE a.attrelid = 'webhook_queue'::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attname !~ '^retry_'
      AND a.attname NOT IN ('status', 'status_reason', 'worker_id', 'locked_at', 'lock_expires_at', 'abandoned_by', 'abandoned_at',
                            'ready_since', 'completed_at', 'updated_at', 'settled_in'));
  earlier text;
BEGIN
  FOR n IN 0..6 LOOP
    SELECT coalesce(string_agg(format(columns_of_attempt || ', ', k), '' ORDER BY k), '')
    INTO earlier FROM generate_series(0, n - 1) AS k;

    IF n < 6 THEN  -- attempt 6 is the last: nothing follows it
    EXECUTE format($f$
      CREATE OR REPLACE FUNCTION webhook_settle_%1$s_retry(%3$s, p_delays_us bigint[], %7$s) RETURNS SETOF uuid %2$s AS $body$
      BEGIN
        RETURN QUERY
        WITH outcome AS MATERIALIZED (SELECT * FROM unnest(%4$s, p_delays_us) AS o (%5$s, delay_us))
        UPDATE webhook_queue_open q
        SET status = 'pending', worker_id = NULL, locked_at = NULL, lock_expires_at = NULL, updated_at = now(),
            -- an outcome without a duration is unknown: a known one may still come until the delivery is sent again
            abandoned_by = CASE WHEN o.duration_ms IS NULL THEN q.abandoned_by END,
            abandoned_at = CASE WHEN o.duration_ms IS NULL THEN q.abandoned_at END,
            retry_count = %1$s + 1,
            next_retry_at = now() + o.delay_us * interval '1 microsecond',
            ready_since = NULL,
            retry_%1$s_started_at = now() - o.age_us * interval '1 microsecond',
            retry_%1$s_completed_at = now() - (o.age_us - o.length_us) * interval '1 microsecond',
            retry_%1$s_duration_ms = o.duration_ms,
            retry_%1$s_http_status = o.http_status,
            retry_%1$s_response_body = o.body,
            retry_%1$s_error = o.error,
            retry_%1$s_error_kind = o.error_kind,
            retry_%1$s_evidence = o.evidence::json
        FROM outcome o
        WHERE %6$s
        RETURNING q.queue_id;
      END $body$ $f$, n, pinned, attempt_parameters, attempt_arrays, attempt_columns, format(fence, n), optional_parameters);
    EXECUTE format('COMMENT ON FUNCTION webhook_settle_%s_retry IS %L', n, format('Writes attempts with the number %s that are followed by another attempt.', n));
    END IF;

    EXECUTE format($f$
      CREATE OR REPLACE FUNCTION webhook_settle_%1$s_terminal(%3$s, p_statuses text[], p_reasons text[], %9$s) RETURNS SETOF uuid %2$s AS $body$
      BEGIN
        RETURN QUERY
        WITH outcome AS MATERIALIZED (SELECT * FROM unnest(%4$s, p_statuses, p_reasons) AS o (%5$s, final_status, reason)),
        settled AS (
          DELETE FROM webhook_queue_open q USING outcome o
          WHERE %8$s
          RETURNING q.*, o.age_us, o.length_us, o.duration_ms, o.http_status, o.body, o.error, o.error_kind, o.evidence, o.final_status, o.reason)
        INSERT INTO webhook_queue (%6$s, retry_count, %7$s
          %10$s,
          status, status_reason, ready_since, completed_at, updated_at, settled_in)
        SELECT %6$s, %1$s, %7$s
          now() - age_us * interval '1 microsecond', now() - (age_us - length_us) * interval '1 microsecond', duration_ms, http_status, body, error,
          error_kind, evidence::json,
          final_status, reason, NULL, now(), now(), pg_current_xact_id()::text::bigint
        FROM settled
        RETURNING webhook_queue.queue_id;
      END $body$ $f$, n, pinned, attempt_parameters, attempt_arrays, attempt_columns, kept, earlier, format(fence, n),
      optional_parameters, format(columns_of_attempt, n));
    EXECUTE format('COMMENT ON FUNCTION webhook_settle_%s_terminal IS %L', n, format('Writes attempts with the number %s that ended their deliveries.', n));
  END LOOP;

  SELECT string_agg(format(columns_of_attempt, k), ', ' ORDER BY k)
  INTO earlier FROM generate_series(0, 6) AS k;
  EXECUTE format($f$
    CREATE OR REPLACE FUNCTION webhook_cancel(p_queue_ids uuid[], p_reason text) RETURNS SETOF uuid %1$s AS $body$
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
      INSERT INTO webhook_queue (%2$s, retry_count, %3$s, status, status_reason, ready_since, completed_at, updated_at, settled_in)
      SELECT %2$s, c.retry_count, %3$s, 'cancelled', p_reason, NULL, now(), now(), pg_current_xact_id()::text::bigint
      FROM cancelled c
      RETURNING webhook_queue.queue_id;
    END $body$ $f$, pinned, kept, earlier);
END $write$;
COMMENT ON FUNCTION webhook_write_settles IS 'Recreates webhook_settle_N_retry, webhook_settle_N_terminal and webhook_cancel for the current columns of webhook_queue.';
DO $$ BEGIN PERFORM webhook_write_settles(); END $$;
COMMENT ON FUNCTION webhook_cancel IS 'Cancels pending deliveries with a reason, and returns them. Deliveries under a lease are left as they are.';

-- Writes probes that failed. Their deliveries keep waiting as if nothing had been sent, but behind the others: a delivery that
-- its receiver never accepts must not keep the circuit open. The delay is one second and doubles each time, up to an hour.
-- Parameters and result are the same as for webhook_settle_N_retry. Probes are numbered; only the newest 100 per delivery are
-- kept. An outcome also counts after a takeover, until the takeover has recorded it as unknown: that uses up an attempt.
CREATE FUNCTION webhook_settle_probe(
  p_queue_ids uuid[], p_workers text[], p_locked_ats timestamptz[],
  p_ages_us bigint[], p_lengths_us bigint[], p_durations_ms int[], p_http_statuses smallint[],
  p_bodies text[], p_errors text[], p_postponed boolean[],
  p_error_kinds text[] DEFAULT '{}', p_evidence text[] DEFAULT '{}')
RETURNS SETOF uuid
LANGUAGE plpgsql
SET lock_timeout = '10s'
SET enable_sort = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
SET plan_cache_mode = force_generic_plan
AS $$
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
END $$;
COMMENT ON FUNCTION webhook_settle_probe IS 'Writes failed probes, which use up no attempt, and lets their deliveries wait on.';

-- Cancels at most p_limit open deliveries of deleted endpoints. Leased deliveries are left until their lease ends.
CREATE FUNCTION webhook_cancel_orphans(p_limit int) RETURNS bigint
LANGUAGE plpgsql
SET jit = off
AS $$
DECLARE
  gone CONSTANT bigint[] := ARRAY(SELECT c.id FROM webhook_configs c WHERE c.deleted_at IS NOT NULL AND c.cleared_at IS NULL);
  cancelled bigint;
BEGIN
  IF gone = '{}' THEN RETURN 0; END IF;
  SELECT count(*) INTO cancelled FROM webhook_cancel(ARRAY(
    SELECT q.queue_id FROM webhook_queue_open q
    WHERE q.config_id = ANY (gone) AND q.status = 'pending'
    LIMIT p_limit FOR UPDATE SKIP LOCKED), 'the config was deleted');
  IF cancelled = 0 THEN
    UPDATE webhook_configs c SET cleared_at = now()
    WHERE c.id = ANY (gone) AND c.deleted_at < now() - interval '1 minute'
      AND NOT EXISTS (SELECT FROM webhook_queue_open q WHERE q.config_id = c.id);
  END IF;
  RETURN cancelled;
END $$;
COMMENT ON FUNCTION webhook_cancel_orphans IS 'Cancels open deliveries of deleted endpoints.';
