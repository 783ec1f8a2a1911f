-- Records: how long what is remembered lives, what is found where, and what is held.

-- Retention. What guards a delivery lives exactly as long as the delivery can be found: an event's key and the failed probes
-- go with the archive of their delivery, the key of a replay goes with the archive of the delivery that it repeats. An
-- event that was replayed is the replay's from then on, for as long as that can be found. So
-- nothing that can still be found, replayed or sent is accepted a second time, and nothing is forgotten by its age alone.
CREATE TABLE webhook_retired_archives (
  archive text PRIMARY KEY,
  retired_at timestamptz NOT NULL DEFAULT now(),
  forgotten_upto uuid,
  dropped_at timestamptz
);
COMMENT ON TABLE webhook_retired_archives IS 'Archives that were past the retention: detached first, then cleared of what guarded their deliveries, then dropped.';
COMMENT ON COLUMN webhook_retired_archives.archive IS 'The name of its table.';
COMMENT ON COLUMN webhook_retired_archives.retired_at IS 'When it was detached: from then on nothing in it is found, replayed or shown.';
COMMENT ON COLUMN webhook_retired_archives.forgotten_upto IS 'Up to this queue_id the keys and failed probes of its deliveries are forgotten; NULL: none are yet.';
COMMENT ON COLUMN webhook_retired_archives.dropped_at IS 'When its table was dropped; NULL: that is yet to be done.';

-- Detaches the archives whose whole day lies before now() - p_retention, the oldest first, and answers their names. All
-- processes together detach at most p_per_hour in an hour: a clock that is months ahead, or a retention that was mistyped,
-- must not cost the whole history before someone sees it.
CREATE FUNCTION webhook_retire_archives(p_retention interval, p_per_hour int) RETURNS SETOF text
LANGUAGE plpgsql
SET lock_timeout = '250ms'
SET timezone = 'UTC'
AS $$
DECLARE
  old text;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('webhook_queue archives', 0));
  FOR old IN
    SELECT a.archive FROM webhook_archives a
    WHERE (a.archive_day + 1)::timestamptz <= now() - p_retention
    ORDER BY a.archive_day
    LIMIT greatest(0, p_per_hour - (SELECT count(*) FROM webhook_retired_archives r
                                    WHERE r.retired_at BETWEEN now() - interval '1 hour' AND now()))
  LOOP
    EXECUTE format('ALTER TABLE webhook_queue DETACH PARTITION %I', old);
    INSERT INTO webhook_retired_archives AS r (archive) VALUES (old)
    ON CONFLICT (archive) DO UPDATE SET retired_at = now(), forgotten_upto = NULL, dropped_at = NULL;
    RETURN NEXT old;
  END LOOP;
END $$;
COMMENT ON FUNCTION webhook_retire_archives IS 'Retention: detaches old archives, a few in an hour.';

-- Forgets the keys and failed probes of the next p_limit deliveries of the oldest detached archive; drops the archive once
-- there are none left. Each call is a transaction, and the next one goes on where it ended, whoever makes it. No row: nothing
-- is left to do, or another process is at it.
CREATE FUNCTION webhook_forget_retired(p_limit int) RETURNS TABLE (archive text, keys bigint, dropped boolean)
LANGUAGE plpgsql
SET lock_timeout = '250ms'
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
  retired webhook_retired_archives;
  last uuid;
  keys_forgotten bigint;
