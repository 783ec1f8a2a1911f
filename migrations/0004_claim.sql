-- Leases, from the claim that takes them to the release of those that nobody uses.

-- Makes scheduled deliveries ready when they are due, so that a claim never steps over a million future retries.
-- Returns the number of deliveries and the microseconds until the next one is due, NULL if none is scheduled.
CREATE FUNCTION webhook_promote(p_limit int) RETURNS TABLE (promoted bigint, next_due_us bigint)
LANGUAGE plpgsql
SET lock_timeout = '10s'
SET enable_sort = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
  WITH due AS MATERIALIZED (
    SELECT q.queue_id FROM webhook_queue_open q
    WHERE q.ready_since IS NULL AND q.next_retry_at <= now()
    ORDER BY q.next_retry_at LIMIT p_limit FOR UPDATE SKIP LOCKED
  )
  UPDATE webhook_queue_open q SET ready_since = now(), updated_at = now()
  FROM due WHERE q.queue_id = due.queue_id;
  GET DIAGNOSTICS promoted = ROW_COUNT;
  next_due_us := (
    SELECT extract(epoch FROM q.next_retry_at - clock_timestamp()) * 1000000 FROM webhook_queue_open q
    WHERE q.ready_since IS NULL ORDER BY q.next_retry_at LIMIT 1)::bigint;
  RETURN NEXT;
END $$;
COMMENT ON FUNCTION webhook_promote IS 'Makes scheduled deliveries ready when they are due.';

-- How many attempts per second may begin at an endpoint whose circuit has just closed: 10 in the first second, then twice as
-- many in each second, for ten seconds. NULL: as many as its limits allow.
CREATE FUNCTION webhook_ramp_rate(p_state text, p_changed_at timestamptz) RETURNS int
LANGUAGE sql STABLE
RETURN CASE WHEN p_state = 'closed' AND p_changed_at > now() - interval '10 seconds' AND p_changed_at < now() + interval '1 second'
            THEN (10 * 2 ^ floor(greatest(extract(epoch FROM now() - p_changed_at), 0)))::int END;
COMMENT ON FUNCTION webhook_ramp_rate IS 'The rate to which an endpoint is limited while it recovers.';

-- The delivery to probe an open circuit with, near the front of the line. Preferred is one that has used up no attempt and goes
-- to a URL that the endpoint still has; otherwise any that goes to such a URL. A delivery that its receiver never accepts, or
-- one that goes elsewhere, must not keep the circuit open. NULL: there is no such delivery, and any other will do.
CREATE FUNCTION webhook_fresh_probe(p_config_id bigint, p_priority int) RETURNS uuid
LANGUAGE sql STABLE
SET enable_sort = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
RETURN (
  -- read only as far as it is asked: to the first that has used up no attempt, if there is one
  WITH candidates AS MATERIALIZED (
    SELECT front.queue_id, front.retry_count
    FROM (SELECT q.queue_id, q.retry_count, q.webhook_url FROM webhook_queue_open q
          WHERE q.ready_since IS NOT NULL AND q.priority = p_priority AND q.config_id = p_config_id AND q.status = 'pending'
          ORDER BY q.ready_since LIMIT 1000) AS front
    CROSS JOIN webhook_configs c
    WHERE c.id = p_config_id
      AND (webhook_is_at(front.webhook_url, c.postback_url) OR webhook_is_at(front.webhook_url, c.chargeback_url))
  )
  SELECT coalesce((SELECT queue_id FROM candidates WHERE retry_count = 0 LIMIT 1), (SELECT queue_id FROM candidates LIMIT 1)));
COMMENT ON FUNCTION webhook_fresh_probe IS 'The best delivery to probe an open circuit with.';

-- Where the front of a long line ends; NULL if the line is not long. Leased deliveries are in the front, because claims begin
-- there. So expired leases are found without a look at millions of waiting deliveries.
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

