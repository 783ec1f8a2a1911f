-- Statistics: terminal deliveries are counted once, open ones as they are now.

-- Facts about terminal deliveries and their attempts, counted by period. A recent period is a minute, an older one an hour, the
-- oldest ones are days. A fact is in one period only, so a sum over all periods from some time on is exact.
CREATE TABLE webhook_statistics (
  config_id bigint NOT NULL,
  period_start timestamptz NOT NULL,
  fact text NOT NULL,
  duration_ms int NOT NULL,
  occurrences bigint NOT NULL,
  duration_total_ms bigint NOT NULL,
  PRIMARY KEY (config_id, period_start, fact, duration_ms),
  CONSTRAINT "a fact is a final status, a kind of attempt, or a kind of error"
    CHECK (fact IN ('completed', 'failed', 'cancelled', 'attempt', 'retry') OR starts_with(fact, 'error_'))
);
COMMENT ON TABLE webhook_statistics IS 'Counts of terminal deliveries and their attempts. webhook_statistics_progress shows which deliveries are counted.';
COMMENT ON COLUMN webhook_statistics.config_id IS 'The endpoint; 0 for all endpoints together.';
COMMENT ON COLUMN webhook_statistics.period_start IS 'The start of the period in which the deliveries became terminal.';
COMMENT ON COLUMN webhook_statistics.fact IS 'completed, failed or cancelled counts deliveries; attempt counts first attempts, retry counts later ones; error_ with a kind counts attempts with an error of this kind.';
COMMENT ON COLUMN webhook_statistics.duration_ms IS 'Duration of the attempts in milliseconds, to three significant digits; -1 if there is none.';
COMMENT ON COLUMN webhook_statistics.occurrences IS 'The number of deliveries or attempts.';
COMMENT ON COLUMN webhook_statistics.duration_total_ms IS 'Sum of the exact durations of the attempts.';

CREATE TABLE webhook_statistics_progress (
  only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
  counted_before bigint NOT NULL,
  counted_at timestamptz NOT NULL
);
COMMENT ON TABLE webhook_statistics_progress IS 'Which deliveries webhook_statistics has counted.';
COMMENT ON COLUMN webhook_statistics_progress.only_row IS 'There is one row.';
COMMENT ON COLUMN webhook_statistics_progress.counted_before IS 'Deliveries settled in an earlier transaction than this one are counted.';
COMMENT ON COLUMN webhook_statistics_progress.counted_at IS 'When the latest counted delivery ended, but not later than the time of the count.';
INSERT INTO webhook_statistics_progress (counted_before, counted_at) VALUES (0, '-infinity');

-- Rounds to three significant digits: exact below one second, and at most 2,800 different values up to 5 minutes.
CREATE FUNCTION webhook_rounded_duration(p_ms int) RETURNS int LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN p_ms IS NULL THEN -1 WHEN p_ms < 1000 THEN p_ms WHEN p_ms < 10000 THEN p_ms / 10 * 10
            WHEN p_ms < 100000 THEN p_ms / 100 * 100 ELSE p_ms / 1000 * 1000 END;
COMMENT ON FUNCTION webhook_rounded_duration IS 'A duration in milliseconds to three significant digits; -1 for an unknown one.';

-- The facts of the deliveries that were settled in transactions from p_from up to, but not including, p_before. Equal facts of
-- the same minute are one row, and `occurrences` is their number. Most deliveries have one attempt, whose duration is found
-- without a search.
-- completed_at is the start of the settle's transaction, and settles are short. So a delivery that was settled in a later
-- transaction than one that ended at p_since ended at most a little before p_since; a margin of a day covers that. The time from
-- which on archives are read is a literal in the statement, so that older archives are neither planned nor locked.
CREATE FUNCTION webhook_facts(p_from bigint, p_before bigint, p_since timestamptz)
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
             -- a cancelled delivery was still waiting for the attempt with the number retry_count
             q.retry_count - CASE q.status WHEN 'cancelled' THEN 1 ELSE 0 END AS last_attempt,
             q.retry_0_duration_ms, q.retry_1_duration_ms, q.retry_2_duration_ms, q.retry_3_duration_ms,
             q.retry_4_duration_ms, q.retry_5_duration_ms, q.retry_6_duration_ms,
             q.retry_0_error_kind, q.retry_1_error_kind, q.retry_2_error_kind, q.retry_3_error_kind,
             q.retry_4_error_kind, q.retry_5_error_kind, q.retry_6_error_kind,
             count(*) AS deliveries, max(q.completed_at) AS latest
      FROM webhook_queue q
      WHERE q.settled_in >= $1 AND q.settled_in < $2 AND q.completed_at >= %L
      GROUP BY 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19
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
      UNION ALL
      SELECT 'error_' || a.error_kind, NULL
      FROM (VALUES
        (alike.retry_0_error_kind), (alike.retry_1_error_kind), (alike.retry_2_error_kind), (alike.retry_3_error_kind),
        (alike.retry_4_error_kind), (alike.retry_5_error_kind), (alike.retry_6_error_kind)) AS a (error_kind)
      WHERE a.error_kind IS NOT NULL
    ) AS f (fact, duration_ms)
    $facts$, least(p_since, now()) - interval '1 day')
  USING p_from, p_before;
