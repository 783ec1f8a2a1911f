-- What keeps one endpoint from harming the others, and others from harming it: circuits and limits. Both are enforced
-- where the claim chooses, so that what is held back costs nothing and uses up no attempt.

ALTER TABLE webhook_configs
  ADD COLUMN max_in_flight int,
  ADD COLUMN rate_limit_per_second int,
  ADD COLUMN circuit_failure_rate double precision DEFAULT 0.8,
  ADD COLUMN circuit_window_ms int NOT NULL DEFAULT 60000,
  ADD COLUMN circuit_attempts_min int NOT NULL DEFAULT 20,
  ADD COLUMN circuit_cooldown_ms int NOT NULL DEFAULT 5000,
  ADD COLUMN circuit_cooldown_cap_ms int NOT NULL DEFAULT 300000,
  ADD COLUMN circuit_state text NOT NULL DEFAULT 'closed',
  ADD COLUMN circuit_reason text,
  ADD COLUMN circuit_changed_at timestamptz,
  ADD COLUMN circuit_probe_at timestamptz,
  ADD COLUMN circuit_failed_probes int NOT NULL DEFAULT 0,
  ADD CONSTRAINT "at most 1 to 10,000 attempts are in flight" CHECK (max_in_flight BETWEEN 1 AND 10000),
  ADD CONSTRAINT "a rate is limited to 1 to 100,000 a second" CHECK (rate_limit_per_second BETWEEN 1 AND 100000),
  ADD CONSTRAINT "a circuit opens at a share of failures" CHECK (0 < circuit_failure_rate AND circuit_failure_rate <= 1),
  ADD CONSTRAINT "a circuit looks back 1 s to 1 h" CHECK (circuit_window_ms BETWEEN 1000 AND 3600000),
  ADD CONSTRAINT "a circuit needs 1 to 10,000 attempts" CHECK (circuit_attempts_min BETWEEN 1 AND 10000),
  ADD CONSTRAINT "a circuit cools down for 100 ms to 1 day"
    CHECK (100 <= circuit_cooldown_ms AND circuit_cooldown_ms <= circuit_cooldown_cap_ms AND circuit_cooldown_cap_ms <= 86400000),
  ADD CONSTRAINT "a circuit is closed, open or half open" CHECK (circuit_state IN ('closed', 'open', 'half_open')),
  ADD CONSTRAINT "a circuit that is not closed, and no other, has a reason" CHECK ((circuit_state = 'closed') = (circuit_reason IS NULL)),
  ADD CONSTRAINT "a closed circuit is not probed, a half-open one is"
    CHECK (CASE circuit_state WHEN 'closed' THEN circuit_probe_at IS NULL WHEN 'half_open' THEN circuit_probe_at IS NOT NULL ELSE true END);
COMMENT ON COLUMN webhook_configs.max_in_flight IS 'How many attempts may be under way at a time, in all processes together; NULL: no limit.';
COMMENT ON COLUMN webhook_configs.rate_limit_per_second IS 'How many attempts may begin in a second, in all processes together; NULL: no limit.';
COMMENT ON COLUMN webhook_configs.circuit_failure_rate IS 'Share of failed attempts, above 0 to 1, from which on the circuit opens; NULL: only by hand.';
COMMENT ON COLUMN webhook_configs.circuit_window_ms IS 'How far back attempts count for that share, in milliseconds.';
COMMENT ON COLUMN webhook_configs.circuit_attempts_min IS 'How many attempts it takes at least.';
COMMENT ON COLUMN webhook_configs.circuit_cooldown_ms IS 'Time from the opening to the first probe, in milliseconds; doubled after each failed probe.';
COMMENT ON COLUMN webhook_configs.circuit_cooldown_cap_ms IS 'Upper bound of that time, in milliseconds.';
COMMENT ON COLUMN webhook_configs.circuit_state IS 'closed: deliveries are attempted; open: they wait; half_open: one of them is attempted, as a probe.';
COMMENT ON COLUMN webhook_configs.circuit_reason IS 'Why it is not closed.';
COMMENT ON COLUMN webhook_configs.circuit_changed_at IS 'When it last changed its state; NULL: never.';
COMMENT ON COLUMN webhook_configs.circuit_probe_at IS 'When the next probe is due; while one is under way, when it counts as lost; NULL: none, until someone closes the circuit.';
COMMENT ON COLUMN webhook_configs.circuit_failed_probes IS 'How many probes have failed since it opened.';
CREATE INDEX webhook_configs_circuit ON webhook_configs (id) WHERE circuit_state <> 'closed';

