-- The queue with its deduplication keys and its views. ARCHITECTURE.md says why the queue has this shape.

CREATE SEQUENCE webhook_queue_id_seq AS bigint;

CREATE TABLE webhook_queue (
  id bigint NOT NULL DEFAULT nextval('webhook_queue_id_seq'),
  queue_id uuid NOT NULL,
  event_type text NOT NULL,
  event_id text NOT NULL,
  config_id bigint NOT NULL,
  webhook_url text NOT NULL,
  url_params json NOT NULL DEFAULT '{}',
  priority smallint NOT NULL,
  max_retries smallint NOT NULL,
  correlation_id text,
  traceparent text,
  replay_of uuid,
  created_at timestamptz NOT NULL DEFAULT now(),

  -- changed by a claim: no index or index predicate may mention these columns, or claims stop being HOT updates
  status text NOT NULL DEFAULT 'pending',
  worker_id text,
  locked_at timestamptz,
  lock_expires_at timestamptz,
  -- An expired lease passes to another worker. The outcome that the first worker knows still counts until the delivery is
  -- sent again, so the first lease is kept beside the new one. No CHECK ties these two columns together, because each CHECK
  -- is parsed for each statement, which costs claims and settles about 10 %.
  abandoned_by text,
  abandoned_at timestamptz,
  updated_at timestamptz NOT NULL DEFAULT now(),

  -- changed by a settle
  retry_count smallint NOT NULL DEFAULT 0,
  next_retry_at timestamptz NOT NULL DEFAULT now(),
  ready_since timestamptz DEFAULT now(),
  completed_at timestamptz,
  status_reason text,
  settled_in bigint,
  deleted_at timestamptz,
  retry_0_started_at timestamptz, retry_0_completed_at timestamptz, retry_0_duration_ms int, retry_0_http_status smallint, retry_0_response_body text, retry_0_error text, retry_0_error_kind text, retry_0_evidence json,
  retry_1_started_at timestamptz, retry_1_completed_at timestamptz, retry_1_duration_ms int, retry_1_http_status smallint, retry_1_response_body text, retry_1_error text, retry_1_error_kind text, retry_1_evidence json,
  retry_2_started_at timestamptz, retry_2_completed_at timestamptz, retry_2_duration_ms int, retry_2_http_status smallint, retry_2_response_body text, retry_2_error text, retry_2_error_kind text, retry_2_evidence json,
  retry_3_started_at timestamptz, retry_3_completed_at timestamptz, retry_3_duration_ms int, retry_3_http_status smallint, retry_3_response_body text, retry_3_error text, retry_3_error_kind text, retry_3_evidence json,
  retry_4_started_at timestamptz, retry_4_completed_at timestamptz, retry_4_duration_ms int, retry_4_http_status smallint, retry_4_response_body text, retry_4_error text, retry_4_error_kind text, retry_4_evidence json,
  retry_5_started_at timestamptz, retry_5_completed_at timestamptz, retry_5_duration_ms int, retry_5_http_status smallint, retry_5_response_body text, retry_5_error text, retry_5_error_kind text, retry_5_evidence json,
  retry_6_started_at timestamptz, retry_6_completed_at timestamptz, retry_6_duration_ms int, retry_6_http_status smallint, retry_6_response_body text, retry_6_error text, retry_6_error_kind text, retry_6_evidence json,

  CONSTRAINT "terminal deliveries, and no others, have an end"
    CHECK (CASE status WHEN 'pending' THEN completed_at IS NULL WHEN 'processing' THEN completed_at IS NULL
                       WHEN 'completed' THEN completed_at IS NOT NULL WHEN 'failed' THEN completed_at IS NOT NULL
                       WHEN 'cancelled' THEN completed_at IS NOT NULL ELSE false END),
  CONSTRAINT "a processing delivery, and no other, is under a lease"
    CHECK (CASE WHEN status = 'processing'
                THEN num_nulls(worker_id, locked_at, lock_expires_at) = 0 AND locked_at < lock_expires_at
                ELSE num_nonnulls(worker_id, locked_at, lock_expires_at) = 0 END),
  CONSTRAINT "a processing delivery is ready, a terminal one is not"
    CHECK (CASE WHEN status = 'processing' THEN ready_since IS NOT NULL
                WHEN status = 'pending' THEN true ELSE ready_since IS NULL END),
  CONSTRAINT "retries are counted from 0 to a maximum of at most 6" CHECK (0 <= retry_count AND retry_count <= max_retries AND max_retries <= 6),
  CONSTRAINT "priority is from 0, critical, to 3, low" CHECK (priority BETWEEN 0 AND 3),
  CONSTRAINT "the attempts made are as many as the retry count says"
    CHECK (num_nonnulls(retry_0_started_at, retry_1_started_at, retry_2_started_at, retry_3_started_at,
                        retry_4_started_at, retry_5_started_at, retry_6_started_at)
           = retry_count + CASE WHEN status IN ('completed', 'failed') THEN 1 ELSE 0 END),
  CONSTRAINT "a failed or cancelled delivery, and no other, has a reason"
    CHECK ((status IN ('failed', 'cancelled')) = (status_reason IS NOT NULL))
) PARTITION BY RANGE (completed_at);
COMMENT ON TABLE webhook_queue IS 'Deliveries: each is one event owed to one endpoint. Open ones are in webhook_queue_open, terminal ones in an archive of the day on which they ended.';
COMMENT ON COLUMN webhook_queue.id IS 'A running number for people; not indexed.';
COMMENT ON COLUMN webhook_queue.queue_id IS 'Identifies the delivery (UUIDv7).';
COMMENT ON COLUMN webhook_queue.event_type IS '+credit or -debit.';
COMMENT ON COLUMN webhook_queue.event_id IS 'Identifies the event; equal to queue_id if the caller gave no id.';
COMMENT ON COLUMN webhook_queue.config_id IS 'The endpoint, a row of webhook_configs. Checked when the delivery is accepted; a foreign key would cost a quarter of the enqueue rate.';
COMMENT ON COLUMN webhook_queue.webhook_url IS 'The complete URL, built when the delivery was accepted and requested exactly like this.';
COMMENT ON COLUMN webhook_queue.url_params IS 'The parameters as the caller gave them, in the same order.';
COMMENT ON COLUMN webhook_queue.priority IS '0 (critical) to 3 (low).';
COMMENT ON COLUMN webhook_queue.max_retries IS 'Attempts after the first, 0 to 6.';
COMMENT ON COLUMN webhook_queue.correlation_id IS 'The caller''s own id for whatever caused the event.';
COMMENT ON COLUMN webhook_queue.traceparent IS 'W3C trace context of the enqueue, sent with each attempt.';
COMMENT ON COLUMN webhook_queue.replay_of IS 'The terminal delivery that this one repeats.';
COMMENT ON COLUMN webhook_queue.created_at IS 'When the delivery was accepted.';
COMMENT ON COLUMN webhook_queue.status IS 'pending, processing, completed, failed or cancelled.';
COMMENT ON COLUMN webhook_queue.worker_id IS 'Lease: the worker that holds it.';
COMMENT ON COLUMN webhook_queue.locked_at IS 'Lease: when it was taken. A settle must name it together with worker_id.';
COMMENT ON COLUMN webhook_queue.lock_expires_at IS 'Lease: from when on another worker may take over the delivery.';
COMMENT ON COLUMN webhook_queue.abandoned_by IS 'The worker whose lease expired before it reported an outcome; until the delivery is sent again, its outcome is still accepted.';
COMMENT ON COLUMN webhook_queue.abandoned_at IS 'When that lease was taken.';
COMMENT ON COLUMN webhook_queue.updated_at IS 'When the row last changed.';
COMMENT ON COLUMN webhook_queue.retry_count IS 'Number of the attempt that is next or under way. It is kept when the delivery ends.';
COMMENT ON COLUMN webhook_queue.next_retry_at IS 'When the next attempt is due. It is kept when the delivery ends.';
COMMENT ON COLUMN webhook_queue.ready_since IS 'Since when the delivery may be claimed; NULL while it waits for next_retry_at, and once it is terminal.';
COMMENT ON COLUMN webhook_queue.completed_at IS 'When the delivery became terminal.';
COMMENT ON COLUMN webhook_queue.status_reason IS 'Why the delivery failed or was cancelled.';
COMMENT ON COLUMN webhook_queue.settled_in IS 'The transaction that made the delivery terminal; with it, statistics count each delivery once.';
COMMENT ON COLUMN webhook_queue.deleted_at IS 'Set by an operator to leave the row out of lists; the service itself never sets it.';
DO $$
BEGIN
  FOR n IN 0..6 LOOP
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_started_at IS ''Attempt %s: when it began.''', n, n);
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_completed_at IS ''Attempt %s: when it ended.''', n, n);
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_duration_ms IS ''Attempt %s: time from connecting to the end of the response body, in milliseconds; NULL if unknown.''', n, n);
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_http_status IS ''Attempt %s: status of the response; NULL if none came.''', n, n);
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_response_body IS ''Attempt %s: first RESPONSE_BODY_MAX bytes of the response body.''', n, n);
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_error IS ''Attempt %s: what went wrong, in words; NULL if nothing went wrong.''', n, n);
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_error_kind IS ''Attempt %s: the kind of its error, to count by; NULL if nothing went wrong.''', n, n);
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_evidence IS ''Attempt %s: address (ip:port that was called), first_byte_ms, headers of the response (bounded), body_cut; each if it is known.''', n, n);
  END LOOP;
