-- Of many processes one counts every second or two, where each counted every other second what little was new since the
-- last one; and many endpoints are counted faster.

-- As before; most deliveries have made one attempt, whose duration needs no search.
CREATE OR REPLACE FUNCTION webhook_facts(p_from bigint, p_before bigint, p_since timestamptz)
RETURNS TABLE (config_id bigint, period_start timestamptz, fact text, duration_ms int, occurrences bigint, latest timestamptz)
LANGUAGE sql STABLE
SET enable_seqscan = off
SET enable_sort = off
SET jit = off
AS $$
  SELECT alike.config_id, alike.period_start, f.fact, f.duration_ms, alike.deliveries, alike.latest
  FROM (
    SELECT q.config_id, date_trunc('minute', q.completed_at, 'UTC') AS period_start, q.status, q.retry_count,
           -- a cancelled delivery was waiting for the attempt that its retry count names
           q.retry_count - CASE q.status WHEN 'cancelled' THEN 1 ELSE 0 END AS last_attempt,
           q.retry_0_duration_ms, q.retry_1_duration_ms, q.retry_2_duration_ms, q.retry_3_duration_ms,
           q.retry_4_duration_ms, q.retry_5_duration_ms, q.retry_6_duration_ms,
           count(*) AS deliveries, max(q.completed_at) AS latest
    FROM webhook_queue q
    WHERE q.settled_in >= p_from AND q.settled_in < p_before AND q.completed_at >= p_since - interval '1 day'
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
$$;

DROP FUNCTION webhook_count_statistics;

-- Counts what has been settled since the last time, of at most p_transactions transactions, so that a long gap is closed
-- in short steps. Transactions below the oldest one still under way can gain no more rows, so each delivery is counted
-- once, whatever the order of commits. Answers how many deliveries it counted and whether none are left to count; no
-- row where another process is at it, or has counted deliveries that ended within p_recent.
CREATE FUNCTION webhook_count_statistics(p_transactions bigint, p_recent interval DEFAULT '0')
RETURNS TABLE (counted bigint, caught_up boolean)
LANGUAGE plpgsql
SET timezone = 'UTC'
AS $$
#variable_conflict use_column
DECLARE
  progress webhook_statistics_progress;
  horizon bigint;
  upto bigint;
  newly_counted bigint;
BEGIN
  IF NOT pg_try_advisory_xact_lock(hashtextextended('webhook_statistics', 0)) THEN RETURN; END IF;
  SELECT * INTO progress FROM webhook_statistics_progress;
  IF progress.counted_at BETWEEN now() - p_recent AND now() THEN RETURN; END IF;
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
  IF newly_counted > 0 OR upto < horizon THEN
    UPDATE webhook_statistics_progress
    SET counted_before = upto, counted_at = progress.counted_at;
  END IF;
  RETURN QUERY SELECT newly_counted, upto = horizon;
END $$;
COMMENT ON FUNCTION webhook_count_statistics IS 'Brings webhook_statistics up to date.';