CREATE TABLE webhook_probes (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  queue_id uuid NOT NULL,
  attempt smallint NOT NULL,
  started_at timestamptz NOT NULL,
  completed_at timestamptz NOT NULL,
  duration_ms int,
  http_status smallint,
  response_body text,
  error text
);
CREATE INDEX webhook_probes_queue_id ON webhook_probes (queue_id);
CREATE INDEX webhook_probes_age ON webhook_probes (completed_at);
COMMENT ON TABLE webhook_probes IS 'Requests that were made to see whether a receiver is back, and failed: they use up no attempt of their deliveries. One that succeeds is the attempt itself.';
COMMENT ON COLUMN webhook_probes.id IS 'A running number.';
COMMENT ON COLUMN webhook_probes.queue_id IS 'The delivery that was sent.';
COMMENT ON COLUMN webhook_probes.attempt IS 'The number that the attempt would have had.';
COMMENT ON COLUMN webhook_probes.started_at IS 'When it began.';
COMMENT ON COLUMN webhook_probes.completed_at IS 'When it ended.';
COMMENT ON COLUMN webhook_probes.duration_ms IS 'Time from connect to the end of the body, in milliseconds.';
COMMENT ON COLUMN webhook_probes.http_status IS 'Status of the response; NULL if none came.';
COMMENT ON COLUMN webhook_probes.response_body IS 'First RESPONSE_BODY_MAX bytes of the response.';
COMMENT ON COLUMN webhook_probes.error IS 'What went wrong, in words.';

CREATE FUNCTION webhook_failed_probes(p_queue_id uuid) RETURNS json
LANGUAGE sql STABLE
SET jit = off
RETURN (SELECT coalesce(json_agg(p), '[]') FROM webhook_probes p WHERE p.queue_id = p_queue_id);
COMMENT ON FUNCTION webhook_failed_probes IS 'The probes that were made of a delivery and failed.';

CREATE OR REPLACE VIEW webhook_attempts AS
SELECT q.queue_id, q.config_id, q.event_type, q.event_id, q.webhook_url, q.status, q.created_at,
       a.attempt, a.started_at, a.completed_at, a.duration_ms, a.http_status, a.response_body, a.error,
       q.completed_at AS delivery_completed_at, a.probe
FROM webhook_queue q
CROSS JOIN LATERAL (
  SELECT *, false
  FROM (VALUES
    (0, q.retry_0_started_at, q.retry_0_completed_at, q.retry_0_duration_ms, q.retry_0_http_status, q.retry_0_response_body, q.retry_0_error),
    (1, q.retry_1_started_at, q.retry_1_completed_at, q.retry_1_duration_ms, q.retry_1_http_status, q.retry_1_response_body, q.retry_1_error),
    (2, q.retry_2_started_at, q.retry_2_completed_at, q.retry_2_duration_ms, q.retry_2_http_status, q.retry_2_response_body, q.retry_2_error),
    (3, q.retry_3_started_at, q.retry_3_completed_at, q.retry_3_duration_ms, q.retry_3_http_status, q.retry_3_response_body, q.retry_3_error),
    (4, q.retry_4_started_at, q.retry_4_completed_at, q.retry_4_duration_ms, q.retry_4_http_status, q.retry_4_response_body, q.retry_4_error),
    (5, q.retry_5_started_at, q.retry_5_completed_at, q.retry_5_duration_ms, q.retry_5_http_status, q.retry_5_response_body, q.retry_5_error),
    (6, q.retry_6_started_at, q.retry_6_completed_at, q.retry_6_duration_ms, q.retry_6_http_status, q.retry_6_response_body, q.retry_6_error)
  ) AS made
  UNION ALL
  SELECT p.attempt, p.started_at, p.completed_at, p.duration_ms, p.http_status, p.response_body, p.error, true
  FROM webhook_probes p WHERE p.queue_id = q.queue_id
) AS a (attempt, started_at, completed_at, duration_ms, http_status, response_body, error, probe)
WHERE a.started_at IS NOT NULL;
COMMENT ON VIEW webhook_attempts IS 'One row an attempt, failed probes among them (probe): what was requested, when, and what the receiver said. A condition on delivery_completed_at leaves archives out.';

