-- Claims by the place of a row, which saves a look-up for each delivery, and in the order of priorities whatever the plan:
-- where p_after lay beyond an endpoint with urgent deliveries, less urgent ones of endpoints behind it could go first.
-- What the parameters mean stands in 0004.
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
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
  -- what is chosen, an entry a delivery; where a row lies is good enough a name for it while it is locked
  tids tid[];
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
  -- one list of legs, since of two lists in a join the planner may walk either one first: the most urgent go first
  WITH due AS (
    SELECT d.tid, e.config_id, e.config_revision, leg.priority::smallint AS priority, d.ready_since, d.abandoned_at,
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
               -- those that are held have no limits: nothing of theirs is attempted
               CASE WHEN NOT p_held THEN c.max_in_flight END AS max_in_flight,
               CASE WHEN NOT p_held THEN c.rate_limit_per_second END AS rate_limit_per_second
        FROM webhook_configs c
        WHERE c.id = ring.config_id
          AND CASE WHEN p_held THEN NOT c.enabled OR c.circuit_state <> 'closed'
                   ELSE c.enabled AND (c.circuit_state = 'closed' OR c.circuit_probe_at <= now()) END) AS c
      WHERE ring.config_id > leg.after) AS e
    CROSS JOIN LATERAL (
      SELECT q.ctid AS tid, q.ready_since, q.locked_at AS abandoned_at FROM webhook_queue_open q
      WHERE q.ready_since IS NOT NULL AND q.priority = leg.priority AND q.config_id = e.config_id
        AND q.ready_since >= coalesce(p_floors[array_position(p_floor_keys, e.config_id * 4 + leg.priority)], '-infinity')
        AND (q.status = 'pending' AND NOT p_held OR q.lock_expires_at < now() AND NOT e.probe)
      ORDER BY q.ready_since
      LIMIT least(coalesce(p_rooms[array_position(p_config_ids, e.config_id)], p_share),
                  CASE WHEN e.probe OR num_nonnulls(e.max_in_flight, e.rate_limit_per_second) > 0
                       THEN webhook_room(e.config_id, leg.priority, e.probe) END)
      FOR UPDATE SKIP LOCKED) AS d
    LIMIT cardinality(p_worker_ids)
  )
  SELECT array_agg(due.tid), array_agg(due.config_id), array_agg(due.config_revision), array_agg(due.priority),
         array_agg(due.ready_since), array_agg(due.abandoned_at), array_agg(due.probe), array_agg(due.max_in_flight),
         array_agg(due.rate_limit_per_second)
  INTO tids, config_ids, config_revisions, priorities, ready_sinces, abandoned_ats, probes, in_flight_limits, rate_limits
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
    SELECT * FROM unnest(tids, p_worker_ids, abandoned_ats, config_revisions, probes, in_flight_limits, starts_in_us)
      AS due (tid, worker_id, abandoned_at, config_revision, probe, max_in_flight, starts_in_us)
  )
  UPDATE webhook_queue_open q
  SET status = 'processing', worker_id = due.worker_id, locked_at = now(), lock_expires_at = now() + p_lease, updated_at = now()
  FROM due WHERE q.ctid = due.tid
  RETURNING q.queue_id, q.config_id, due.config_revision, q.event_id, q.webhook_url,
            q.traceparent, q.retry_count, q.max_retries, q.worker_id, q.locked_at, due.abandoned_at,
            (extract(epoch FROM clock_timestamp() - greatest(q.created_at, q.next_retry_at)) * 1000000)::bigint,
            q.priority, q.ready_since, due.probe, due.max_in_flight IS NOT NULL, due.starts_in_us;
END $$;
