-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Notes for webhook_room what a claim has chosen at endpoints with limits, in one row per endpoint for all priorities. Endpoints
-- that are only probed are not noted. Returns for each delivery in how many microseconds its attempt may begin; NULL if the rate
-- is not limited.
CREATE OR REPLACE FUNCTION webhook_note_claimed(p_config_ids bigint[], p_priorities smallint[], p_ready_sinces timestamp with time zone[], p_rate_limits integer[])
 RETURNS bigint[]
 LANGUAGE plpgsql
 SET enable_seqscan TO 'off'
 SET enable_hashjoin TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
AS $function$
DECLARE
  starts_in_us bigint[];
BEGIN
  WITH chosen AS (
    SELECT c.*, row_number() OVER (PARTITION BY c.config_id ORDER BY c.n) - 1 AS before
    FROM unnest(p_config_ids, p_priorities, p_ready_sinces, p_rate_limits)
      WITH ORDINALITY AS c (config_id, priority, ready_since, rate_limit, n)
  ), noted AS (
    UPDATE webhook_limit_states s
    SET next_start_at = coalesce(greatest(webhook_next_start(s.next_start_at, c.rate_limit), now()) + c.chosen * c.apart, s.next_start_at),
        claimed_upto = ARRAY(
          SELECT greatest(upto.noted, upto.chosen)
          FROM unnest(s.claimed_upto, c.latest) WITH ORDINALITY AS upto (noted, chosen, n) ORDER BY upto.n)
    FROM (SELECT chosen.config_id, count(*) AS chosen, max(chosen.rate_limit) AS rate_limit,
                 ARRAY[max(chosen.ready_since) FILTER (WHERE chosen.priority = 0), max(chosen.ready_since) FILTER (WHERE chosen.priority = 1),
                       max(chosen.ready_since) FILTER (WHERE chosen.priority = 2), max(chosen.ready_since) FILTER (WHERE chosen.priority = 3)
                      ] AS latest,
                 interval '1 second' / max(chosen.rate_limit) AS apart
          FROM chosen GROUP BY chosen.config_id) AS c
    -- leaves out endpoints that no longer have a limit, because claims would wait for each other there
    WHERE s.config_id = c.config_id AND EXISTS (
      SELECT FROM webhook_configs w WHERE w.id = s.config_id AND (c.rate_limit IS NOT NULL OR w.max_in_flight IS NOT NULL))
    RETURNING s.config_id, s.next_start_at - c.chosen * c.apart AS first_start_at, c.apart
  )
  SELECT array_agg((extract(epoch FROM noted.first_start_at - now() + chosen.before * noted.apart) * 1000000)::bigint ORDER BY chosen.n)
  INTO starts_in_us
  FROM chosen LEFT JOIN noted ON noted.config_id = chosen.config_id;
  RETURN starts_in_us;
END $function$;

COMMENT ON FUNCTION webhook_note_claimed IS 'Notes what a claim has chosen at endpoints with limits, and paces it.';