-- What claims remember of endpoints with limits. Not logged: after a crash it is made anew.
CREATE UNLOGGED TABLE webhook_limit_states (
  config_id bigint PRIMARY KEY,
  config_revision timestamptz NOT NULL,
  next_start_at timestamptz NOT NULL,
  claimed_upto timestamptz[] NOT NULL
) WITH (fillfactor = 50);
COMMENT ON TABLE webhook_limit_states IS 'What claims remember of endpoints with limits; made anew where it is missing.';
COMMENT ON COLUMN webhook_limit_states.config_id IS 'The endpoint.';
COMMENT ON COLUMN webhook_limit_states.config_revision IS 'updated_at of the endpoint that the rest was made for.';
COMMENT ON COLUMN webhook_limit_states.next_start_at IS 'When the next attempt may begin: one more begins 1 / rate_limit_per_second later.';
COMMENT ON COLUMN webhook_limit_states.claimed_upto IS 'For each priority the latest ready_since that was claimed: what is in flight is not beyond it.';

-- How many deliveries of one endpoint a claim may take, where its circuit or its limits have a say. Claims take turns at
-- such an endpoint: one that meets another there gets nothing. A claim serves it in its most urgent priority only, so that
-- no room is given twice.
-- Attempts are granted starts ahead, for 100 ms or up to the next one, each 1 / rate after the one before (GCRA): so
-- claims may come late without slowing an endpoint down, and a late claim makes no burst.
CREATE FUNCTION webhook_room(p_config_id bigint, p_priority int, p_probe boolean) RETURNS int
LANGUAGE plpgsql
SET enable_sort = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
  config webhook_configs;
  state webhook_limit_states;
  room numeric := 'infinity';
BEGIN
  IF NOT pg_try_advisory_xact_lock(hashtextextended('webhook_room', p_config_id)) THEN RETURN 0; END IF;
  -- each statement from here on sees what the claim before has committed
  SELECT c.* INTO config FROM webhook_configs c WHERE c.id = p_config_id;
  IF p_probe THEN
    RETURN CASE WHEN config.enabled AND config.circuit_probe_at <= now() THEN 1 ELSE 0 END;
  END IF;
  IF NOT config.enabled OR config.circuit_state <> 'closed' OR EXISTS (
    SELECT FROM generate_series(0, p_priority - 1) AS urgent (priority)
    CROSS JOIN LATERAL (
      SELECT FROM webhook_queue_open q
      WHERE q.ready_since IS NOT NULL AND q.priority = urgent.priority AND q.config_id = p_config_id AND q.status = 'pending'
      LIMIT 1) AS waiting)
  THEN RETURN 0; END IF;

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
  IF config.rate_limit_per_second IS NOT NULL THEN
    room := least(room, 1 + floor(
      greatest(0.1 * config.rate_limit_per_second, 1)
      - config.rate_limit_per_second * extract(epoch FROM greatest(state.next_start_at, now()) - now())));
  END IF;
  RETURN least(greatest(room, 0), 1000000);
END $$;
COMMENT ON FUNCTION webhook_room IS 'How many deliveries a claim may take from an endpoint that has limits, or whose circuit is not closed.';