END $$;
COMMENT ON FUNCTION webhook_facts IS 'What the statistics count of the deliveries that were settled in a range of transactions.';

-- Counts the deliveries that were settled since the last call, in at most p_transactions transactions, so that a long gap is
-- closed in short steps. Transactions below the oldest one still under way cannot add rows any more, so each delivery is counted
-- once, whatever the order of commits. Returns how many deliveries were counted and whether none are left. Returns no row if
-- another process is counting, or has counted deliveries that ended within p_recent.
-- `counted_at` is never ahead of now(). Otherwise, after the clock had been ahead, later deliveries would be left out. It is
-- corrected even if nothing is new, so that whatever ends from then on is within the margin of webhook_facts.
CREATE FUNCTION webhook_count_statistics(p_transactions bigint, p_recent interval DEFAULT '0')
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
    -- the database was restored from a dump into a cluster with lower transaction ids: count everything again
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
    -- the order of the primary key, which makes inserts faster
    ORDER BY 1, 2, 3, 4
    ON CONFLICT (config_id, period_start, fact, duration_ms) DO UPDATE
    SET occurrences = s.occurrences + excluded.occurrences, duration_total_ms = s.duration_total_ms + excluded.duration_total_ms
  )
  SELECT coalesce(sum(occurrences), 0), coalesce(max(latest), progress.counted_at) INTO newly_counted, progress.counted_at
  FROM summed WHERE config_id = 0 AND fact IN ('completed', 'failed', 'cancelled');
  -- nothing is written while the queue is idle
  IF newly_counted > 0 OR upto < horizon OR was_ahead THEN
    UPDATE webhook_statistics_progress
    SET counted_before = upto, counted_at = least(progress.counted_at, now());
  END IF;
  RETURN QUERY SELECT newly_counted, upto = horizon;
END $$;
COMMENT ON FUNCTION webhook_count_statistics IS 'Brings webhook_statistics up to date.';

-- Merges minutes older than 3 hours into hours, and hours older than 3 days into days. Returns how many rows it merged.
CREATE FUNCTION webhook_coarsen_statistics() RETURNS bigint
LANGUAGE plpgsql
SET timezone = 'UTC'
AS $$
DECLARE
  merged bigint := 0;
  step bigint;
  unit text;
  before timestamptz;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('webhook_statistics', 0));
  FOR unit, before IN VALUES ('hour', date_trunc('hour', now() - interval '3 hours')), ('day', date_trunc('day', now() - interval '3 days')) LOOP
    WITH fine AS (
      DELETE FROM webhook_statistics s
      WHERE s.period_start < before AND s.period_start <> date_trunc(unit, s.period_start)
      RETURNING *
    ), added AS (
      INSERT INTO webhook_statistics AS s
      SELECT config_id, date_trunc(unit, period_start), fact, duration_ms, sum(occurrences), sum(duration_total_ms)
      FROM fine GROUP BY 1, 2, 3, 4
      ON CONFLICT (config_id, period_start, fact, duration_ms) DO UPDATE
      SET occurrences = s.occurrences + excluded.occurrences, duration_total_ms = s.duration_total_ms + excluded.duration_total_ms
    )
    SELECT count(*) INTO step FROM fine;
    merged := merged + step;
  END LOOP;
  RETURN merged;
END $$;
COMMENT ON FUNCTION webhook_coarsen_statistics IS 'Merges old minutes into hours and old hours into days.';

-- Deletes the statistics of archives that no longer exist. Returns the number of rows. This is not part of the drop of an
-- archive, because that blocks all settles.
CREATE FUNCTION webhook_forget_statistics() RETURNS bigint
LANGUAGE plpgsql
SET timezone = 'UTC'
AS $$
DECLARE
  forgotten bigint;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('webhook_statistics', 0));
  DELETE FROM webhook_statistics
  WHERE period_start < (SELECT min(a.archive_day)::timestamptz FROM webhook_archives a);
  GET DIAGNOSTICS forgotten = ROW_COUNT;
  RETURN forgotten;
END $$;
COMMENT ON FUNCTION webhook_forget_statistics IS 'Retention: deletes the statistics of dropped archives.';

