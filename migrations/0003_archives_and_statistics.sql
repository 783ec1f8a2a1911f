-- Archives are made ahead and dropped whole; statistics count every terminal delivery once.

-- Makes sure that there is an archive for today and for each of the next p_days days (UTC). A process that cannot have
-- the lock soon gives up and tries again later: waiting would hold up every claim behind a long-running reader.
CREATE FUNCTION webhook_ensure_archives(p_days int) RETURNS int
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
    EXECUTE format('CREATE INDEX %I ON %I USING brin (settled_in) WITH (pages_per_range = 16, autosummarize = on)',
                   archive || '_settled_in', archive);
    EXECUTE format('CREATE INDEX %I ON %I (queue_id) WHERE status = ''failed''', archive || '_failed', archive);
    EXECUTE format('COMMENT ON TABLE %I IS %L', archive, 'Deliveries that became terminal on ' || archive_day || ' (UTC).');
    created := created + 1;
  END LOOP;
  RETURN created;
END $$;
COMMENT ON FUNCTION webhook_ensure_archives IS 'Creates the archives of today and the days ahead where they are missing.';

CREATE VIEW webhook_archives AS
SELECT child.relname::text AS archive, to_date(right(child.relname, 8), 'YYYYMMDD') AS archive_day
FROM pg_inherits i
JOIN pg_class child ON child.oid = i.inhrelid
WHERE i.inhparent = 'webhook_queue'::regclass AND child.relname ~ '^webhook_queue_archive_\d{8}$';
COMMENT ON VIEW webhook_archives IS 'The archive partitions of webhook_queue and their days (UTC).';

-- Indexes one archive for lists once its day is over, when nothing is written to it any more: settles need not pay for it.
-- Answers whether there was one: a transaction for each, since a long one holds the count of statistics up.
CREATE FUNCTION webhook_index_closed_archive() RETURNS boolean
LANGUAGE plpgsql
SET lock_timeout = '250ms'
SET timezone = 'UTC'
AS $$
DECLARE
  closed text;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('webhook_queue archives', 0));
  SELECT a.archive INTO closed FROM webhook_archives a
  WHERE (a.archive_day + 1)::timestamptz + interval '1 hour' < now() AND to_regclass(a.archive || '_event_id') IS NULL
  ORDER BY a.archive_day LIMIT 1;
  IF closed IS NULL THEN RETURN false; END IF;
  EXECUTE format('CREATE INDEX %I ON %I (config_id, queue_id)', closed || '_config_id', closed);
  EXECUTE format('CREATE INDEX %I ON %I (event_id)', closed || '_event_id', closed);
  RETURN true;
END $$;
COMMENT ON FUNCTION webhook_index_closed_archive IS 'Adds the indexes for lists to an archive whose day is over.';

-- Facts about terminal deliveries and their attempts, counted by period. A period is a minute while it is young, later
-- an hour, later a day, but a fact is in one period only: a sum over all periods from some time on is exact.
CREATE TABLE webhook_statistics (
  config_id bigint NOT NULL,
  period_start timestamptz NOT NULL,
  fact text NOT NULL,
  duration_ms int NOT NULL,
  occurrences bigint NOT NULL,
  duration_total_ms bigint NOT NULL,
  PRIMARY KEY (config_id, period_start, fact, duration_ms),
  CONSTRAINT "a fact is a final status or a kind of attempt" CHECK (fact IN ('completed', 'failed', 'cancelled', 'attempt', 'retry'))
);
COMMENT ON TABLE webhook_statistics IS 'Terminal deliveries and their attempts, counted. What is not counted yet is in the archives from webhook_statistics_progress on.';
COMMENT ON COLUMN webhook_statistics.config_id IS 'The endpoint; 0 for all together.';
COMMENT ON COLUMN webhook_statistics.period_start IS 'When the period began that the delivery became terminal in.';
COMMENT ON COLUMN webhook_statistics.fact IS 'completed, failed or cancelled: a delivery; attempt or retry: a first attempt or a later one.';
COMMENT ON COLUMN webhook_statistics.duration_ms IS 'Duration of those attempts, to three significant digits; -1 where there is none.';
COMMENT ON COLUMN webhook_statistics.occurrences IS 'How many.';
COMMENT ON COLUMN webhook_statistics.duration_total_ms IS 'Sum of their exact durations.';

