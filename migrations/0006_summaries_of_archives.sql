-- Archives are summarized by the count of statistics, which needs it. Left to autovacuum it came a minute late: until then
-- each count read all that was new once more; and a busy queue filled the server's log with requests that found no room.

CREATE OR REPLACE FUNCTION webhook_ensure_archives(p_days int) RETURNS int
LANGUAGE plpgsql
SET lock_timeout = '250ms'
SET timezone = 'UTC'
AS $$
DECLARE
  archive_day date;
  archive text;
  created int := 0;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('webhook_queue archives', 0));
  FOR archive_day IN SELECT generate_series(current_date, current_date + p_days, interval '1 day') LOOP
    archive := 'webhook_queue_archive_' || to_char(archive_day, 'YYYYMMDD');
    CONTINUE WHEN to_regclass(archive) IS NOT NULL;
    EXECUTE format('CREATE TABLE %I PARTITION OF webhook_queue (PRIMARY KEY (queue_id)) FOR VALUES FROM (%L) TO (%L)',
                   archive, archive_day::timestamptz, (archive_day + 1)::timestamptz);
    EXECUTE format('CREATE INDEX %I ON %I USING brin (settled_in) WITH (pages_per_range = 64)', archive || '_settled_in', archive);
    EXECUTE format('CREATE INDEX %I ON %I (queue_id) WHERE status = ''failed''', archive || '_failed', archive);
    EXECUTE format('COMMENT ON TABLE %I IS %L', archive, 'Deliveries that became terminal on ' || archive_day || ' (UTC).');
    created := created + 1;
  END LOOP;
  RETURN created;
END $$;

DO $$
DECLARE
  known record;
BEGIN
  FOR known IN SELECT a.archive FROM webhook_archives a LOOP
    EXECUTE format('ALTER INDEX %I SET (autosummarize = off)', known.archive || '_settled_in');
  END LOOP;
END $$;

-- Summarizes what has been settled lately, so that counts need not read it again. An archive that is being vacuumed is left
-- for the next time: to wait for its lock would cancel the vacuum, which summarizes it too. Answers how many ranges.
CREATE FUNCTION webhook_summarize_archives() RETURNS bigint
LANGUAGE plpgsql
SET timezone = 'UTC'
AS $$
DECLARE
  written record;
  summarized bigint := 0;
BEGIN
  FOR written IN SELECT a.archive FROM webhook_archives a WHERE a.archive_day BETWEEN current_date - 1 AND current_date LOOP
    BEGIN
      EXECUTE format('LOCK TABLE %I IN SHARE UPDATE EXCLUSIVE MODE NOWAIT', written.archive);
      summarized := summarized + brin_summarize_new_values((written.archive || '_settled_in')::regclass);
    EXCEPTION WHEN lock_not_available THEN NULL;
    END;
  END LOOP;
  RETURN summarized;
END $$;
COMMENT ON FUNCTION webhook_summarize_archives IS 'Lets counts of statistics pass over what was counted.';

-- Facts are told once for deliveries that are alike, which most are: a count takes a third of the time.
DROP FUNCTION webhook_facts;