END $$;

-- Holds open rows only, so it stays small even with a long history. Because of the CHECK, an archive can be added without a
-- scan of this partition.
CREATE TABLE webhook_queue_open PARTITION OF webhook_queue (
  CONSTRAINT "the open partition holds open deliveries" CHECK (completed_at IS NULL),
  PRIMARY KEY (queue_id)
) DEFAULT WITH (fillfactor = 40, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);

CREATE INDEX webhook_queue_open_ready ON webhook_queue_open (priority, config_id, ready_since) WHERE ready_since IS NOT NULL;

CREATE INDEX webhook_queue_open_scheduled ON webhook_queue_open (next_retry_at) WHERE ready_since IS NULL;
COMMENT ON TABLE webhook_queue_open IS 'The deliveries that may still be attempted.';

CREATE TABLE webhook_event_keys (
  config_id bigint NOT NULL,
  event_type text NOT NULL,
  event_id text NOT NULL,
  queue_id uuid NOT NULL,
  remembered_at timestamptz NOT NULL DEFAULT now(),
  cancelled_at timestamptz,
  -- event_id first, so that an event can be found by its id alone
  PRIMARY KEY (event_id, event_type, config_id)
);
COMMENT ON TABLE webhook_event_keys IS 'The keys of events that callers named, so that the same event makes one delivery per endpoint, and of replays, so that a delivery is replayed once. It is a separate table, so that settles need not maintain its index.';
COMMENT ON COLUMN webhook_event_keys.config_id IS 'The endpoint.';
COMMENT ON COLUMN webhook_event_keys.event_type IS 'The event''s type, or `replay`.';
COMMENT ON COLUMN webhook_event_keys.event_id IS 'The event''s id, as the caller gave it; for a replay, the queue_id of the delivery that it repeats.';
COMMENT ON COLUMN webhook_event_keys.queue_id IS 'The delivery that the first enqueue made.';
COMMENT ON COLUMN webhook_event_keys.remembered_at IS 'When the key was stored. It is deleted with the archive of its delivery; the key of a replay with the archive of the delivery that was replayed.';
COMMENT ON COLUMN webhook_event_keys.cancelled_at IS 'When the delivery was cancelled. Anyone who sends the event again gets an error, because nothing will be delivered.';