BEGIN
  IF NOT pg_try_advisory_xact_lock(hashtextextended('webhook_retired_archives', 0)) THEN RETURN; END IF;
  SELECT r.* INTO retired FROM webhook_retired_archives r WHERE r.dropped_at IS NULL ORDER BY r.archive LIMIT 1;
  IF NOT FOUND THEN RETURN; END IF;
  -- someone may have dropped it by hand, or attached it again
  IF to_regclass(retired.archive) IS NOT NULL AND NOT EXISTS (SELECT FROM webhook_archives a WHERE a.archive = retired.archive) THEN
    EXECUTE format($step$
      WITH batch AS MATERIALIZED (
        SELECT q.queue_id, q.config_id, q.event_type, q.event_id FROM %I q
        WHERE q.queue_id > $1 ORDER BY q.queue_id LIMIT $2
      ), repeated AS MATERIALIZED (
        SELECT b.queue_id, k.queue_id AS replay, k.cancelled_at FROM batch b
        JOIN webhook_event_keys k ON k.event_id = b.queue_id::text AND k.event_type = 'replay' AND k.config_id = b.config_id
        WHERE EXISTS (SELECT FROM webhook_queue q WHERE q.queue_id = k.queue_id)
      ), handed_on AS (
        UPDATE webhook_event_keys k SET queue_id = r.replay, cancelled_at = r.cancelled_at FROM batch b JOIN repeated r ON r.queue_id = b.queue_id
        WHERE k.event_id = b.event_id AND k.event_type = b.event_type AND k.config_id = b.config_id AND k.queue_id = b.queue_id
      ), events AS (
        DELETE FROM webhook_event_keys k USING batch b
        WHERE k.event_id = b.event_id AND k.event_type = b.event_type AND k.config_id = b.config_id AND k.queue_id = b.queue_id
          AND NOT EXISTS (SELECT FROM repeated r WHERE r.queue_id = b.queue_id)
        RETURNING 1
      ), replays AS (
        DELETE FROM webhook_event_keys k USING batch b
        WHERE k.event_id = b.queue_id::text AND k.event_type = 'replay' AND k.config_id = b.config_id
        RETURNING 1
      ), probes AS (
        DELETE FROM webhook_probes p USING batch b WHERE p.queue_id = b.queue_id
      )
      SELECT (SELECT b.queue_id FROM batch b ORDER BY b.queue_id DESC LIMIT 1),
             (SELECT count(*) FROM events) + (SELECT count(*) FROM replays)
      $step$, retired.archive)
    INTO last, keys_forgotten
    USING coalesce(retired.forgotten_upto, '00000000-0000-0000-0000-000000000000'), p_limit;
    IF last IS NOT NULL THEN
      UPDATE webhook_retired_archives r SET forgotten_upto = last WHERE r.archive = retired.archive;
      RETURN QUERY SELECT retired.archive, keys_forgotten, false;
      RETURN;
    END IF;
    -- outages that ended before that day are past the retention, too
    DELETE FROM webhook_circuit_openings o WHERE o.closed_at < to_date(right(retired.archive, 8), 'YYYYMMDD')::timestamptz;
    EXECUTE format('DROP TABLE %I', retired.archive);
  END IF;
  UPDATE webhook_retired_archives r SET dropped_at = now() WHERE r.archive = retired.archive;
  RETURN QUERY SELECT retired.archive, 0::bigint, true;
END $$;
COMMENT ON FUNCTION webhook_forget_retired IS 'Retention: forgets, step by step, what guarded the deliveries of detached archives, and drops these.';

-- For processes of the version before: they must not forget by age, either.
CREATE OR REPLACE FUNCTION webhook_drop_archives(p_retention interval) RETURNS int
LANGUAGE sql
AS $$ SELECT count(*)::int FROM webhook_retire_archives(p_retention, 4) $$;
COMMENT ON FUNCTION webhook_drop_archives IS 'For processes of an earlier version: webhook_retire_archives.';
CREATE OR REPLACE FUNCTION webhook_forget_events(p_retention interval, p_limit int) RETURNS bigint
LANGUAGE sql
AS $$ SELECT 0::bigint $$;
COMMENT ON FUNCTION webhook_forget_events IS 'For processes of an earlier version: does nothing, keys go with their archives.';
CREATE OR REPLACE FUNCTION webhook_forget_probes(p_retention interval, p_limit int) RETURNS bigint
LANGUAGE sql
AS $$ SELECT 0::bigint $$;
COMMENT ON FUNCTION webhook_forget_probes IS 'For processes of an earlier version: does nothing, failed probes go with their archives.';
DROP INDEX webhook_event_keys_age;
DROP INDEX webhook_probes_age;
COMMENT ON COLUMN webhook_event_keys.remembered_at IS 'When that was; the key is forgotten with the archive of its delivery, that of a replay with the archive of the delivery that it repeats.';