-- Notes what a claim has chosen at endpoints with limits, where webhook_room looks for it. Answers for each in how many
-- microseconds its attempt may begin; NULL where the rate is not limited. Endpoints that are only probed are not noted.
CREATE FUNCTION webhook_note_claimed(p_config_ids bigint[], p_priorities smallint[], p_ready_sinces timestamptz[], p_rate_limits int[])
RETURNS bigint[]
LANGUAGE plpgsql
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
DECLARE
  starts_in_us bigint[];
BEGIN
  WITH chosen AS (
    SELECT c.*, row_number() OVER (PARTITION BY c.config_id ORDER BY c.n) - 1 AS before
    FROM unnest(p_config_ids, p_priorities, p_ready_sinces, p_rate_limits)
      WITH ORDINALITY AS c (config_id, priority, ready_since, rate_limit, n)
  ), noted AS (
    UPDATE webhook_limit_states s
    SET next_start_at = coalesce(greatest(s.next_start_at, now()) + c.chosen * c.apart, s.next_start_at),
        claimed_upto[c.priority + 1] = greatest(s.claimed_upto[c.priority + 1], c.latest)
    FROM (SELECT chosen.config_id, chosen.priority, count(*) AS chosen, max(chosen.ready_since) AS latest,
                 interval '1 second' / max(chosen.rate_limit) AS apart
          FROM chosen GROUP BY chosen.config_id, chosen.priority) AS c
    WHERE s.config_id = c.config_id
    RETURNING s.config_id, s.next_start_at - c.chosen * c.apart AS first_start_at, c.apart
  )
  SELECT array_agg((extract(epoch FROM noted.first_start_at - now() + chosen.before * noted.apart) * 1000000)::bigint ORDER BY chosen.n)
  INTO starts_in_us
  FROM chosen LEFT JOIN noted ON noted.config_id = chosen.config_id;
  RETURN starts_in_us;
END $$;
COMMENT ON FUNCTION webhook_note_claimed IS 'Notes what a claim has chosen at endpoints with limits, and paces it.';

-- Takes leases for p_worker_ids, one for each entry at most, fairly: for each priority a loose index scan walks the
-- endpoints that have ready deliveries, first those after p_after, then the others, until the batch is full. So an
-- endpoint with a million waiting deliveries costs the others one index probe. Every filter stands before a LIMIT.
-- A delivery whose lease has expired is taken over too; `abandoned_at` then says when the lost attempt began.
-- p_share bounds what is taken from one endpoint; for those in p_config_ids, p_rooms does. So the caller sees to it that
-- a slow endpoint never holds all of its leases.
-- With p_held it takes instead the expired leases of endpoints that are held, which would otherwise stay leased: those
-- that are disabled, or whose circuit is not closed.
-- p_floors are hints: at the endpoint and priority of each of p_floor_keys (config_id * 4 + priority) nothing waits that
-- has been ready for longer. The scan then begins there, and does not step over the index entries of what was claimed
-- before, which stay for as long as a transaction elsewhere might still want to see them.
DROP FUNCTION webhook_claim;
CREATE FUNCTION webhook_claim(p_worker_ids text[], p_lease interval, p_after bigint, p_held boolean,
                              p_share int, p_config_ids bigint[], p_rooms int[],
                              p_floor_keys bigint[] DEFAULT '{}', p_floors timestamptz[] DEFAULT '{}')
RETURNS TABLE (
  queue_id uuid, config_id bigint, config_revision timestamptz, event_id text, webhook_url text,
  traceparent text, retry_count smallint, max_retries smallint, worker_id text,
  locked_at timestamptz, abandoned_at timestamptz, waited_us bigint,
  priority smallint, ready_since timestamptz, probe boolean, in_flight_limited boolean, starts_in_us bigint
)
LANGUAGE plpgsql
SET enable_sort = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
  -- what is chosen, an entry a delivery
  queue_ids uuid[];
  config_ids bigint[];
  config_revisions timestamptz[];
  priorities smallint[];
  ready_sinces timestamptz[];
  abandoned_ats timestamptz[];
  probes boolean[];
  in_flight_limits int[];
  rate_limits int[];
  starts_in_us bigint[];