-- Failed probes are numbered, so that their count is still known after all but the newest 100 of a delivery are removed.
CREATE TABLE webhook_probes (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  queue_id uuid NOT NULL,
  number int NOT NULL,
  attempt smallint NOT NULL,
  started_at timestamptz NOT NULL,
  completed_at timestamptz NOT NULL,
  duration_ms int,
  http_status smallint,
  response_body text,
  error text,
  error_kind text,
  evidence json
);
COMMENT ON TABLE webhook_probes IS 'Failed probes: requests that checked whether a receiver works again. They use up no attempt of their deliveries. The newest 100 per delivery are kept. A probe that succeeds counts as the attempt.';
COMMENT ON COLUMN webhook_probes.id IS 'A sequence number.';
COMMENT ON COLUMN webhook_probes.queue_id IS 'The delivery that was sent.';
COMMENT ON COLUMN webhook_probes.number IS 'The number of this failed probe among those of its delivery, from 1. The highest one is their total.';
COMMENT ON COLUMN webhook_probes.attempt IS 'The number of the attempt that the probe would have been.';
COMMENT ON COLUMN webhook_probes.started_at IS 'When it began.';
COMMENT ON COLUMN webhook_probes.completed_at IS 'When it ended.';
COMMENT ON COLUMN webhook_probes.duration_ms IS 'Time from connecting to the end of the response body, in milliseconds.';
COMMENT ON COLUMN webhook_probes.http_status IS 'Status of the response; NULL if none came.';
COMMENT ON COLUMN webhook_probes.response_body IS 'First RESPONSE_BODY_MAX bytes of the response body.';
COMMENT ON COLUMN webhook_probes.error IS 'What went wrong, in words.';
COMMENT ON COLUMN webhook_probes.error_kind IS 'The same in a word to count by.';
COMMENT ON COLUMN webhook_probes.evidence IS 'As in webhook_queue.retry_0_evidence.';