-- Failed probes are numbered, so that their count survives when all but the newest 100 of a delivery are removed.
ALTER TABLE webhook_probes ADD COLUMN number int;
UPDATE webhook_probes p SET number = n.number
FROM (SELECT id, row_number() OVER (PARTITION BY queue_id ORDER BY id) AS number FROM webhook_probes) AS n
WHERE n.id = p.id;
ALTER TABLE webhook_probes ALTER COLUMN number SET NOT NULL;
COMMENT ON COLUMN webhook_probes.number IS 'Which failed probe of its delivery it is, from 1: the highest says how many there were, of which the newest 100 are kept.';
CREATE INDEX webhook_probes_number ON webhook_probes (queue_id, number);
DROP INDEX webhook_probes_queue_id;
COMMENT ON TABLE webhook_probes IS 'Requests that were made to see whether a receiver is back, and failed: they use up no attempt of their deliveries. The newest 100 of each delivery are kept. One that succeeds is the attempt itself.';
COMMENT ON FUNCTION webhook_failed_probes IS 'For processes of an earlier version: the failed probes of a delivery that are kept.';

-- As before; numbers the probes, and removes those that are more than the newest 100. What is postponed is due after a second,
-- and each time after twice as long, up to an hour.
DROP FUNCTION webhook_settle_probe;
CREATE FUNCTION webhook_settle_probe(
  p_queue_ids uuid[], p_workers text[], p_locked_ats timestamptz[],
  p_ages_us bigint[], p_lengths_us bigint[], p_durations_ms int[], p_http_statuses smallint[],
  p_bodies text[], p_errors text[], p_postponed boolean[])
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
    FROM unnest(p_queue_ids, p_workers, p_locked_ats, p_ages_us, p_lengths_us, p_durations_ms, p_http_statuses, p_bodies, p_errors, p_postponed)
      AS o (queue_id, worker, locked_at, age_us, length_us, duration_ms, http_status, body, error, postponed)
  ), released AS (
    UPDATE webhook_queue_open q
    SET status = 'pending', worker_id = NULL, locked_at = NULL, lock_expires_at = NULL, updated_at = now(),
        ready_since = CASE WHEN NOT o.postponed THEN now() END,
        next_retry_at = CASE WHEN o.postponed THEN now() + least(2 ^ least(o.number - 1, 20), 3600) * interval '1 second'
                             ELSE q.next_retry_at END
    FROM outcome o
    WHERE q.queue_id = o.queue_id AND q.worker_id = o.worker AND q.locked_at = o.locked_at
    RETURNING o.*, q.retry_count
  ), written AS (
    INSERT INTO webhook_probes (queue_id, number, attempt, started_at, completed_at, duration_ms, http_status, response_body, error)
    SELECT r.queue_id, r.number, r.retry_count, now() - r.age_us * interval '1 microsecond',
           now() - (r.age_us - r.length_us) * interval '1 microsecond', r.duration_ms, r.http_status, r.body, r.error
    FROM released r
    RETURNING webhook_probes.queue_id, webhook_probes.number
  ), removed AS (
    DELETE FROM webhook_probes p USING written w WHERE p.queue_id = w.queue_id AND p.number <= w.number - 100
  )
  SELECT w.queue_id FROM written w;
END $$;
COMMENT ON FUNCTION webhook_settle_probe IS 'Writes requests that failed and used up no attempt, and lets their deliveries wait on.';

-- The deliveries of an event, its replays, and theirs. All of them carry the event's id, which the caller checks: an event
-- may be named like some other delivery.
-- The cast stands inside a CASE: beside a condition it may be evaluated before it, and is from PostgreSQL 18 on.
CREATE OR REPLACE FUNCTION webhook_deliveries_of_event(p_event_id text) RETURNS SETOF uuid
LANGUAGE sql STABLE
SET enable_seqscan = off
SET jit = off
AS $$
  WITH RECURSIVE of_event AS (
    SELECT k.queue_id FROM webhook_event_keys k WHERE k.event_id = p_event_id AND k.event_type <> 'replay'
    UNION
    -- an event without a name of its own has that of its delivery
    SELECT own.queue_id
    FROM (SELECT CASE WHEN p_event_id ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN p_event_id::uuid END AS queue_id) AS own
    WHERE own.queue_id IS NOT NULL
    UNION
    SELECT k.queue_id FROM of_event o JOIN webhook_event_keys k ON k.event_id = o.queue_id::text AND k.event_type = 'replay'
  )
  SELECT o.queue_id FROM of_event o
