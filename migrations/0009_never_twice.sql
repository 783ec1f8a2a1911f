-- What keeps a delivery from being sent twice where a known outcome comes late, from being held by a lease that nobody uses,
-- and a healthy receiver from being held by its circuit. ARCHITECTURE.md says why.

-- A lease that expired belongs to the worker that takes it over, but what the first worker learned still counts, until
-- somebody sends the delivery again. So the first lease is kept beside the new one.
-- No CHECK joins the two columns: each one costs a claim and a settle some 10 %, since it is read for each statement.
ALTER TABLE webhook_queue ADD COLUMN abandoned_by text, ADD COLUMN abandoned_at timestamptz;
COMMENT ON COLUMN webhook_queue.abandoned_by IS 'The worker whose lease expired before it reported an outcome; until the delivery is sent again, its outcome is still accepted.';
COMMENT ON COLUMN webhook_queue.abandoned_at IS 'When that lease was taken.';

ALTER TABLE webhook_event_keys ADD COLUMN cancelled_at timestamptz;
COMMENT ON COLUMN webhook_event_keys.cancelled_at IS 'When the delivery was cancelled: whoever sends the event again is told that nothing will be delivered.';

ALTER TABLE webhook_configs
  ADD COLUMN circuit_failures_in_row int DEFAULT 5,
  ADD COLUMN circuit_probe_error text,
  ADD CONSTRAINT "a circuit opens after 1 to 10,000 failures in a row" CHECK (circuit_failures_in_row BETWEEN 1 AND 10000);
COMMENT ON COLUMN webhook_configs.circuit_failures_in_row IS 'After how many failures in a row the circuit of an endpoint with little traffic opens; NULL: it does not.';
COMMENT ON COLUMN webhook_configs.circuit_probe_error IS 'How the last probe failed; NULL: none has failed since the circuit opened.';
COMMENT ON COLUMN webhook_configs.circuit_reason IS 'Why it opened.';
COMMENT ON COLUMN webhook_configs.circuit_changed_at IS 'When it last opened or closed; NULL: never. Probes change nothing about it.';

CREATE TABLE webhook_circuit_openings (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  config_id bigint NOT NULL,
  opened_at timestamptz NOT NULL,
  reason text NOT NULL,
  closed_at timestamptz
);
CREATE INDEX webhook_circuit_openings_config ON webhook_circuit_openings (config_id, opened_at);
COMMENT ON TABLE webhook_circuit_openings IS 'When the circuits of endpoints were open, and why.';
COMMENT ON COLUMN webhook_circuit_openings.id IS 'A running number.';
COMMENT ON COLUMN webhook_circuit_openings.config_id IS 'The endpoint.';
COMMENT ON COLUMN webhook_circuit_openings.opened_at IS 'When its circuit opened.';
COMMENT ON COLUMN webhook_circuit_openings.reason IS 'Why.';
COMMENT ON COLUMN webhook_circuit_openings.closed_at IS 'When it closed again; NULL: it has not.';

-- A trigger, so that no way to open or close a circuit forgets it. Probes do not fire it.
CREATE FUNCTION webhook_note_circuit_opening() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
  IF NEW.circuit_state = 'closed' THEN
    UPDATE webhook_circuit_openings SET closed_at = now() WHERE config_id = NEW.id AND closed_at IS NULL;
  ELSE
    INSERT INTO webhook_circuit_openings (config_id, opened_at, reason) VALUES (NEW.id, now(), NEW.circuit_reason);
  END IF;
  RETURN NULL;
END $$;
COMMENT ON FUNCTION webhook_note_circuit_opening IS 'Keeps the history of a circuit.';
CREATE TRIGGER webhook_configs_circuit AFTER UPDATE OF circuit_state ON webhook_configs
  FOR EACH ROW WHEN ((OLD.circuit_state = 'closed') <> (NEW.circuit_state = 'closed'))
  EXECUTE FUNCTION webhook_note_circuit_opening();

-- How many attempts a second may begin at an endpoint whose circuit has just closed: 10 in the first second, twice as many
-- in each one after, for ten seconds. NULL: as many as its limits allow.
CREATE FUNCTION webhook_ramp_rate(p_state text, p_changed_at timestamptz) RETURNS int
LANGUAGE sql STABLE
RETURN CASE WHEN p_state = 'closed' AND p_changed_at > now() - interval '10 seconds' AND p_changed_at < now() + interval '1 second'
            THEN (10 * 2 ^ floor(greatest(extract(epoch FROM now() - p_changed_at), 0)))::int END;
COMMENT ON FUNCTION webhook_ramp_rate IS 'The rate to which an endpoint is limited while it recovers.';