CREATE INDEX webhook_probes_number ON webhook_probes (queue_id, number);

CREATE VIEW webhook_attempts AS
SELECT q.queue_id, q.config_id, q.event_type, q.event_id, q.webhook_url, q.status, q.created_at,
       a.attempt, a.started_at, a.completed_at, a.duration_ms, a.http_status, a.response_body, a.error,
       q.completed_at AS delivery_completed_at, a.probe, a.error_kind,
       a.evidence->>'address' AS remote_address, (a.evidence->>'first_byte_ms')::int AS first_byte_ms,
       a.evidence->'headers' AS response_headers, (a.evidence->>'body_cut')::boolean AS body_cut
FROM webhook_queue q
CROSS JOIN LATERAL (
  SELECT *, false
  FROM (VALUES
    (0, q.retry_0_started_at, q.retry_0_completed_at, q.retry_0_duration_ms, q.retry_0_http_status, q.retry_0_response_body, q.retry_0_error, q.retry_0_error_kind, q.retry_0_evidence),
    (1, q.retry_1_started_at, q.retry_1_completed_at, q.retry_1_duration_ms, q.retry_1_http_status, q.retry_1_response_body, q.retry_1_error, q.retry_1_error_kind, q.retry_1_evidence),
    (2, q.retry_2_started_at, q.retry_2_completed_at, q.retry_2_duration_ms, q.retry_2_http_status, q.retry_2_response_body, q.retry_2_error, q.retry_2_error_kind, q.retry_2_evidence),
    (3, q.retry_3_started_at, q.retry_3_completed_at, q.retry_3_duration_ms, q.retry_3_http_status, q.retry_3_response_body, q.retry_3_error, q.retry_3_error_kind, q.retry_3_evidence),
    (4, q.retry_4_started_at, q.retry_4_completed_at, q.retry_4_duration_ms, q.retry_4_http_status, q.retry_4_response_body, q.retry_4_error, q.retry_4_error_kind, q.retry_4_evidence),
    (5, q.retry_5_started_at, q.retry_5_completed_at, q.retry_5_duration_ms, q.retry_5_http_status, q.retry_5_response_body, q.retry_5_error, q.retry_5_error_kind, q.retry_5_evidence),
    (6, q.retry_6_started_at, q.retry_6_completed_at, q.retry_6_duration_ms, q.retry_6_http_status, q.retry_6_response_body, q.retry_6_error, q.retry_6_error_kind, q.retry_6_evidence)
  ) AS made
  UNION ALL
  SELECT p.attempt, p.started_at, p.completed_at, p.duration_ms, p.http_status, p.response_body, p.error, p.error_kind, p.evidence, true
  FROM webhook_probes p WHERE p.queue_id = q.queue_id
) AS a (attempt, started_at, completed_at, duration_ms, http_status, response_body, error, error_kind, evidence, probe)
WHERE a.started_at IS NOT NULL;
COMMENT ON VIEW webhook_attempts IS 'One row per attempt, including failed probes (probe): what was requested, when, and what the receiver answered. A condition on delivery_completed_at skips archives.';