$$;

-- Statistics. As before, with two differences. The time from which on archives are read is a literal of the statement, so
-- that the others are not even planned or locked, however many there are. And it is never ahead of now(): after the clock
-- was ahead once, what ended since was left out.
CREATE OR REPLACE FUNCTION webhook_facts(p_from bigint, p_before bigint, p_since timestamptz)
RETURNS TABLE (config_id bigint, period_start timestamptz, fact text, duration_ms int, occurrences bigint, latest timestamptz)
LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_sort = off
SET jit = off
AS $$
BEGIN
  RETURN QUERY EXECUTE format($facts$
    SELECT alike.config_id, alike.period_start, f.fact, f.duration_ms, alike.deliveries, alike.latest
    FROM (
      SELECT q.config_id, date_trunc('minute', q.completed_at, 'UTC') AS period_start, q.status, q.retry_count,
             -- a cancelled delivery was waiting for the attempt that its retry count names
             q.retry_count - CASE q.status WHEN 'cancelled' THEN 1 ELSE 0 END AS last_attempt,
             q.retry_0_duration_ms, q.retry_1_duration_ms, q.retry_2_duration_ms, q.retry_3_duration_ms,
             q.retry_4_duration_ms, q.retry_5_duration_ms, q.retry_6_duration_ms,
             count(*) AS deliveries, max(q.completed_at) AS latest
      FROM webhook_queue q
      WHERE q.settled_in >= $1 AND q.settled_in < $2 AND q.completed_at >= %L
      GROUP BY 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12
    ) AS alike
    CROSS JOIN LATERAL (
      SELECT alike.status, NULL::int
      UNION ALL
      SELECT 'attempt', alike.retry_0_duration_ms WHERE alike.last_attempt >= 0
      UNION ALL
      SELECT 'retry', a.duration_ms
      FROM (VALUES
        (1, alike.retry_1_duration_ms), (2, alike.retry_2_duration_ms), (3, alike.retry_3_duration_ms),
        (4, alike.retry_4_duration_ms), (5, alike.retry_5_duration_ms), (6, alike.retry_6_duration_ms)) AS a (attempt, duration_ms)
      WHERE alike.last_attempt > 0 AND a.attempt <= alike.last_attempt
    ) AS f (fact, duration_ms)
    $facts$, least(p_since, now()) - interval '1 day')
  USING p_from, p_before;
END $$;

-- As before, but `counted_at` is never ahead of now(), and is put right where it is. That is written even where nothing is
-- new: whatever ends from then on is within the day's margin.
CREATE OR REPLACE FUNCTION webhook_count_statistics(p_transactions bigint, p_recent interval DEFAULT '0')
RETURNS TABLE (counted bigint, caught_up boolean)
LANGUAGE plpgsql
SET timezone = 'UTC'
AS $$
#variable_conflict use_column
DECLARE
  progress webhook_statistics_progress;
  was_ahead boolean;
  horizon bigint;
  upto bigint;
  newly_counted bigint;