-- How many deliveries a claim may take from an endpoint whose circuit or limits restrict it.
-- Claims take turns at such an endpoint: a claim that meets another one there gets nothing. A claim serves only the endpoint's
-- most urgent priority, so that no room is given twice. A probe also waits for more urgent deliveries and for max_in_flight. An
-- urgent delivery whose lease has expired counts as waiting. After a circuit has closed, traffic grows step by step.
-- Starts are granted ahead, for 100 ms or up to the next start, each 1 / rate after the previous start (GCRA). A late claim
-- therefore neither slows the endpoint down nor causes a burst.
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
END $$;
COMMENT ON FUNCTION webhook_room IS 'How many deliveries a claim may take from an endpoint that has limits, or whose circuit is not closed.';

-- When the next attempt may start. Starts are granted at most 100 ms ahead, or one start ahead. A noted time further ahead comes
-- from a clock that was ahead, and is cut down.
CREATE FUNCTION webhook_next_start(p_noted timestamptz, p_rate int) RETURNS timestamptz
LANGUAGE sql STABLE
RETURN CASE WHEN p_noted > now() + interval '1 second' + interval '2 seconds' / p_rate THEN now() ELSE p_noted END;
COMMENT ON FUNCTION webhook_next_start IS 'When the next attempt may begin at an endpoint whose rate is limited.';

-- Notes for webhook_room what a claim has chosen at endpoints with limits, in one row per endpoint for all priorities. Endpoints
-- that are only probed are not noted. Returns for each delivery in how many microseconds its attempt may begin; NULL if the rate
-- is not limited.
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
END $$;
COMMENT ON FUNCTION webhook_note_claimed IS 'Notes what a claim has chosen at endpoints with limits, and paces it.';

-- Takes leases for p_worker_ids, at most one per entry, fairly among endpoints.
-- For each priority, a loose index scan walks the endpoints that have ready deliveries, first those after p_after, then the
-- others, until the batch is full. So an endpoint with a million waiting deliveries costs the others one index probe. Every
-- filter stands before a LIMIT. Priorities are served in their order whatever the plan, and rows are locked by their ctid, which
-- saves a look-up per row.
-- A delivery whose lease has expired is taken over. The lost lease is kept as the abandoned one. `abandoned_at` in the result is
-- when that lease was taken.
-- p_share bounds what is taken from one endpoint, all priorities together. For the endpoints in p_config_ids, p_rooms is the
-- bound. With these the caller keeps a slow endpoint from holding all of its leases.
-- With p_held, the expired leases of held endpoints (disabled, or with a circuit that is not closed) are taken instead, which
-- would otherwise never end. Only the front of each line is searched, because claims begin there.
-- p_floors are hints. At the endpoint and priority of each p_floor_keys entry (config_id * 4 + priority), no delivery waits that
-- became ready before the floor. The scan begins there, so it does not step over the index entries of deliveries that were
-- claimed before. Those entries stay as long as some transaction may still see them.
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
SET lock_timeout = '10s'
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
  -- the priorities that this round chooses from: first all together, later perhaps one after the other
  most_urgent int := 0;
  least_urgent int := 3;
  -- the choice of this round, one entry per delivery; a locked row keeps its ctid, so that identifies it
  tids tid[];
  config_ids bigint[];
  config_revisions timestamptz[];
  priorities smallint[];
  ready_sinces timestamptz[];
  probes boolean[];
  in_flight_limits int[];
  rate_limits int[];
  -- the choices of the earlier rounds
  all_tids tid[] := '{}';
  all_config_ids bigint[] := '{}';
  all_config_revisions timestamptz[] := '{}';
  all_priorities smallint[] := '{}';
  all_ready_sinces timestamptz[] := '{}';
  all_probes boolean[] := '{}';
  all_in_flight_limits int[] := '{}';
  all_rate_limits int[] := '{}';
  -- the rooms that the earlier rounds left
  listed bigint[] := p_config_ids;
  rooms int[] := p_rooms;
  starts_in_us bigint[];
