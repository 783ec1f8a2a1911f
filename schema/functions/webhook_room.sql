-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- How many deliveries a claim may take from an endpoint whose circuit or limits restrict it.
-- Claims take turns at such an endpoint: a claim that meets another one there gets nothing. A claim serves only the endpoint's
-- most urgent priority, so that no room is given twice. A probe also waits for more urgent deliveries and for max_in_flight. An
-- urgent delivery whose lease has expired counts as waiting. After a circuit has closed, traffic grows step by step.
-- Starts are granted ahead, for 100 ms or up to the next start, each 1 / rate after the previous start (GCRA). A late claim
-- therefore neither slows the endpoint down nor causes a burst.
CREATE OR REPLACE FUNCTION webhook_room(p_config_id bigint, p_priority integer, p_probe boolean)
 RETURNS integer
 LANGUAGE plpgsql
 SET enable_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_hashjoin TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
DECLARE
  config webhook_configs;
  state webhook_limit_states;
  rate int;
  room numeric := 'infinity';
BEGIN
  IF NOT pg_try_advisory_xact_lock(hashtextextended('webhook_room', p_config_id)) THEN RETURN 0; END IF;
  -- from here on each statement sees what the previous claim committed
  IF p_probe THEN
    -- the claim will note the probe there: while someone else keeps the row locked, the claim must not wait for it
    SELECT c.* INTO config FROM webhook_configs c WHERE c.id = p_config_id FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN RETURN 0; END IF;
  ELSE
    SELECT c.* INTO config FROM webhook_configs c WHERE c.id = p_config_id;
  END IF;
  IF NOT config.enabled OR (config.circuit_state <> 'closed') <> p_probe OR p_probe AND config.circuit_probe_at > now() OR EXISTS (
    SELECT FROM generate_series(0, p_priority - 1) AS urgent (priority)
    CROSS JOIN LATERAL (
      SELECT FROM webhook_queue_open q
      WHERE q.ready_since IS NOT NULL AND q.priority = urgent.priority AND q.config_id = p_config_id
        AND (q.status = 'pending' OR q.lock_expires_at < now() AND NOT p_probe)
      LIMIT 1) AS waiting)
  THEN RETURN 0; END IF;
  rate := least(config.rate_limit_per_second, webhook_ramp_rate(config.circuit_state, config.circuit_changed_at));

  SELECT s.* INTO state FROM webhook_limit_states s WHERE s.config_id = p_config_id;
  IF state.config_revision IS DISTINCT FROM config.updated_at THEN
    INSERT INTO webhook_limit_states AS s (config_id, config_revision, next_start_at, claimed_upto)
    VALUES (p_config_id, config.updated_at, now(), ARRAY(
      SELECT (SELECT max(q.ready_since) FROM webhook_queue_open q
              WHERE q.ready_since IS NOT NULL AND q.priority = p.priority AND q.config_id = p_config_id AND q.status = 'processing')
      FROM generate_series(0, 3) AS p (priority)))
    ON CONFLICT (config_id) DO UPDATE
    SET config_revision = excluded.config_revision, claimed_upto = excluded.claimed_upto
    RETURNING s.* INTO state;
  END IF;

  IF config.max_in_flight IS NOT NULL THEN
    room := config.max_in_flight - (
      SELECT count(*)
      FROM generate_series(0, 3) AS p (priority)
      CROSS JOIN LATERAL (
        SELECT FROM webhook_queue_open q
        WHERE q.ready_since IS NOT NULL AND q.priority = p.priority AND q.config_id = p_config_id
          AND q.ready_since <= state.claimed_upto[p.priority + 1]
          AND q.status = 'processing' AND q.lock_expires_at >= now()) AS in_flight);
  END IF;
  IF p_probe THEN RETURN least(greatest(room, 0), 1); END IF;
  IF rate IS NOT NULL THEN
    room := least(room, 1 + floor(
      greatest(0.1 * rate, 1)
      - rate * extract(epoch FROM greatest(webhook_next_start(state.next_start_at, rate), now()) - now())));
  END IF;
  RETURN least(greatest(room, 0), 1000000);
END $function$;

COMMENT ON FUNCTION webhook_room IS 'How many deliveries a claim may take from an endpoint that has limits, or whose circuit is not closed.';