BEGIN
  IF NOT pg_try_advisory_xact_lock(hashtextextended('webhook_statistics', 0)) THEN RETURN; END IF;
  SELECT * INTO progress FROM webhook_statistics_progress;
  IF progress.counted_at BETWEEN now() - p_recent AND now() THEN RETURN; END IF;
  was_ahead := progress.counted_at > now();
  horizon := pg_snapshot_xmin(pg_current_snapshot())::text::bigint;
  IF horizon < progress.counted_before THEN
    -- restored from a dump into a cluster that numbers its transactions anew: count everything once more
    UPDATE webhook_queue SET settled_in = 0 WHERE completed_at IS NOT NULL AND settled_in >= horizon;
    DELETE FROM webhook_statistics;
    progress.counted_before := 0;
    progress.counted_at := '-infinity';
  END IF;
  upto := least(horizon, progress.counted_before + p_transactions);
  WITH summed AS (
    SELECT coalesce(f.config_id, 0) AS config_id, f.period_start, f.fact, webhook_rounded_duration(f.duration_ms) AS duration_ms,
           sum(f.occurrences) AS occurrences, coalesce(sum(f.occurrences * f.duration_ms), 0) AS duration_total_ms,
           max(f.latest) AS latest
    FROM webhook_facts(progress.counted_before, upto, progress.counted_at) f
    GROUP BY GROUPING SETS ((2, 3, 4, f.config_id), (2, 3, 4))
  ), added AS (
    INSERT INTO webhook_statistics AS s
    SELECT config_id, period_start, fact, duration_ms, occurrences, duration_total_ms FROM summed
    -- the order of the primary key, which is filled faster so
    ORDER BY 1, 2, 3, 4
    ON CONFLICT (config_id, period_start, fact, duration_ms) DO UPDATE
    SET occurrences = s.occurrences + excluded.occurrences, duration_total_ms = s.duration_total_ms + excluded.duration_total_ms
  )
  SELECT coalesce(sum(occurrences), 0), coalesce(max(latest), progress.counted_at) INTO newly_counted, progress.counted_at
  FROM summed WHERE config_id = 0 AND fact NOT IN ('attempt', 'retry');
  -- an idle queue is left without a write
  IF newly_counted > 0 OR upto < horizon OR was_ahead THEN
    UPDATE webhook_statistics_progress
    SET counted_before = upto, counted_at = least(progress.counted_at, now());
  END IF;
  RETURN QUERY SELECT newly_counted, upto = horizon;
END $$;
COMMENT ON COLUMN webhook_statistics_progress.counted_at IS 'When the latest of them ended, or now() where that was later.';

-- What is held. A delivery that is due but may not be claimed is held, and its endpoint says why. The order is that of the
-- reasons: one that is paused is paused, whatever else it is.
CREATE VIEW webhook_holds AS
SELECT c.id AS config_id,
       CASE WHEN NOT c.enabled THEN 'paused'
            WHEN c.circuit_state <> 'closed' THEN 'circuit_open'
            WHEN c.max_in_flight IS NOT NULL OR c.rate_limit_per_second IS NOT NULL THEN 'limited' END AS held_by
FROM webhook_configs c;
COMMENT ON VIEW webhook_holds IS 'Why due deliveries of an endpoint wait: paused, circuit_open (half open, too), limited (max_in_flight or rate_limit_per_second); NULL: they could be claimed now.';

-- How much is open, and the age of the oldest of it, by state: ready, scheduled, processing, and the reasons of what is held.
-- Age counts from when the delivery could be claimed; for what is held from when it was due, which no failed probe renews.
CREATE FUNCTION webhook_open_deliveries(p_config_id bigint) RETURNS TABLE (state text, deliveries bigint, oldest_us bigint)
LANGUAGE sql STABLE
SET jit = off
AS $$
  SELECT coalesce(o.state, h.held_by, 'ready'), sum(o.deliveries)::bigint,
         (extract(epoch FROM now() - min(CASE WHEN h.held_by IS NULL THEN o.ready_since ELSE o.due_since END)) * 1000000)::bigint
  FROM (
    SELECT q.config_id,
           CASE WHEN q.status = 'processing' THEN 'processing' WHEN q.ready_since IS NULL THEN 'scheduled' END AS state,
           count(*) AS deliveries, min(q.ready_since) AS ready_since, min(q.next_retry_at) AS due_since
    FROM webhook_queue_open q
    WHERE p_config_id IS NULL OR q.config_id = p_config_id
    GROUP BY 1, 2
  ) AS o
  LEFT JOIN webhook_holds h ON h.config_id = o.config_id
  GROUP BY 1
$$;
COMMENT ON FUNCTION webhook_open_deliveries IS 'How much is open, and how old it is: ready, scheduled, processing, and held by its reason.';
COMMENT ON FUNCTION webhook_backlog IS 'For processes of an earlier version: how much is open, without what is held.';