BEGIN
  LOOP
    -- All deliveries are chosen before any is taken, because webhook_room looks at what is in flight.
    -- There is one list of legs, most urgent first. The planner could walk a join of two lists in either order.
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
          -- an endpoint with a floor is taken as it comes, without a search
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
                 -- limits do not apply to held endpoints: nothing is attempted there
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

    -- An endpoint with deliveries of several priorities may have given its whole room in each of them. Then the choice is
    -- made again, one priority after the other, each within the room that the earlier ones left.
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
COMMENT ON FUNCTION webhook_claim IS 'Takes leases on a fair batch of ready deliveries.';

-- Gives back leases that nobody uses: their deliveries are ready again, as if nobody had taken them. Returns the deliveries.
-- Each entry names a lease. If p_locked_ats is NULL, it is the lease that the delivery was stored under. If the lease was taken
-- over from an expired one, the expired one is restored. If the lease has been taken over itself, the takeover is void: there is
-- no loss to record.
CREATE FUNCTION webhook_release(p_queue_ids uuid[], p_worker_ids text[], p_locked_ats timestamptz[]) RETURNS SETOF uuid
LANGUAGE sql
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
SET lock_timeout = '10s'
AS $$
  -- if one was a probe, the next probe is due now: the claim gave the lease and the next probe the same time
  UPDATE webhook_configs c SET circuit_probe_at = now()
  FROM unnest(p_queue_ids, p_worker_ids, p_locked_ats) AS r (queue_id, worker_id, locked_at)
  JOIN webhook_queue_open q ON q.queue_id = r.queue_id AND q.status = 'processing' AND q.worker_id = r.worker_id
    AND q.locked_at = coalesce(r.locked_at, CASE WHEN q.retry_count = 0 THEN q.created_at END)
  WHERE c.id = q.config_id AND c.circuit_state = 'half_open' AND c.circuit_probe_at = q.lock_expires_at;
  UPDATE webhook_queue_open q
  SET status = CASE WHEN kept.is_lease THEN 'processing' ELSE 'pending' END,
      worker_id = CASE WHEN kept.is_lease THEN q.abandoned_by END,
      locked_at = CASE WHEN kept.is_lease THEN q.abandoned_at END,
      lock_expires_at = CASE WHEN kept.is_lease THEN now() END,
      abandoned_by = NULL, abandoned_at = NULL, updated_at = now()
  FROM (
    SELECT o.queue_id, o.locked_at, given_back.locked_at AS given_back, r.worker_id,
           o.abandoned_at IS NOT NULL
             AND (o.abandoned_by, o.abandoned_at) IS DISTINCT FROM (r.worker_id, given_back.locked_at) AS is_lease
    FROM unnest(p_queue_ids, p_worker_ids, p_locked_ats) AS r (queue_id, worker_id, locked_at)
    JOIN webhook_queue_open o ON o.queue_id = r.queue_id
    CROSS JOIN LATERAL (SELECT coalesce(r.locked_at, CASE WHEN o.retry_count = 0 THEN o.created_at END)) AS given_back (locked_at)
  ) AS kept
  WHERE q.queue_id = kept.queue_id AND q.status = 'processing' AND q.locked_at = kept.locked_at
    AND (q.worker_id = kept.worker_id AND q.locked_at = kept.given_back
         -- taken over after its end to record a loss that did not happen: nobody uses that lease either
         OR q.abandoned_by = kept.worker_id AND q.abandoned_at = kept.given_back)
  RETURNING q.queue_id
$$;
COMMENT ON FUNCTION webhook_release IS 'Gives back leases that nobody uses.';

-- The same for all leases of worker names that are no longer in use, except for the deliveries in p_kept. It reads the whole
-- open partition, so it is called only after a claim whose answer was lost.
CREATE FUNCTION webhook_release_lost_claims(p_worker_ids text[], p_kept uuid[]) RETURNS bigint
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
                AND q.queue_id <> ALL (p_kept)) AS lost) AS lost_claims
  CROSS JOIN LATERAL webhook_release(lost_claims.queue_ids, lost_claims.worker_ids, lost_claims.locked_ats);
  RETURN released;
END $$;
COMMENT ON FUNCTION webhook_release_lost_claims IS 'Gives back the leases of claims whose answers were lost.';