BEGIN
  -- chosen as a whole before any is taken, since webhook_room looks at what is in flight
  WITH due AS (
    SELECT d.queue_id, e.config_id, e.config_revision, p.priority::smallint AS priority, d.ready_since, d.abandoned_at,
           e.probe, e.max_in_flight, e.rate_limit_per_second
    FROM generate_series(0, 3) AS p (priority)
    CROSS JOIN LATERAL (VALUES (p_after, 9223372036854775806), (0, p_after)) AS half (after, upto)
    CROSS JOIN LATERAL (
      WITH RECURSIVE ring AS (
        SELECT half.after AS config_id
        UNION ALL
        -- an endpoint with a floor is not looked for but taken as it comes
        SELECT coalesce(
          (SELECT q.config_id FROM webhook_queue_open q
           WHERE q.ready_since IS NOT NULL AND q.priority = p.priority
             AND q.config_id > ring.config_id AND q.config_id <= half.upto
             AND q.config_id < coalesce(floored.config_id, 9223372036854775807)
           ORDER BY q.config_id LIMIT 1),
          floored.config_id)
        FROM ring
        CROSS JOIN LATERAL (
          SELECT min(f.key / 4) FROM unnest(p_floor_keys) AS f (key)
          WHERE f.key % 4 = p.priority AND f.key / 4 > ring.config_id AND f.key / 4 <= half.upto) AS floored (config_id)
        WHERE ring.config_id IS NOT NULL
      )
      SELECT ring.config_id, c.*
      FROM ring
      CROSS JOIN LATERAL (
        SELECT c.updated_at AS config_revision,
               c.circuit_state <> 'closed' AND NOT p_held AS probe, c.max_in_flight, c.rate_limit_per_second
        FROM webhook_configs c
        WHERE c.id = ring.config_id
          AND CASE WHEN p_held THEN NOT c.enabled OR c.circuit_state <> 'closed'
                   ELSE c.enabled AND (c.circuit_state = 'closed' OR c.circuit_probe_at <= now()) END) AS c
      WHERE ring.config_id > half.after) AS e
    CROSS JOIN LATERAL (
      SELECT q.queue_id, q.ready_since, q.locked_at AS abandoned_at FROM webhook_queue_open q
      WHERE q.ready_since IS NOT NULL AND q.priority = p.priority AND q.config_id = e.config_id
        AND q.ready_since >= coalesce(p_floors[array_position(p_floor_keys, e.config_id * 4 + p.priority)], '-infinity')
        AND (q.status = 'pending' AND NOT p_held OR q.lock_expires_at < now() AND NOT e.probe)
      ORDER BY q.ready_since
      LIMIT least(coalesce(p_rooms[array_position(p_config_ids, e.config_id)], p_share),
                  CASE WHEN e.probe OR num_nonnulls(e.max_in_flight, e.rate_limit_per_second) > 0 AND NOT p_held
                       THEN webhook_room(e.config_id, p.priority, e.probe) END)
      FOR UPDATE SKIP LOCKED) AS d
    LIMIT cardinality(p_worker_ids)
  )
  SELECT array_agg(due.queue_id), array_agg(due.config_id), array_agg(due.config_revision), array_agg(due.priority),
         array_agg(due.ready_since), array_agg(due.abandoned_at), array_agg(due.probe), array_agg(due.max_in_flight),
         array_agg(due.rate_limit_per_second)
  INTO queue_ids, config_ids, config_revisions, priorities, ready_sinces, abandoned_ats, probes, in_flight_limits, rate_limits
  FROM due;

  IF true = ANY (probes) THEN
    UPDATE webhook_configs c
    SET circuit_state = 'half_open', circuit_probe_at = now() + p_lease, circuit_changed_at = now()
    FROM unnest(config_ids, probes) AS due (config_id, probe) WHERE due.probe AND c.id = due.config_id;
  END IF;
  IF EXISTS (SELECT FROM unnest(in_flight_limits || rate_limits) AS l (highest) WHERE l.highest IS NOT NULL) THEN
    starts_in_us := webhook_note_claimed(config_ids, priorities, ready_sinces, rate_limits);
  END IF;

  RETURN QUERY
  WITH due AS MATERIALIZED (
    SELECT * FROM unnest(queue_ids, p_worker_ids, abandoned_ats, config_revisions, probes, in_flight_limits, starts_in_us)
      AS due (queue_id, worker_id, abandoned_at, config_revision, probe, max_in_flight, starts_in_us)
  )
  UPDATE webhook_queue_open q
  SET status = 'processing', worker_id = due.worker_id, locked_at = now(), lock_expires_at = now() + p_lease, updated_at = now()
  FROM due WHERE q.queue_id = due.queue_id
  RETURNING q.queue_id, q.config_id, due.config_revision, q.event_id, q.webhook_url,
            q.traceparent, q.retry_count, q.max_retries, q.worker_id, q.locked_at, due.abandoned_at,
            (extract(epoch FROM clock_timestamp() - greatest(q.created_at, q.next_retry_at)) * 1000000)::bigint,
            q.priority, q.ready_since, due.probe, due.max_in_flight IS NOT NULL, due.starts_in_us;