-- All facts of terminal deliveries in a window and of the open ones as they are now, each counted once: what is counted
-- already, the rest of the archives, and the open partition, which is read once; in one snapshot. A window begins on a whole
-- minute; on a whole hour if it is longer than 3 hours, on a whole day (UTC) if it is longer than 3 days.
CREATE FUNCTION webhook_statistics_and_holds(p_config_id bigint, p_window interval)
RETURNS TABLE (counted_from timestamptz, fact text, duration_ms int, occurrences bigint, duration_total_ms bigint, oldest_us bigint)
LANGUAGE plpgsql STABLE
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
  since CONSTANT timestamptz := date_trunc(
    CASE WHEN p_window <= interval '3 hours' THEN 'minute' WHEN p_window <= interval '3 days' THEN 'hour' ELSE 'day' END,
    now() - p_window, 'UTC');
BEGIN
  RETURN QUERY
  WITH open_alike AS MATERIALIZED (
    SELECT q.config_id,
           CASE WHEN q.status = 'processing' THEN 'processing' WHEN q.ready_since IS NULL THEN 'scheduled' END AS state,
           q.retry_count, q.retry_0_duration_ms, q.retry_1_duration_ms, q.retry_2_duration_ms, q.retry_3_duration_ms,
           q.retry_4_duration_ms, q.retry_5_duration_ms,
           count(*) AS deliveries, min(q.ready_since) AS ready_since, min(q.next_retry_at) AS due_since
    FROM webhook_queue_open q
    WHERE p_config_id IS NULL OR q.config_id = p_config_id
    GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9
  ), facts AS (
    SELECT s.fact, s.duration_ms, s.occurrences, s.duration_total_ms, NULL::timestamptz AS oldest FROM webhook_statistics s
    WHERE s.config_id = coalesce(p_config_id, 0) AND s.period_start >= coalesce(since, '-infinity')
    UNION ALL
    SELECT f.fact, webhook_rounded_duration(f.duration_ms), f.occurrences, coalesce(f.occurrences * f.duration_ms, 0), NULL
    FROM webhook_statistics_progress p
    CROSS JOIN LATERAL webhook_facts(p.counted_before, 9223372036854775807, p.counted_at) f
    WHERE (p_config_id IS NULL OR f.config_id = p_config_id) AND f.period_start >= coalesce(since, '-infinity')
    UNION ALL
    SELECT coalesce(o.state, h.held_by, 'ready'), -1, o.deliveries, 0,
           CASE WHEN o.state IS NULL THEN CASE WHEN h.held_by IS NULL THEN o.ready_since ELSE o.due_since END END
    FROM open_alike o LEFT JOIN webhook_holds h ON h.config_id = o.config_id
    UNION ALL
    SELECT 'ready', -1, 0, 0, NULL  -- so that `counted_from` is told even of nothing
    UNION ALL
    SELECT CASE a.attempt WHEN 0 THEN 'attempt' ELSE 'retry' END, webhook_rounded_duration(a.duration_ms), o.deliveries,
           coalesce(o.deliveries * a.duration_ms, 0), NULL
    FROM open_alike o
    CROSS JOIN LATERAL (VALUES
      (0, o.retry_0_duration_ms), (1, o.retry_1_duration_ms), (2, o.retry_2_duration_ms),
      (3, o.retry_3_duration_ms), (4, o.retry_4_duration_ms), (5, o.retry_5_duration_ms)) AS a (attempt, duration_ms)
    WHERE o.retry_count > 0 AND o.retry_count > a.attempt
  )
  SELECT since, f.fact, f.duration_ms, sum(f.occurrences)::bigint, sum(f.duration_total_ms)::bigint,
         (extract(epoch FROM now() - min(f.oldest)) * 1000000)::bigint
  FROM facts f GROUP BY 2, 3 ORDER BY 2, 3;
END $$;
COMMENT ON FUNCTION webhook_statistics_and_holds IS 'Deliveries and attempts of a window, or of the whole retention (NULL), counted exactly; open ones by what they wait for, with the age of the oldest.';
COMMENT ON FUNCTION webhook_statistics_of IS 'For processes of an earlier version: webhook_statistics_and_holds without what is held.';
