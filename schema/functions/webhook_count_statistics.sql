-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Counts the deliveries that were settled since the last call, in at most p_transactions transactions, so that a long gap is
-- closed in short steps. Transactions below the oldest one still under way cannot add rows any more, so each delivery is counted
-- once, whatever the order of commits. Returns how many deliveries were counted and whether none are left. Returns no row if
-- another process is counting, or has counted deliveries that ended within p_recent.
-- `counted_at` is never ahead of now(). Otherwise, after the clock had been ahead, later deliveries would be left out. It is
-- corrected even if nothing is new, so that whatever ends from then on is within the margin of webhook_facts.
CREATE OR REPLACE FUNCTION webhook_count_statistics(p_transactions bigint, p_recent interval DEFAULT '00:00:00'::interval)
 RETURNS TABLE(counted bigint, caught_up boolean)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET "TimeZone" TO 'UTC'
 SET search_path TO 'public', 'pg_temp'
AS $function$
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
END $function$;

COMMENT ON FUNCTION webhook_count_statistics IS 'Brings webhook_statistics up to date.';