-- Whether a delivery's URL is an endpoint's, with parameters added to its query or without. NULL if the endpoint has none.
CREATE FUNCTION webhook_is_at(p_delivery_url text, p_endpoint_url text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN split_part(p_delivery_url, '#', 1) = split_part(p_endpoint_url, '#', 1)
    OR starts_with(p_delivery_url, split_part(p_endpoint_url, '#', 1)
                                   || CASE WHEN strpos(split_part(p_endpoint_url, '#', 1), '?') = 0 THEN '?'
                                           WHEN right(split_part(p_endpoint_url, '#', 1), 1) IN ('?', '&') THEN '' ELSE '&' END);
COMMENT ON FUNCTION webhook_is_at IS 'Whether a delivery goes to a URL that an endpoint still has.';

-- The delivery to probe an open circuit with: near the front of the line, one for a URL that the endpoint still has, which has
-- used up no attempt, or at least one for such a URL. A delivery that its receiver never takes must not keep the circuit open,
-- nor one that goes elsewhere. NULL: there is none such, and any will do.
CREATE FUNCTION webhook_fresh_probe(p_config_id bigint, p_priority int) RETURNS uuid
LANGUAGE sql STABLE
SET enable_sort = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
RETURN coalesce(
  (SELECT front.queue_id
   FROM (SELECT q.queue_id, q.retry_count, q.webhook_url FROM webhook_queue_open q
         WHERE q.ready_since IS NOT NULL AND q.priority = p_priority AND q.config_id = p_config_id AND q.status = 'pending'
         ORDER BY q.ready_since LIMIT 1000) AS front
   CROSS JOIN webhook_configs c
   WHERE c.id = p_config_id AND front.retry_count = 0
     AND (webhook_is_at(front.webhook_url, c.postback_url) OR webhook_is_at(front.webhook_url, c.chargeback_url))
   LIMIT 1),
  (SELECT front.queue_id
   FROM (SELECT q.queue_id, q.webhook_url FROM webhook_queue_open q
         WHERE q.ready_since IS NOT NULL AND q.priority = p_priority AND q.config_id = p_config_id AND q.status = 'pending'
         ORDER BY q.ready_since LIMIT 1000) AS front
   CROSS JOIN webhook_configs c
   WHERE c.id = p_config_id
     AND (webhook_is_at(front.webhook_url, c.postback_url) OR webhook_is_at(front.webhook_url, c.chargeback_url))
   LIMIT 1));
COMMENT ON FUNCTION webhook_fresh_probe IS 'The delivery that an open circuit is best probed with.';

-- Where the front of a long line ends, NULL if it is not long. What is under a lease is in the front, since claims begin
-- there: so millions of waiting deliveries need not be looked at to find the leases that have expired.
CREATE FUNCTION webhook_front_end(p_config_id bigint, p_priority int) RETURNS timestamptz
LANGUAGE sql STABLE
SET enable_sort = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
RETURN (SELECT q.ready_since FROM webhook_queue_open q
        WHERE q.ready_since IS NOT NULL AND q.priority = p_priority AND q.config_id = p_config_id
        ORDER BY q.ready_since OFFSET 20000 LIMIT 1);
COMMENT ON FUNCTION webhook_front_end IS 'Where the front of an endpoint''s line of ready deliveries ends.';

-- As in 0004, and: a probe waits for more urgent deliveries and for max_in_flight too; an urgent delivery whose lease has
-- expired counts as waiting; a rate is not held up by a clock that was ahead once; a circuit that has just closed lets
-- traffic grow step by step.
CREATE OR REPLACE FUNCTION webhook_room(p_config_id bigint, p_priority int, p_probe boolean) RETURNS int
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
  rate int;
  room numeric := 'infinity';
BEGIN
  IF NOT pg_try_advisory_xact_lock(hashtextextended('webhook_room', p_config_id)) THEN RETURN 0; END IF;
  -- each statement from here on sees what the claim before has committed
  SELECT c.* INTO config FROM webhook_configs c WHERE c.id = p_config_id;
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
END $$;

-- Starts are granted at most 100 ms ahead, or one: a time further ahead was noted while the clock was.
CREATE FUNCTION webhook_next_start(p_noted timestamptz, p_rate int) RETURNS timestamptz
LANGUAGE sql STABLE
RETURN CASE WHEN p_noted > now() + interval '1 second' + interval '2 seconds' / p_rate THEN now() ELSE p_noted END;
COMMENT ON FUNCTION webhook_next_start IS 'When the next attempt may begin at an endpoint whose rate is limited.';

-- As in 0004; of an endpoint all priorities are noted in one row, and no clock that was ahead once is believed.
CREATE OR REPLACE FUNCTION webhook_note_claimed(p_config_ids bigint[], p_priorities smallint[], p_ready_sinces timestamptz[], p_rate_limits int[])
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
    -- not those that had a limit once: claims would wait for each other there
    WHERE s.config_id = c.config_id AND EXISTS (
      SELECT FROM webhook_configs w WHERE w.id = s.config_id AND (c.rate_limit IS NOT NULL OR w.max_in_flight IS NOT NULL))
    RETURNING s.config_id, s.next_start_at - c.chosen * c.apart AS first_start_at, c.apart
  )
  SELECT array_agg((extract(epoch FROM noted.first_start_at - now() + chosen.before * noted.apart) * 1000000)::bigint ORDER BY chosen.n)
  INTO starts_in_us
  FROM chosen LEFT JOIN noted ON noted.config_id = chosen.config_id;
  RETURN starts_in_us;
