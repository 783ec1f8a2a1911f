-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

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
CREATE OR REPLACE FUNCTION webhook_claim(p_worker_ids text[], p_lease interval, p_after bigint, p_held boolean, p_share integer, p_config_ids bigint[], p_rooms integer[], p_floor_keys bigint[] DEFAULT '{}'::bigint[], p_floors timestamp with time zone[] DEFAULT '{}'::timestamp with time zone[])
 RETURNS TABLE(queue_id uuid, config_id bigint, config_revision timestamp with time zone, event_id text, webhook_url text, traceparent text, retry_count smallint, max_retries smallint, worker_id text, locked_at timestamp with time zone, abandoned_at timestamp with time zone, waited_us bigint, priority smallint, ready_since timestamp with time zone, probe boolean, in_flight_limited boolean, starts_in_us bigint)
 LANGUAGE plpgsql
 SET enable_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_hashjoin TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET lock_timeout TO '10s'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
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
END $function$;

COMMENT ON FUNCTION webhook_claim IS 'Takes leases on a fair batch of ready deliveries.';