-- The facts of the deliveries that were settled in transactions from p_from up to, but not including, p_before; of those
-- that are alike and ended in the same minute, once: `occurrences` says how many there are.
-- completed_at is the start of a settle's transaction, and settles are short: what is settled in a later transaction than
-- a delivery that ended at p_since ended at most a little before it. A day's margin leaves no archive out.
CREATE FUNCTION webhook_facts(p_from bigint, p_before bigint, p_since timestamptz)
RETURNS TABLE (config_id bigint, period_start timestamptz, fact text, duration_ms int, occurrences bigint, latest timestamptz)
LANGUAGE sql STABLE
SET enable_seqscan = off
SET enable_sort = off
SET jit = off
AS $$
  SELECT alike.config_id, alike.period_start, f.fact, f.duration_ms, alike.deliveries, alike.latest
  FROM (
    SELECT q.config_id, date_trunc('minute', q.completed_at, 'UTC') AS period_start, q.status, q.retry_count,
           q.retry_0_duration_ms, q.retry_1_duration_ms, q.retry_2_duration_ms, q.retry_3_duration_ms,
           q.retry_4_duration_ms, q.retry_5_duration_ms, q.retry_6_duration_ms,
           count(*) AS deliveries, max(q.completed_at) AS latest
    FROM webhook_queue q
    WHERE q.settled_in >= p_from AND q.settled_in < p_before AND q.completed_at >= p_since - interval '1 day'
    GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
  ) AS alike
  CROSS JOIN LATERAL (
    SELECT alike.status, NULL::int
    UNION ALL
    SELECT CASE a.attempt WHEN 0 THEN 'attempt' ELSE 'retry' END, a.duration_ms
    FROM (VALUES
      (0, alike.retry_0_duration_ms), (1, alike.retry_1_duration_ms), (2, alike.retry_2_duration_ms), (3, alike.retry_3_duration_ms),
      (4, alike.retry_4_duration_ms), (5, alike.retry_5_duration_ms), (6, alike.retry_6_duration_ms)) AS a (attempt, duration_ms)
    -- a cancelled delivery was waiting for the attempt that its retry count names
    WHERE a.attempt < alike.retry_count OR a.attempt = alike.retry_count AND alike.status <> 'cancelled'
  ) AS f (fact, duration_ms)
$$;
COMMENT ON FUNCTION webhook_facts IS 'What the statistics count, of the deliveries settled in a range of transactions.';

-- As before, with facts that occur more than once.
CREATE OR REPLACE FUNCTION webhook_count_statistics(p_transactions bigint) RETURNS TABLE (counted bigint, caught_up boolean)
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

-- As before, with facts that occur more than once.
CREATE OR REPLACE FUNCTION webhook_statistics_of(p_config_id bigint, p_window interval)
RETURNS TABLE (counted_from timestamptz, fact text, duration_ms int, occurrences bigint, duration_total_ms bigint)
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
  WITH facts AS (
    SELECT s.fact, s.duration_ms, s.occurrences, s.duration_total_ms FROM webhook_statistics s
    WHERE s.config_id = coalesce(p_config_id, 0) AND s.period_start >= coalesce(since, '-infinity')
    UNION ALL
    SELECT f.fact, webhook_rounded_duration(f.duration_ms), f.occurrences, coalesce(f.occurrences * f.duration_ms, 0)
    FROM webhook_statistics_progress p
    CROSS JOIN LATERAL webhook_facts(p.counted_before, 9223372036854775807, p.counted_at) f
    WHERE (p_config_id IS NULL OR f.config_id = p_config_id) AND f.period_start >= coalesce(since, '-infinity')
    UNION ALL
    SELECT q.status, -1, count(*), 0 FROM webhook_queue_open q
    WHERE p_config_id IS NULL OR q.config_id = p_config_id
    GROUP BY q.status
    UNION ALL
    SELECT 'pending', -1, 0, 0  -- so that `counted_from` is told even of nothing
    UNION ALL
    SELECT CASE a.attempt WHEN 0 THEN 'attempt' ELSE 'retry' END, webhook_rounded_duration(a.duration_ms), 1, coalesce(a.duration_ms, 0)
    FROM webhook_queue_open q
    CROSS JOIN LATERAL (VALUES
      (0, q.retry_0_duration_ms), (1, q.retry_1_duration_ms), (2, q.retry_2_duration_ms),
      (3, q.retry_3_duration_ms), (4, q.retry_4_duration_ms), (5, q.retry_5_duration_ms)) AS a (attempt, duration_ms)
    WHERE q.retry_count > 0 AND q.retry_count > a.attempt AND (p_config_id IS NULL OR q.config_id = p_config_id)
  )
  SELECT since, f.fact, f.duration_ms, sum(f.occurrences)::bigint, sum(f.duration_total_ms)::bigint
  FROM facts f GROUP BY 2, 3 ORDER BY 2, 3;
END $$;