END $$;

-- As in 0004 and 0005, and:
-- * p_share and p_rooms hold for an endpoint, whatever the priorities of its deliveries.
-- * A lease that is taken over is kept as the abandoned one; `abandoned_at` says since when nobody knows the outcome.
-- * Of an endpoint that is held, only what could be under a lease is looked at: claims begin at the front of the line.
CREATE OR REPLACE FUNCTION webhook_claim(p_worker_ids text[], p_lease interval, p_after bigint, p_held boolean,
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
SET lock_timeout = '10s'
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
  -- the priorities that are chosen from: all together, or one after the other
  most_urgent int := 0;
  least_urgent int := 3;
  -- what is chosen from these, an entry for each delivery; while a row is locked, its place is name enough for it
  tids tid[];
  config_ids bigint[];
  config_revisions timestamptz[];
  priorities smallint[];
  ready_sinces timestamptz[];
  probes boolean[];
  in_flight_limits int[];
  rate_limits int[];
  -- what was chosen from the priorities before
  all_tids tid[] := '{}';
  all_config_ids bigint[] := '{}';
  all_config_revisions timestamptz[] := '{}';
  all_priorities smallint[] := '{}';
  all_ready_sinces timestamptz[] := '{}';
  all_probes boolean[] := '{}';
  all_in_flight_limits int[] := '{}';
  all_rate_limits int[] := '{}';
  -- the rooms that are left after them
  listed bigint[] := p_config_ids;
  rooms int[] := p_rooms;
  starts_in_us bigint[];
BEGIN
  LOOP
    -- chosen as a whole before any is taken, since webhook_room looks at what is in flight
    -- one list of legs, since of two lists in a join the planner may walk either one first: the most urgent go first
    WITH due AS (
      SELECT d.tid, e.config_id, e.config_revision, leg.priority::smallint AS priority, d.ready_since,
             e.probe, e.max_in_flight, e.rate_limit_per_second
      FROM (VALUES (0, p_after, 9223372036854775806), (0, 0, p_after), (1, p_after, 9223372036854775806), (1, 0, p_after),
                   (2, p_after, 9223372036854775806), (2, 0, p_after), (3, p_after, 9223372036854775806), (3, 0, p_after)
           ) AS leg (priority, after, upto)
      CROSS JOIN LATERAL (
        WITH RECURSIVE ring AS (
          SELECT leg.after AS config_id
          UNION ALL
          -- an endpoint with a floor is not looked for but taken as it comes
          SELECT coalesce(
            (SELECT q.config_id FROM webhook_queue_open q
             WHERE q.ready_since IS NOT NULL AND q.priority = leg.priority
               AND q.config_id > ring.config_id AND q.config_id <= leg.upto
               AND q.config_id < coalesce(floored.config_id, 9223372036854775807)
             ORDER BY q.config_id LIMIT 1),
            floored.config_id)
          FROM ring
          CROSS JOIN LATERAL (
            SELECT min(f.key / 4) FROM unnest(p_floor_keys) AS f (key)
            WHERE f.key % 4 = leg.priority AND f.key / 4 > ring.config_id AND f.key / 4 <= leg.upto) AS floored (config_id)
          WHERE ring.config_id IS NOT NULL
        )
        SELECT ring.config_id, c.*
        FROM ring
        CROSS JOIN LATERAL (
          SELECT c.updated_at AS config_revision,
                 c.circuit_state <> 'closed' AND NOT p_held AS probe,
                 CASE WHEN c.circuit_state <> 'closed' AND NOT p_held THEN webhook_fresh_probe(c.id, leg.priority) END AS fresh,
                 CASE WHEN p_held THEN webhook_front_end(c.id, leg.priority) END AS front_end,
                 -- those that are held have no limits: nothing of theirs is attempted
                 CASE WHEN NOT p_held THEN c.max_in_flight END AS max_in_flight,
                 CASE WHEN NOT p_held
                      THEN least(c.rate_limit_per_second, webhook_ramp_rate(c.circuit_state, c.circuit_changed_at)) END AS rate_limit_per_second
          FROM webhook_configs c
          WHERE c.id = ring.config_id
            AND CASE WHEN p_held THEN NOT c.enabled OR c.circuit_state <> 'closed'
                     ELSE c.enabled AND (c.circuit_state = 'closed' OR c.circuit_probe_at <= now()) END
          OFFSET 0) AS c
        WHERE ring.config_id > leg.after) AS e
      CROSS JOIN LATERAL (
        SELECT q.ctid AS tid, q.ready_since FROM webhook_queue_open q
        WHERE q.ready_since IS NOT NULL AND q.priority = leg.priority AND q.config_id = e.config_id
          AND q.ready_since >= coalesce(p_floors[array_position(p_floor_keys, e.config_id * 4 + leg.priority)], '-infinity')
          AND q.ready_since <= coalesce(e.front_end, 'infinity')
          AND (e.fresh IS NULL OR q.queue_id = e.fresh)
          AND (q.status = 'pending' AND NOT p_held OR q.lock_expires_at < now() AND NOT e.probe)
        ORDER BY q.ready_since
        LIMIT least(coalesce(rooms[array_position(listed, e.config_id)], p_share),
                    CASE WHEN e.probe OR num_nonnulls(e.max_in_flight, e.rate_limit_per_second) > 0
                         THEN webhook_room(e.config_id, leg.priority, e.probe) END)
        FOR UPDATE SKIP LOCKED) AS d
      WHERE leg.priority BETWEEN most_urgent AND least_urgent
      LIMIT cardinality(p_worker_ids) - cardinality(all_tids)
    )
    SELECT array_agg(due.tid), array_agg(due.config_id), array_agg(due.config_revision), array_agg(due.priority),
           array_agg(due.ready_since), array_agg(due.probe), array_agg(due.max_in_flight), array_agg(due.rate_limit_per_second)
    INTO tids, config_ids, config_revisions, priorities, ready_sinces, probes, in_flight_limits, rate_limits
    FROM due;

    -- an endpoint with deliveries of several priorities may have given its whole room in each: then they are chosen anew,
    -- one priority after the other, each within what those before have left
    IF most_urgent < least_urgent AND priorities[1] < priorities[cardinality(priorities)] THEN
      IF EXISTS (
        SELECT FROM unnest(config_ids) AS chosen (config_id)
        GROUP BY chosen.config_id
        HAVING count(*) > coalesce(rooms[array_position(listed, chosen.config_id)], p_share))
      THEN
        least_urgent := most_urgent;
        CONTINUE;
      END IF;
    END IF;
    IF tids IS NOT NULL THEN
      all_tids := all_tids || tids;
      all_config_ids := all_config_ids || config_ids;
      all_config_revisions := all_config_revisions || config_revisions;
      all_priorities := all_priorities || priorities;
      all_ready_sinces := all_ready_sinces || ready_sinces;
      all_probes := all_probes || probes;
      all_in_flight_limits := all_in_flight_limits || in_flight_limits;
      all_rate_limits := all_rate_limits || rate_limits;
    END IF;
    EXIT WHEN least_urgent = 3 OR cardinality(all_tids) >= cardinality(p_worker_ids);
    SELECT array_agg(l.config_id) || p_config_ids, array_agg(l.room) || p_rooms
    INTO listed, rooms
    FROM (SELECT chosen.config_id,
                 (coalesce(p_rooms[array_position(p_config_ids, chosen.config_id)], p_share) - count(*))::int AS room
          FROM unnest(all_config_ids) AS chosen (config_id) GROUP BY chosen.config_id) AS l;
    most_urgent := most_urgent + 1;
    least_urgent := most_urgent;
  END LOOP;

  IF true = ANY (all_probes) THEN
    UPDATE webhook_configs c
    SET circuit_state = 'half_open', circuit_probe_at = now() + p_lease
    FROM unnest(all_config_ids, all_probes) AS due (config_id, probe) WHERE due.probe AND c.id = due.config_id;
  END IF;
  IF EXISTS (SELECT FROM unnest(all_in_flight_limits || all_rate_limits) AS l (highest) WHERE l.highest IS NOT NULL) THEN
    starts_in_us := webhook_note_claimed(all_config_ids, all_priorities, all_ready_sinces, all_rate_limits);
  END IF;

  RETURN QUERY
  WITH due AS MATERIALIZED (
    SELECT * FROM unnest(all_tids, p_worker_ids, all_config_revisions, all_probes, all_in_flight_limits, starts_in_us)
      AS due (tid, worker_id, config_revision, probe, max_in_flight, starts_in_us)
  )
  UPDATE webhook_queue_open q
  SET status = 'processing', worker_id = due.worker_id, locked_at = now(), lock_expires_at = now() + p_lease, updated_at = now(),
      abandoned_by = CASE q.status WHEN 'processing' THEN coalesce(q.abandoned_by, q.worker_id) END,
      abandoned_at = CASE q.status WHEN 'processing' THEN coalesce(q.abandoned_at, q.locked_at) END
  FROM due WHERE q.ctid = due.tid
  RETURNING q.queue_id, q.config_id, due.config_revision, q.event_id, q.webhook_url,
            q.traceparent, q.retry_count, q.max_retries, q.worker_id, q.locked_at, q.abandoned_at,
            (extract(epoch FROM clock_timestamp() - greatest(q.created_at, q.next_retry_at)) * 1000000)::bigint,
            q.priority, q.ready_since, due.probe, due.max_in_flight IS NOT NULL, due.starts_in_us;
END $$;

-- As in 0002, and: an outcome also counts where the lease has expired and was taken over, as long as nobody has sent the
-- delivery since: the lease that it names is then the abandoned one. If the takeover has recorded the outcome as unknown
-- already, the known one takes its place.
DO $create$
DECLARE
  pinned CONSTANT text := $pinned$LANGUAGE plpgsql
    SET enable_sort = off SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
    SET lock_timeout = '10s'
    SET plan_cache_mode = force_generic_plan$pinned$;
  attempt_parameters CONSTANT text := '
    p_queue_ids uuid[], p_workers text[], p_locked_ats timestamptz[],
    p_ages_us bigint[], p_lengths_us bigint[], p_durations_ms int[], p_http_statuses smallint[],
    p_bodies text[], p_errors text[]';
  attempt_arrays CONSTANT text := '
    p_queue_ids, p_workers, p_locked_ats, p_ages_us, p_lengths_us, p_durations_ms, p_http_statuses, p_bodies, p_errors';
  attempt_columns CONSTANT text := 'queue_id, worker, locked_at, age_us, length_us, duration_ms, http_status, body, error';
  fence CONSTANT text := 'q.queue_id = o.queue_id
            AND (q.worker_id = o.worker AND q.locked_at = o.locked_at AND q.retry_count = %1$s
                 OR q.abandoned_by = o.worker AND q.abandoned_at = o.locked_at AND q.retry_count IN (%1$s, %1$s + 1))';
  kept CONSTANT text := 'id, queue_id, event_type, event_id, config_id, webhook_url, url_params, priority, max_retries,
    correlation_id, traceparent, replay_of, created_at, next_retry_at, deleted_at';
  earlier text;
BEGIN
  FOR n IN 0..6 LOOP
    SELECT coalesce(string_agg(format(
      'retry_%1$s_started_at, retry_%1$s_completed_at, retry_%1$s_duration_ms, retry_%1$s_http_status, retry_%1$s_response_body, retry_%1$s_error, ', k), '' ORDER BY k), '')
    INTO earlier FROM generate_series(0, n - 1) AS k;

    IF n < 6 THEN  -- attempt 6 is the last: nothing follows it
    EXECUTE format($f$
      CREATE OR REPLACE FUNCTION webhook_settle_%1$s_retry(%3$s, p_delays_us bigint[]) RETURNS SETOF uuid %2$s AS $body$
      BEGIN
        RETURN QUERY
        WITH outcome AS MATERIALIZED (SELECT * FROM unnest(%4$s, p_delays_us) AS o (%5$s, delay_us))
        UPDATE webhook_queue_open q
        SET status = 'pending', worker_id = NULL, locked_at = NULL, lock_expires_at = NULL, updated_at = now(),
            -- an outcome without a duration is unknown: until the delivery is sent again, a known one may come
            abandoned_by = CASE WHEN o.duration_ms IS NULL THEN q.abandoned_by END,
            abandoned_at = CASE WHEN o.duration_ms IS NULL THEN q.abandoned_at END,
            retry_count = %1$s + 1,
            next_retry_at = now() + o.delay_us * interval '1 microsecond',
            ready_since = NULL,
            retry_%1$s_started_at = now() - o.age_us * interval '1 microsecond',
            retry_%1$s_completed_at = now() - (o.age_us - o.length_us) * interval '1 microsecond',
            retry_%1$s_duration_ms = o.duration_ms,
            retry_%1$s_http_status = o.http_status,
            retry_%1$s_response_body = o.body,
            retry_%1$s_error = o.error
        FROM outcome o
        WHERE %6$s
        RETURNING q.queue_id;
      END $body$ $f$, n, pinned, attempt_parameters, attempt_arrays, attempt_columns, format(fence, n));
    END IF;

    EXECUTE format($f$
      CREATE OR REPLACE FUNCTION webhook_settle_%1$s_terminal(%3$s, p_statuses text[], p_reasons text[]) RETURNS SETOF uuid %2$s AS $body$
      BEGIN
        RETURN QUERY
        WITH outcome AS MATERIALIZED (SELECT * FROM unnest(%4$s, p_statuses, p_reasons) AS o (%5$s, final_status, reason)),
        settled AS (
          DELETE FROM webhook_queue_open q USING outcome o
          WHERE %8$s
          RETURNING q.*, o.age_us, o.length_us, o.duration_ms, o.http_status, o.body, o.error, o.final_status, o.reason)
        INSERT INTO webhook_queue (%6$s, retry_count, %7$s
          retry_%1$s_started_at, retry_%1$s_completed_at, retry_%1$s_duration_ms, retry_%1$s_http_status, retry_%1$s_response_body, retry_%1$s_error,
          status, status_reason, ready_since, completed_at, updated_at, settled_in)
        SELECT %6$s, %1$s, %7$s
          now() - age_us * interval '1 microsecond', now() - (age_us - length_us) * interval '1 microsecond', duration_ms, http_status, body, error,
          final_status, reason, NULL, now(), now(), pg_current_xact_id()::text::bigint
        FROM settled
        RETURNING webhook_queue.queue_id;
      END $body$ $f$, n, pinned, attempt_parameters, attempt_arrays, attempt_columns, kept, earlier, format(fence, n));
  END LOOP;

  SELECT string_agg(format(
    'retry_%1$s_started_at, retry_%1$s_completed_at, retry_%1$s_duration_ms, retry_%1$s_http_status, retry_%1$s_response_body, retry_%1$s_error', k), ', ' ORDER BY k)
  INTO earlier FROM generate_series(0, 6) AS k;
  EXECUTE format($f$
    CREATE OR REPLACE FUNCTION webhook_cancel(p_queue_ids uuid[], p_reason text) RETURNS SETOF uuid %1$s AS $body$
    BEGIN
      RETURN QUERY
      WITH wanted AS MATERIALIZED (SELECT w.queue_id FROM unnest(p_queue_ids) AS w (queue_id)),
      cancelled AS (
        DELETE FROM webhook_queue_open q USING wanted w
        WHERE q.queue_id = w.queue_id AND q.status = 'pending'
        RETURNING q.*),
      -- so that whoever sends the event again learns that it is not delivered
      noted AS (
        UPDATE webhook_event_keys k SET cancelled_at = now() FROM cancelled c
        WHERE k.config_id = c.config_id AND k.queue_id = c.queue_id
          -- its own key, that of the replay that it is, or both
          AND (k.event_id, k.event_type) IN ((c.event_id, c.event_type), (c.replay_of::text, 'replay')))
      INSERT INTO webhook_queue (%2$s, retry_count, %3$s, status, status_reason, ready_since, completed_at, updated_at, settled_in)
      SELECT %2$s, c.retry_count, %3$s, 'cancelled', p_reason, NULL, now(), now(), pg_current_xact_id()::text::bigint
      FROM cancelled c
      RETURNING webhook_queue.queue_id;
    END $body$ $f$, pinned, kept, earlier);
END $create$;

-- As in 0007, and: nothing is leased at an endpoint that recovers, which claims alone can pace; of a duplicate it says
-- whether the delivery that the same event made was cancelled.
DROP FUNCTION webhook_enqueue(uuid[], text[], text[], boolean[], bigint[], timestamptz[], text[], text[], smallint[],
    smallint[], timestamptz[], text[], text[], uuid[], text[], bigint[]);
CREATE FUNCTION webhook_enqueue(
  p_queue_ids uuid[], p_event_types text[], p_event_ids text[], p_named boolean[], p_config_ids bigint[],
  p_config_revisions timestamptz[], p_urls text[], p_params text[], p_priorities smallint[], p_max_retries smallint[],
  p_scheduled_ats timestamptz[], p_correlation_ids text[], p_traceparents text[], p_replays uuid[],
  p_worker_ids text[], p_leases_us bigint[])
RETURNS TABLE (queue_id uuid, first_queue_id uuid, locked_at timestamptz, first_cancelled boolean)
LANGUAGE plpgsql
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_mergejoin = off
SET jit = off
SET lock_timeout = '10s'
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
  stored_ids uuid[];
  leased_ids uuid[];
BEGIN
  WITH incoming AS MATERIALIZED (
    SELECT i.queue_id, i.event_type, i.event_id, i.named, i.config_id, i.url, i.params, i.priority, i.max_retries,
           i.scheduled_at, i.correlation_id, i.traceparent, i.replay_of, i.lease_us,
           CASE WHEN c.enabled AND c.circuit_state = 'closed' AND num_nonnulls(c.max_in_flight, c.rate_limit_per_second) = 0
                     AND webhook_ramp_rate(c.circuit_state, c.circuit_changed_at) IS NULL
                     AND (i.scheduled_at > now()) IS NOT TRUE
                THEN i.worker_id END AS worker_id
    FROM unnest(p_queue_ids, p_event_types, p_event_ids, p_named, p_config_ids, p_config_revisions, p_urls, p_params,
                p_priorities, p_max_retries, p_scheduled_ats, p_correlation_ids, p_traceparents, p_replays,
                p_worker_ids, p_leases_us)
      AS i (queue_id, event_type, event_id, named, config_id, config_revision, url, params,
            priority, max_retries, scheduled_at, correlation_id, traceparent, replay_of, worker_id, lease_us)
    -- one by one, whatever the planner believes (OFFSET 0): a batch has few endpoints, the table may have thousands
    CROSS JOIN LATERAL (SELECT * FROM webhook_configs c
                        WHERE c.id = i.config_id AND c.updated_at = i.config_revision AND c.deleted_at IS NULL OFFSET 0) AS c
  ), remembered AS (
    INSERT INTO webhook_event_keys (config_id, event_type, event_id, queue_id)
    SELECT i.config_id, CASE WHEN i.replay_of IS NULL THEN i.event_type ELSE 'replay' END,
           coalesce(i.replay_of::text, i.event_id), i.queue_id
    FROM incoming i WHERE i.named
    ON CONFLICT DO NOTHING
    RETURNING webhook_event_keys.queue_id
  ), stored AS (
    INSERT INTO webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, url_params, priority, max_retries,
                               next_retry_at, ready_since, correlation_id, traceparent, replay_of,
                               status, worker_id, locked_at, lock_expires_at)
    SELECT i.queue_id, i.event_type, i.event_id, i.config_id, i.url, i.params::json, i.priority, i.max_retries,
           greatest(i.scheduled_at, now()), CASE WHEN i.scheduled_at > now() THEN NULL ELSE now() END,
           i.correlation_id, i.traceparent, i.replay_of,
           CASE WHEN i.worker_id IS NULL THEN 'pending' ELSE 'processing' END, i.worker_id,
           CASE WHEN i.worker_id IS NOT NULL THEN now() END,
           CASE WHEN i.worker_id IS NOT NULL THEN now() + i.lease_us * interval '1 microsecond' END
    FROM incoming i
    WHERE NOT i.named OR i.queue_id IN (SELECT r.queue_id FROM remembered r)
    RETURNING webhook_queue.queue_id, webhook_queue.worker_id
  )
  SELECT coalesce(array_agg(s.queue_id), '{}'), array_agg(s.queue_id) FILTER (WHERE s.worker_id IS NOT NULL)
  INTO stored_ids, leased_ids FROM stored s;

  IF leased_ids IS NOT NULL THEN
    RETURN QUERY SELECT l.queue_id, NULL::uuid, now(), false FROM unnest(leased_ids) AS l (queue_id);
  END IF;
  IF cardinality(stored_ids) < cardinality(p_queue_ids) THEN
    -- a new statement, so a new snapshot: it sees the rows that the conflict was with
    RETURN QUERY
    SELECT i.queue_id, k.queue_id, NULL::timestamptz, k.cancelled_at IS NOT NULL
    FROM unnest(p_queue_ids, p_event_types, p_event_ids, p_named, p_config_ids, p_replays)
      AS i (queue_id, event_type, event_id, named, config_id, replay_of)
    LEFT JOIN LATERAL (
      SELECT k.queue_id, k.cancelled_at FROM webhook_event_keys k
      WHERE i.named AND k.event_id = coalesce(i.replay_of::text, i.event_id) AND k.config_id = i.config_id
        AND k.event_type = CASE WHEN i.replay_of IS NULL THEN i.event_type ELSE 'replay' END OFFSET 0) AS k ON true
    WHERE i.queue_id <> ALL (stored_ids);
  END IF;
