-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- All facts about the terminal deliveries of a window and about the open ones as they are now, each counted once, in one
-- snapshot. They come from the statistics, from the part of the archives that is not counted yet, and from one read of the open
-- partition. A window begins on a whole minute; on a whole hour if it is longer than 3 hours, on a whole day (UTC) if it is
-- longer than 3 days.
CREATE OR REPLACE FUNCTION webhook_statistics_and_holds(p_config_id bigint, p_window interval)
 RETURNS TABLE(counted_from timestamp with time zone, fact text, duration_ms integer, occurrences bigint, duration_total_ms bigint, oldest_us bigint)
 LANGUAGE plpgsql
 STABLE
 SET jit TO 'off'
AS $function$
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
END $function$;

COMMENT ON FUNCTION webhook_statistics_and_holds IS 'Exact counts of the deliveries and attempts of a window, or of the whole retention (NULL), and of the open deliveries by what they wait for, with the age of the oldest.';