END $$;
COMMENT ON FUNCTION webhook_claim IS 'Takes leases on a fair batch of ready deliveries.';

-- Writes probes that failed. Their deliveries wait on as if nothing had been sent, but behind the others: a delivery that
-- its receiver never takes must not keep the circuit open. Parameters and answer are those of webhook_settle_N_retry.
CREATE FUNCTION webhook_settle_probe(
  p_queue_ids uuid[], p_workers text[], p_locked_ats timestamptz[],
  p_ages_us bigint[], p_lengths_us bigint[], p_durations_ms int[], p_http_statuses smallint[],
  p_bodies text[], p_errors text[])
RETURNS SETOF uuid
LANGUAGE plpgsql
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
    SELECT * FROM unnest(p_queue_ids, p_workers, p_locked_ats, p_ages_us, p_lengths_us, p_durations_ms, p_http_statuses, p_bodies, p_errors)
      AS o (queue_id, worker, locked_at, age_us, length_us, duration_ms, http_status, body, error)
  ), released AS (
    UPDATE webhook_queue_open q
    SET status = 'pending', worker_id = NULL, locked_at = NULL, lock_expires_at = NULL, updated_at = now(), ready_since = now()
    FROM outcome o
    WHERE q.queue_id = o.queue_id AND q.worker_id = o.worker AND q.locked_at = o.locked_at
    RETURNING o.*, q.retry_count
  )
  INSERT INTO webhook_probes (queue_id, attempt, started_at, completed_at, duration_ms, http_status, response_body, error)
  SELECT r.queue_id, r.retry_count, now() - r.age_us * interval '1 microsecond',
         now() - (r.age_us - r.length_us) * interval '1 microsecond', r.duration_ms, r.http_status, r.body, r.error
  FROM released r
  RETURNING webhook_probes.queue_id;
END $$;
COMMENT ON FUNCTION webhook_settle_probe IS 'Writes probes that failed, and lets their deliveries wait on.';

-- Forgets probes that ended before now() - p_retention, at most p_limit of them. Answers how many.
CREATE FUNCTION webhook_forget_probes(p_retention interval, p_limit int) RETURNS bigint
LANGUAGE plpgsql
SET enable_seqscan = off
AS $$
DECLARE
  forgotten bigint;
BEGIN
  DELETE FROM webhook_probes
  WHERE id = ANY (ARRAY(SELECT p.id FROM webhook_probes p WHERE p.completed_at < now() - p_retention LIMIT p_limit FOR UPDATE SKIP LOCKED));
  GET DIAGNOSTICS forgotten = ROW_COUNT;
  RETURN forgotten;
END $$;
COMMENT ON FUNCTION webhook_forget_probes IS 'Retention: forgets old probes.';

-- How long the oldest delivery has waited that a worker could claim now, in microseconds: by a walk over the endpoints.
-- Those with limits are left out: at their own pace deliveries may wait for as long as they do.
CREATE OR REPLACE FUNCTION webhook_oldest_ready_us(p_config_id bigint) RETURNS bigint
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