END $$;
COMMENT ON FUNCTION webhook_enqueue(uuid[], text[], text[], boolean[], bigint[], timestamptz[], text[], text[], smallint[],
    smallint[], timestamptz[], text[], text[], uuid[], text[], bigint[])
  IS 'Stores deliveries, each event once for each endpoint, under a lease where one is wanted and can be had; answers those that are leased, and those that it did not store.';

-- Sends a delivery that waits to another URL, as what that is: the one that waits is cancelled, and a new one that refers to
-- it is stored, in one transaction. Answers nothing if the delivery does not wait any more; else one row: what webhook_enqueue
-- says, or NULLs where the new delivery is stored.
CREATE FUNCTION webhook_reroute(
  p_replay_of uuid, p_reason text, p_queue_id uuid, p_event_type text, p_event_id text, p_config_id bigint,
  p_config_revision timestamptz, p_url text, p_params text, p_priority smallint, p_max_retries smallint,
  p_scheduled_at timestamptz, p_correlation_id text, p_traceparent text)
RETURNS TABLE (queue_id uuid, first_queue_id uuid, locked_at timestamptz, first_cancelled boolean)
LANGUAGE plpgsql
SET lock_timeout = '10s'
AS $$
#variable_conflict use_column
BEGIN
  -- an endpoint that has changed since is found before anything is cancelled
  PERFORM FROM webhook_configs c
  WHERE c.id = p_config_id AND c.updated_at = p_config_revision AND c.deleted_at IS NULL FOR KEY SHARE;
  IF NOT FOUND THEN
    RETURN QUERY SELECT p_queue_id, NULL::uuid, NULL::timestamptz, false;
    RETURN;
  END IF;
  IF (SELECT count(*) FROM webhook_cancel(ARRAY[p_replay_of], p_reason)) = 0 THEN RETURN; END IF;
  RETURN QUERY
  SELECT p_queue_id, e.first_queue_id, NULL::timestamptz, e.first_cancelled
  FROM (SELECT 1) AS one
  LEFT JOIN webhook_enqueue(
    ARRAY[p_queue_id], ARRAY[p_event_type], ARRAY[p_event_id], ARRAY[true], ARRAY[p_config_id], ARRAY[p_config_revision],
    ARRAY[p_url], ARRAY[p_params], ARRAY[p_priority], ARRAY[p_max_retries], ARRAY[p_scheduled_at], ARRAY[p_correlation_id],
    ARRAY[p_traceparent], ARRAY[p_replay_of], ARRAY[NULL]::text[], ARRAY[NULL]::bigint[]) AS e ON true;
  IF NOT EXISTS (SELECT FROM webhook_event_keys k
                 WHERE k.event_id = p_replay_of::text AND k.event_type = 'replay' AND k.config_id = p_config_id) THEN
    -- it has changed in this very moment: nothing is done
    RAISE EXCEPTION 'the endpoint has changed' USING ERRCODE = 'serialization_failure';
  END IF;
  -- the event is the new delivery's from now on: whoever sends it again is told of that one
  UPDATE webhook_event_keys k SET queue_id = p_queue_id, cancelled_at = NULL
  WHERE k.event_id = p_event_id AND k.config_id = p_config_id AND k.queue_id = p_replay_of AND k.event_type <> 'replay';
