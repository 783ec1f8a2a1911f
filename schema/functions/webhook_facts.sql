-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- The facts of the deliveries that were settled in transactions from p_from up to, but not including, p_before. Equal facts of
-- the same minute are one row, and `occurrences` is their number. Most deliveries have one attempt, whose duration is found
-- without a search.
-- completed_at is the start of the settle's transaction, and settles are short. So a delivery that was settled in a later
-- transaction than one that ended at p_since ended at most a little before p_since; a margin of a day covers that. The time from
-- which on archives are read is a literal in the statement, so that older archives are neither planned nor locked.
CREATE OR REPLACE FUNCTION webhook_facts(p_from bigint, p_before bigint, p_since timestamp with time zone)
 RETURNS TABLE(config_id bigint, period_start timestamp with time zone, fact text, duration_ms integer, occurrences bigint, latest timestamp with time zone)
 LANGUAGE plpgsql
 STABLE
 SET enable_seqscan TO 'off'
 SET enable_sort TO 'off'
 SET jit TO 'off'
AS $function$
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
END $function$;

COMMENT ON FUNCTION webhook_facts IS 'What the statistics count of the deliveries that were settled in a range of transactions.';