CREATE VIEW webhook_dead_letters AS
SELECT q.queue_id, q.config_id, c.name AS config_name, q.event_type, q.event_id, q.webhook_url, q.url_params,
       q.correlation_id, q.retry_count, q.status_reason, q.created_at, q.completed_at,
       a.http_status AS last_http_status, a.error AS last_error, a.error_kind AS last_error_kind
FROM webhook_queue q
JOIN webhook_configs c ON c.id = q.config_id
CROSS JOIN LATERAL (VALUES
  (0, q.retry_0_http_status, q.retry_0_error, q.retry_0_error_kind), (1, q.retry_1_http_status, q.retry_1_error, q.retry_1_error_kind),
  (2, q.retry_2_http_status, q.retry_2_error, q.retry_2_error_kind), (3, q.retry_3_http_status, q.retry_3_error, q.retry_3_error_kind),
  (4, q.retry_4_http_status, q.retry_4_error, q.retry_4_error_kind), (5, q.retry_5_http_status, q.retry_5_error, q.retry_5_error_kind),
  (6, q.retry_6_http_status, q.retry_6_error, q.retry_6_error_kind)
) AS a (attempt, http_status, error, error_kind)
WHERE q.status = 'failed' AND q.completed_at IS NOT NULL AND a.attempt = q.retry_count;
COMMENT ON VIEW webhook_dead_letters IS 'Failed deliveries with their last attempt. They are not attempted again unless someone replays them.';

-- Why deliveries are held: due, but not to be claimed. The reason is a state of the endpoint. The first reason that applies
-- counts: a disabled endpoint counts as paused, even if its circuit or a limit would hold deliveries, too.
CREATE VIEW webhook_holds AS
SELECT c.id AS config_id,
       CASE WHEN NOT c.enabled THEN 'paused'
            WHEN c.circuit_state <> 'closed' THEN 'circuit_open'
            WHEN c.max_in_flight IS NOT NULL OR c.rate_limit_per_second IS NOT NULL THEN 'limited' END AS held_by
FROM webhook_configs c;
COMMENT ON VIEW webhook_holds IS 'Why due deliveries of an endpoint wait: paused, circuit_open (also if half open), limited (max_in_flight or rate_limit_per_second); NULL: they could be claimed now.';

-- The deliveries of an event, with their replays and the replays of these. The caller checks that each row has the event's id,
-- because the id of an event may equal the id of another delivery.
-- The cast to uuid is inside a CASE. In an AND, PostgreSQL could evaluate it before the condition that guards it, and version
-- 18 does.
CREATE FUNCTION webhook_deliveries_of_event(p_event_id text) RETURNS SETOF uuid
LANGUAGE sql STABLE
SET enable_seqscan = off
SET jit = off
AS $$
  WITH RECURSIVE of_event AS (
    SELECT k.queue_id FROM webhook_event_keys k WHERE k.event_id = p_event_id AND k.event_type <> 'replay'
    UNION
    -- an event that its caller did not name has the id of its delivery
    SELECT own.queue_id
    FROM (SELECT CASE WHEN p_event_id ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN p_event_id::uuid END AS queue_id) AS own
    WHERE own.queue_id IS NOT NULL
    UNION
    SELECT k.queue_id FROM of_event o JOIN webhook_event_keys k ON k.event_id = o.queue_id::text AND k.event_type = 'replay'
  )
  SELECT o.queue_id FROM of_event o
$$;
COMMENT ON FUNCTION webhook_deliveries_of_event IS 'The deliveries of an event, with their replays, found without reading the history.';