END $$;
COMMENT ON FUNCTION webhook_reroute IS 'Cancels a delivery that waits, and stores another in its place, to another URL.';

-- Gives leases back that nobody uses: their deliveries are ready again, as if nobody had taken them. Each entry names a
-- lease; where p_locked_ats is NULL, it is the one that the delivery was stored under. A lease that was taken over from
-- another is that other one again, which has expired. If the lease that is given back has been taken over itself, the takeover is
-- void: there is no loss to record. Answers the deliveries.
DROP FUNCTION webhook_release;
CREATE FUNCTION webhook_release(p_queue_ids uuid[], p_worker_ids text[], p_locked_ats timestamptz[]) RETURNS SETOF uuid
LANGUAGE sql
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
SET lock_timeout = '10s'
AS $$
  -- if one was a probe, the next probe is due: a claim has given both the same end
  UPDATE webhook_configs c SET circuit_probe_at = now()
  FROM unnest(p_queue_ids, p_worker_ids) AS r (queue_id, worker_id)
  JOIN webhook_queue_open q ON q.queue_id = r.queue_id AND q.worker_id = r.worker_id AND q.status = 'processing'
  WHERE c.id = q.config_id AND c.circuit_state = 'half_open' AND c.circuit_probe_at = q.lock_expires_at;
  UPDATE webhook_queue_open q
  SET status = CASE WHEN kept.is_lease THEN 'processing' ELSE 'pending' END,
      worker_id = CASE WHEN kept.is_lease THEN q.abandoned_by END,
      locked_at = CASE WHEN kept.is_lease THEN q.abandoned_at END,
      lock_expires_at = CASE WHEN kept.is_lease THEN now() END,
      abandoned_by = NULL, abandoned_at = NULL, updated_at = now()
  FROM (
    SELECT o.queue_id, o.locked_at, coalesce(r.locked_at, CASE WHEN o.retry_count = 0 THEN o.created_at END) AS given_back,
           r.worker_id,
           o.abandoned_at IS NOT NULL
             AND (o.abandoned_by, o.abandoned_at)
                 IS DISTINCT FROM (r.worker_id, coalesce(r.locked_at, CASE WHEN o.retry_count = 0 THEN o.created_at END)) AS is_lease
    FROM unnest(p_queue_ids, p_worker_ids, p_locked_ats) AS r (queue_id, worker_id, locked_at)
    JOIN webhook_queue_open o ON o.queue_id = r.queue_id
  ) AS kept
  WHERE q.queue_id = kept.queue_id AND q.status = 'processing' AND q.locked_at = kept.locked_at
    AND (q.worker_id = kept.worker_id AND q.locked_at = kept.given_back
         -- taken over after its end, to record a loss that is none: nobody uses that lease either
         OR q.abandoned_by = kept.worker_id AND q.abandoned_at = kept.given_back)
  RETURNING q.queue_id