-- Open deliveries by state, each state with the age of its oldest delivery. The states are ready, scheduled, processing, and the
-- reasons why deliveries are held. Age counts from when the delivery could be claimed. For a held delivery it counts from when it
-- was due, which a failed probe does not change.
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
COMMENT ON FUNCTION webhook_open_deliveries IS 'The number and age of open deliveries: ready, scheduled, processing, and held deliveries by their reason.';

-- All facts about the terminal deliveries of a window and about the open ones as they are now, each counted once, in one
-- snapshot. They come from the statistics, from the part of the archives that is not counted yet, and from one read of the open
-- partition. A window begins on a whole minute; on a whole hour if it is longer than 3 hours, on a whole day (UTC) if it is
-- longer than 3 days.
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
           q.retry_0_error_kind, q.retry_1_error_kind, q.retry_2_error_kind, q.retry_3_error_kind, q.retry_4_error_kind,
           q.retry_5_error_kind,
           count(*) AS deliveries, min(q.ready_since) AS ready_since, min(q.next_retry_at) AS due_since
    FROM webhook_queue_open q
    WHERE p_config_id IS NULL OR q.config_id = p_config_id
    GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
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
    SELECT 'ready', -1, 0, 0, NULL  -- so that `counted_from` is returned even if nothing is counted
    UNION ALL
    SELECT CASE a.attempt WHEN 0 THEN 'attempt' ELSE 'retry' END, webhook_rounded_duration(a.duration_ms), o.deliveries,
           coalesce(o.deliveries * a.duration_ms, 0), NULL
    FROM open_alike o
    CROSS JOIN LATERAL (VALUES
      (0, o.retry_0_duration_ms), (1, o.retry_1_duration_ms), (2, o.retry_2_duration_ms),
      (3, o.retry_3_duration_ms), (4, o.retry_4_duration_ms), (5, o.retry_5_duration_ms)) AS a (attempt, duration_ms)
    WHERE o.retry_count > 0 AND o.retry_count > a.attempt
    UNION ALL
    SELECT 'error_' || a.error_kind, -1, o.deliveries, 0, NULL
    FROM open_alike o
    CROSS JOIN LATERAL (VALUES
      (o.retry_0_error_kind), (o.retry_1_error_kind), (o.retry_2_error_kind), (o.retry_3_error_kind),
      (o.retry_4_error_kind), (o.retry_5_error_kind)) AS a (error_kind)
    WHERE o.retry_count > 0 AND a.error_kind IS NOT NULL
  )
  SELECT since, f.fact, f.duration_ms, sum(f.occurrences)::bigint, sum(f.duration_total_ms)::bigint,
         (extract(epoch FROM now() - min(f.oldest)) * 1000000)::bigint
  FROM facts f GROUP BY 2, 3 ORDER BY 2, 3;
END $$;
COMMENT ON FUNCTION webhook_statistics_and_holds IS 'Exact counts of the deliveries and attempts of a window, or of the whole retention (NULL), and of the open deliveries by what they wait for, with the age of the oldest.';

-- How long the oldest claimable delivery has waited, in microseconds, found by a walk over the endpoints. Endpoints with limits
-- are left out, because their deliveries may rightly wait long.
CREATE FUNCTION webhook_oldest_ready_us(p_config_id bigint) RETURNS bigint
LANGUAGE sql STABLE
SET enable_sort = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
  SELECT (extract(epoch FROM now() - min(d.ready_since)) * 1000000)::bigint
  FROM generate_series(0, 3) AS p (priority)
  CROSS JOIN LATERAL (
    WITH RECURSIVE ring AS (
      (SELECT q.config_id FROM webhook_queue_open q
       WHERE q.ready_since IS NOT NULL AND q.priority = p.priority
       ORDER BY q.config_id LIMIT 1)
      UNION ALL
      SELECT (SELECT q.config_id FROM webhook_queue_open q
              WHERE q.ready_since IS NOT NULL AND q.priority = p.priority AND q.config_id > ring.config_id
              ORDER BY q.config_id LIMIT 1)
      FROM ring WHERE ring.config_id IS NOT NULL
    )
    SELECT ring.config_id
    FROM ring JOIN webhook_configs c ON c.id = ring.config_id AND c.enabled AND c.circuit_state = 'closed'
      AND (p_config_id IS NOT NULL OR num_nonnulls(c.max_in_flight, c.rate_limit_per_second) = 0)
    WHERE p_config_id IS NULL OR ring.config_id = p_config_id) AS e
  CROSS JOIN LATERAL (
    SELECT q.ready_since FROM webhook_queue_open q
    WHERE q.ready_since IS NOT NULL AND q.priority = p.priority AND q.config_id = e.config_id AND q.status = 'pending'
    ORDER BY q.ready_since LIMIT 1) AS d
$$;
COMMENT ON FUNCTION webhook_oldest_ready_us IS 'How long the oldest delivery that could be claimed has waited.';