CREATE TABLE webhook_statistics_progress (
  only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
  counted_before bigint NOT NULL,
  counted_at timestamptz NOT NULL
);
INSERT INTO webhook_statistics_progress (counted_before, counted_at) VALUES (0, '-infinity');
COMMENT ON TABLE webhook_statistics_progress IS 'How far webhook_statistics has come.';
COMMENT ON COLUMN webhook_statistics_progress.only_row IS 'There is one row.';
COMMENT ON COLUMN webhook_statistics_progress.counted_before IS 'Deliveries settled in an earlier transaction than this one are counted.';
COMMENT ON COLUMN webhook_statistics_progress.counted_at IS 'When the latest of them ended.';

-- Three significant digits: exact below a second, and at most 2,800 different values up to 5 minutes.
CREATE FUNCTION webhook_rounded_duration(p_ms int) RETURNS int LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN p_ms IS NULL THEN -1 WHEN p_ms < 1000 THEN p_ms WHEN p_ms < 10000 THEN p_ms / 10 * 10
            WHEN p_ms < 100000 THEN p_ms / 100 * 100 ELSE p_ms / 1000 * 1000 END;
COMMENT ON FUNCTION webhook_rounded_duration IS 'A duration in milliseconds to three significant digits; -1 for an unknown one.';

-- The facts of the deliveries that were settled in transactions from p_from up to, but not including, p_before.
-- completed_at is the start of a settle's transaction, and settles are short: what is settled in a later transaction than
-- a delivery that ended at p_since ended at most a little before it. A day's margin leaves no archive out.
CREATE FUNCTION webhook_facts(p_from bigint, p_before bigint, p_since timestamptz)
RETURNS TABLE (config_id bigint, completed_at timestamptz, fact text, duration_ms int)
LANGUAGE sql STABLE
SET enable_seqscan = off
SET jit = off
AS $$
  SELECT q.config_id, q.completed_at, f.fact, f.duration_ms
  FROM webhook_queue q
  CROSS JOIN LATERAL (
    SELECT q.status, NULL::int
    UNION ALL SELECT 'attempt', q.retry_0_duration_ms WHERE q.retry_0_started_at IS NOT NULL
    UNION ALL
    SELECT 'retry', r.duration_ms
    FROM (VALUES (q.retry_1_started_at, q.retry_1_duration_ms), (q.retry_2_started_at, q.retry_2_duration_ms),
                 (q.retry_3_started_at, q.retry_3_duration_ms), (q.retry_4_started_at, q.retry_4_duration_ms),
                 (q.retry_5_started_at, q.retry_5_duration_ms), (q.retry_6_started_at, q.retry_6_duration_ms)
         ) AS r (started_at, duration_ms)
    WHERE q.retry_1_started_at IS NOT NULL AND r.started_at IS NOT NULL
  ) AS f (fact, duration_ms)
  WHERE q.settled_in >= p_from AND q.settled_in < p_before AND q.completed_at >= p_since - interval '1 day'
$$;
COMMENT ON FUNCTION webhook_facts IS 'What the statistics count, of the deliveries settled in a range of transactions.';

-- Counts what has been settled since the last time, of at most p_transactions transactions, so that a long gap is closed
-- in short steps. Transactions below the oldest one still under way can gain no more rows, so each delivery is counted
-- once, whatever the order of commits. Answers how many deliveries it counted and whether none are left to count; no
-- row where another process is at it.
CREATE FUNCTION webhook_count_statistics(p_transactions bigint) RETURNS TABLE (counted bigint, caught_up boolean)
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
    SELECT coalesce(f.config_id, 0) AS config_id, date_trunc('minute', f.completed_at) AS period_start, f.fact,
           webhook_rounded_duration(f.duration_ms) AS duration_ms,
           count(*) AS occurrences, coalesce(sum(f.duration_ms), 0) AS duration_total_ms, max(f.completed_at) AS latest
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
COMMENT ON FUNCTION webhook_count_statistics IS 'Brings webhook_statistics up to date.';

-- Merges minutes older than 3 hours into hours, and hours older than 3 days into days. Answers how many rows it merged.
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

-- Drops the archives whose whole day lies before now() - p_retention. Answers how many.
CREATE FUNCTION webhook_drop_archives(p_retention interval) RETURNS int
LANGUAGE plpgsql
SET lock_timeout = '250ms'
SET timezone = 'UTC'
AS $$
DECLARE
  old record;
  dropped int := 0;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('webhook_queue archives', 0));
  FOR old IN
    SELECT * FROM webhook_archives a WHERE (a.archive_day + 1)::timestamptz <= now() - p_retention ORDER BY a.archive_day
  LOOP
    EXECUTE format('ALTER TABLE webhook_queue DETACH PARTITION %I', old.archive);
    EXECUTE format('DROP TABLE %I', old.archive);
    dropped := dropped + 1;
  END LOOP;
  RETURN dropped;