$$;
COMMENT ON FUNCTION webhook_release IS 'Gives leases back that nobody uses.';

-- The same for all leases of workers that are no more, but for the deliveries in p_kept. It reads the whole open partition:
-- it is called after a claim whose answer was lost, and only then.
CREATE FUNCTION webhook_release_orphans(p_worker_ids text[], p_kept uuid[]) RETURNS bigint
LANGUAGE plpgsql
SET jit = off
SET lock_timeout = '10s'
AS $$
DECLARE
  released bigint;
BEGIN
  SELECT count(*) INTO released
  FROM (SELECT array_agg(lost.queue_id ORDER BY lost.queue_id) AS queue_ids,
               array_agg(lost.worker_id ORDER BY lost.queue_id) AS worker_ids,
               array_agg(lost.locked_at ORDER BY lost.queue_id) AS locked_ats
        FROM (SELECT q.queue_id, CASE WHEN q.worker_id = ANY (p_worker_ids) THEN q.worker_id ELSE q.abandoned_by END AS worker_id,
                     CASE WHEN q.worker_id = ANY (p_worker_ids) THEN q.locked_at ELSE q.abandoned_at END AS locked_at
              FROM webhook_queue_open q
              WHERE q.status = 'processing' AND (q.worker_id = ANY (p_worker_ids) OR q.abandoned_by = ANY (p_worker_ids))
                AND q.queue_id <> ALL (p_kept)) AS lost) AS orphans
  CROSS JOIN LATERAL webhook_release(orphans.queue_ids, orphans.worker_ids, orphans.locked_ats);
  RETURN released;
END $$;
COMMENT ON FUNCTION webhook_release_orphans IS 'Gives back the leases of claims whose answers were lost.';

ALTER FUNCTION webhook_promote(int) SET lock_timeout = '10s';
ALTER FUNCTION webhook_settle_probe SET lock_timeout = '10s';