END $$;
COMMENT ON FUNCTION webhook_drop_archives IS 'Retention: drops old archives whole.';

-- Forgets the statistics of archives that are no more: apart from their drop, which holds up all settles. Answers how many rows.
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
COMMENT ON FUNCTION webhook_forget_statistics IS 'Retention: forgets the statistics of dropped archives.';

-- Forgets events that were accepted before now() - p_retention, at most p_limit of them. Answers how many.
CREATE FUNCTION webhook_forget_events(p_retention interval, p_limit int) RETURNS bigint
LANGUAGE plpgsql
SET enable_seqscan = off
AS $$
DECLARE
  forgotten bigint;
BEGIN
  DELETE FROM webhook_event_keys
  WHERE ctid = ANY (ARRAY(
    SELECT k.ctid FROM webhook_event_keys k WHERE k.remembered_at < now() - p_retention LIMIT p_limit FOR UPDATE SKIP LOCKED));
  GET DIAGNOSTICS forgotten = ROW_COUNT;
  RETURN forgotten;
END $$;
COMMENT ON FUNCTION webhook_forget_events IS 'Retention: forgets event keys, so that their events would be accepted anew.';

-- All facts of terminal deliveries in a window and of the open ones as they are now, each counted once: what is counted
-- already, the rest of the archives, and the open partition, in one snapshot. A window begins on a whole minute; on a
-- whole hour if it is longer than 3 hours, on a whole day (UTC) if it is longer than 3 days.
CREATE FUNCTION webhook_statistics_of(p_config_id bigint, p_window interval)
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
    SELECT f.fact, webhook_rounded_duration(f.duration_ms), 1, coalesce(f.duration_ms, 0)
    FROM webhook_statistics_progress p
    CROSS JOIN LATERAL webhook_facts(p.counted_before, 9223372036854775807, p.counted_at) f
    WHERE (p_config_id IS NULL OR f.config_id = p_config_id) AND f.completed_at >= coalesce(since, '-infinity')
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
COMMENT ON FUNCTION webhook_statistics_of IS 'Deliveries and attempts of a window, or of the whole retention (NULL), counted exactly.';

-- How much is open.
CREATE FUNCTION webhook_backlog() RETURNS TABLE (ready bigint, scheduled bigint, processing bigint)
LANGUAGE sql STABLE
SET jit = off
AS $$
  SELECT count(*) FILTER (WHERE q.status = 'pending' AND q.ready_since IS NOT NULL),
         count(*) FILTER (WHERE q.ready_since IS NULL),
         count(*) FILTER (WHERE q.status = 'processing')
  FROM webhook_queue_open q
$$;
COMMENT ON FUNCTION webhook_backlog IS 'How much is open: ready, scheduled for later, under a lease.';

-- How long the oldest delivery has waited that a worker could claim now, in microseconds: by a walk over the endpoints.
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
    SELECT ring.config_id FROM ring JOIN webhook_configs c ON c.id = ring.config_id AND c.enabled
    WHERE p_config_id IS NULL OR ring.config_id = p_config_id) AS e
  CROSS JOIN LATERAL (
    SELECT q.ready_since FROM webhook_queue_open q
    WHERE q.ready_since IS NOT NULL AND q.priority = p.priority AND q.config_id = e.config_id AND q.status = 'pending'
    ORDER BY q.ready_since LIMIT 1) AS d
$$;
COMMENT ON FUNCTION webhook_oldest_ready_us IS 'The wait of the oldest delivery that could be claimed.';

-- Endpoints that were deleted but may still have open deliveries: those accepted in the very moment.
ALTER TABLE webhook_configs ADD COLUMN cleared_at timestamptz;
COMMENT ON COLUMN webhook_configs.cleared_at IS 'When a deleted endpoint was found to have no open deliveries left.';
CREATE INDEX webhook_configs_uncleared ON webhook_configs (deleted_at) WHERE deleted_at IS NOT NULL AND cleared_at IS NULL;

-- Cancels open deliveries of deleted endpoints, at most p_limit. Those under a lease are left until it ends.
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
