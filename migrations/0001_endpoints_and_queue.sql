-- The endpoints, the queue and what guards them. ARCHITECTURE.md says why the queue has this shape.

CREATE TABLE webhook_configs (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  name text NOT NULL,
  postback_url text,
  chargeback_url text,
  headers jsonb NOT NULL DEFAULT '{}',
  timeout_ms int NOT NULL DEFAULT 30000,
  max_retries smallint NOT NULL DEFAULT 6,
  retry_base_ms int NOT NULL DEFAULT 1000,
  retry_cap_ms int NOT NULL DEFAULT 300000,
  retry_jitter double precision NOT NULL DEFAULT 0.25,
  priority smallint NOT NULL DEFAULT 2,
  enabled boolean NOT NULL DEFAULT true,
  disabled_reason text,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  deleted_at timestamptz,
  CONSTRAINT "an endpoint has a name" CHECK (name <> ''),
  CONSTRAINT "an endpoint has a postback or a chargeback URL" CHECK (num_nonnulls(postback_url, chargeback_url) > 0),
  CONSTRAINT "headers are an object" CHECK (jsonb_typeof(headers) = 'object'),
  CONSTRAINT "an attempt takes from 1 ms to 5 min" CHECK (timeout_ms BETWEEN 1 AND 300000),
  CONSTRAINT "there are at most 6 retries" CHECK (max_retries BETWEEN 0 AND 6),
  CONSTRAINT "a retry waits from 1 ms to 1 day" CHECK (1 <= retry_base_ms AND retry_base_ms <= retry_cap_ms AND retry_cap_ms <= 86400000),
  CONSTRAINT "jitter is a share below 1" CHECK (0 <= retry_jitter AND retry_jitter < 1),
  CONSTRAINT "priority is from 0, critical, to 3, low" CHECK (priority BETWEEN 0 AND 3),
  CONSTRAINT "only a disabled endpoint has a reason for it" CHECK (disabled_reason IS NULL OR NOT enabled),
  CONSTRAINT "a deleted endpoint is disabled" CHECK (deleted_at IS NULL OR NOT enabled)
);

COMMENT ON TABLE webhook_configs IS 'Endpoints: where deliveries go, and how. Rows are never removed, so that the audit stays whole.';
COMMENT ON COLUMN webhook_configs.id IS 'Names the endpoint in the API and in webhook_queue.config_id.';
COMMENT ON COLUMN webhook_configs.name IS 'For people.';
COMMENT ON COLUMN webhook_configs.postback_url IS 'Where +credit events go; NULL: this endpoint takes none.';
COMMENT ON COLUMN webhook_configs.chargeback_url IS 'Where -debit events go; NULL: this endpoint takes none.';
COMMENT ON COLUMN webhook_configs.headers IS 'Request headers to send with each attempt, name to value. May hold credentials.';
COMMENT ON COLUMN webhook_configs.timeout_ms IS 'Limit of one attempt, from connect to the end of the body, in milliseconds; HTTP_TIMEOUT is the upper bound.';
COMMENT ON COLUMN webhook_configs.max_retries IS 'Attempts after the first; copied to each delivery when it is accepted.';
COMMENT ON COLUMN webhook_configs.retry_base_ms IS 'Delay before the first retry, in milliseconds; doubled for each one after.';
COMMENT ON COLUMN webhook_configs.retry_cap_ms IS 'Upper bound of that delay before jitter, in milliseconds.';
COMMENT ON COLUMN webhook_configs.retry_jitter IS 'Share by which a delay may be longer or shorter, from 0 to below 1.';
COMMENT ON COLUMN webhook_configs.priority IS 'Priority of its deliveries where the event names none: 0 (critical) to 3 (low).';
COMMENT ON COLUMN webhook_configs.enabled IS 'False: deliveries are accepted and wait.';
COMMENT ON COLUMN webhook_configs.disabled_reason IS 'Why it was disabled by the service itself, for instance after 410 Gone.';
COMMENT ON COLUMN webhook_configs.created_at IS 'When it was registered.';
COMMENT ON COLUMN webhook_configs.updated_at IS 'When it last changed; serves as the revision that an enqueue is checked against.';
COMMENT ON COLUMN webhook_configs.deleted_at IS 'When it was deleted; its open deliveries were cancelled then.';

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

  -- changed by a claim: no index and no index predicate may mention these, or claims stop being HOT
  status text NOT NULL DEFAULT 'pending',
  worker_id text,
  locked_at timestamptz,
  lock_expires_at timestamptz,
  updated_at timestamptz NOT NULL DEFAULT now(),

  -- changed by a settle
  retry_count smallint NOT NULL DEFAULT 0,
  next_retry_at timestamptz NOT NULL DEFAULT now(),
  ready_since timestamptz DEFAULT now(),
  completed_at timestamptz,
  status_reason text,
  settled_in bigint,
  deleted_at timestamptz,
  retry_0_started_at timestamptz, retry_0_completed_at timestamptz, retry_0_duration_ms int, retry_0_http_status smallint, retry_0_response_body text, retry_0_error text,
  retry_1_started_at timestamptz, retry_1_completed_at timestamptz, retry_1_duration_ms int, retry_1_http_status smallint, retry_1_response_body text, retry_1_error text,
  retry_2_started_at timestamptz, retry_2_completed_at timestamptz, retry_2_duration_ms int, retry_2_http_status smallint, retry_2_response_body text, retry_2_error text,
  retry_3_started_at timestamptz, retry_3_completed_at timestamptz, retry_3_duration_ms int, retry_3_http_status smallint, retry_3_response_body text, retry_3_error text,
  retry_4_started_at timestamptz, retry_4_completed_at timestamptz, retry_4_duration_ms int, retry_4_http_status smallint, retry_4_response_body text, retry_4_error text,
  retry_5_started_at timestamptz, retry_5_completed_at timestamptz, retry_5_duration_ms int, retry_5_http_status smallint, retry_5_response_body text, retry_5_error text,
  retry_6_started_at timestamptz, retry_6_completed_at timestamptz, retry_6_duration_ms int, retry_6_http_status smallint, retry_6_response_body text, retry_6_error text,

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
COMMENT ON COLUMN webhook_queue.queue_id IS 'Names the delivery (UUIDv7).';
COMMENT ON COLUMN webhook_queue.event_type IS '+credit or -debit.';
COMMENT ON COLUMN webhook_queue.event_id IS 'Names the event; the queue_id where the caller gave none.';
COMMENT ON COLUMN webhook_queue.config_id IS 'The endpoint, a row of webhook_configs. Checked when the delivery is accepted; a foreign key would cost a quarter of the enqueue rate.';
COMMENT ON COLUMN webhook_queue.webhook_url IS 'The complete URL, built when the delivery was accepted: what is requested, to the letter.';
COMMENT ON COLUMN webhook_queue.url_params IS 'The parameters as the caller gave them, in that order.';
COMMENT ON COLUMN webhook_queue.priority IS '0 (critical) to 3 (low).';
COMMENT ON COLUMN webhook_queue.max_retries IS 'Attempts after the first, 0 to 6.';
COMMENT ON COLUMN webhook_queue.correlation_id IS 'The caller''s own id for what led to the event.';
COMMENT ON COLUMN webhook_queue.traceparent IS 'W3C trace context of the enqueue, sent on with each attempt.';
COMMENT ON COLUMN webhook_queue.replay_of IS 'The terminal delivery that this one repeats.';
COMMENT ON COLUMN webhook_queue.created_at IS 'When the delivery was accepted.';
COMMENT ON COLUMN webhook_queue.status IS 'pending, processing, completed, failed or cancelled.';
COMMENT ON COLUMN webhook_queue.worker_id IS 'Lease: the worker that holds it.';
COMMENT ON COLUMN webhook_queue.locked_at IS 'Lease: when it was taken; with worker_id it is what a settle must name.';
COMMENT ON COLUMN webhook_queue.lock_expires_at IS 'Lease: when another worker may take the delivery over.';
COMMENT ON COLUMN webhook_queue.updated_at IS 'When the row last changed.';
COMMENT ON COLUMN webhook_queue.retry_count IS 'Number of the attempt that is next, under way, or was the last.';
COMMENT ON COLUMN webhook_queue.next_retry_at IS 'When the next attempt is due, or was.';
COMMENT ON COLUMN webhook_queue.ready_since IS 'Since when it may be claimed; NULL while it waits for next_retry_at, and once it is terminal.';
COMMENT ON COLUMN webhook_queue.completed_at IS 'When it became terminal.';
COMMENT ON COLUMN webhook_queue.status_reason IS 'Why it failed or was cancelled.';
COMMENT ON COLUMN webhook_queue.settled_in IS 'The transaction that made it terminal; statistics count each delivery once by it.';
COMMENT ON COLUMN webhook_queue.deleted_at IS 'Set by an operator to leave the row out of lists; the service itself never sets it.';
DO $$
BEGIN
  FOR n IN 0..6 LOOP
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_started_at IS ''Attempt %s: when it began.''', n, n);
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_completed_at IS ''Attempt %s: when it ended.''', n, n);
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_duration_ms IS ''Attempt %s: time from connect to the end of the body, in milliseconds; NULL if unknown.''', n, n);
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_http_status IS ''Attempt %s: status of the response; NULL if none came.''', n, n);
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_response_body IS ''Attempt %s: first RESPONSE_BODY_MAX bytes of the response.''', n, n);
    EXECUTE format('COMMENT ON COLUMN webhook_queue.retry_%s_error IS ''Attempt %s: what went wrong, in words; NULL if nothing did.''', n, n);
  END LOOP;
END $$;

-- Open rows only, so small whatever the history. The CHECK lets an archive be added without a scan of this partition.
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
  -- event_id first, so that what became of an event is found by it alone
  PRIMARY KEY (event_id, event_type, config_id)
);
CREATE INDEX webhook_event_keys_age ON webhook_event_keys (remembered_at);
COMMENT ON TABLE webhook_event_keys IS 'Events that callers named, so that the same event makes one delivery an endpoint, and replays, so that a delivery is replayed once. A table of its own: settles need not maintain its index.';
COMMENT ON COLUMN webhook_event_keys.config_id IS 'The endpoint.';
COMMENT ON COLUMN webhook_event_keys.event_type IS 'The event''s type, or `replay`.';
COMMENT ON COLUMN webhook_event_keys.event_id IS 'The event''s id, as the caller gave it; of a replay, the delivery that it repeats.';
COMMENT ON COLUMN webhook_event_keys.queue_id IS 'The delivery that the first enqueue made.';
COMMENT ON COLUMN webhook_event_keys.remembered_at IS 'When that was; the key is forgotten ARCHIVE_RETENTION later.';

CREATE VIEW webhook_attempts AS
SELECT q.queue_id, q.config_id, q.event_type, q.event_id, q.webhook_url, q.status, q.created_at,
       a.attempt, a.started_at, a.completed_at, a.duration_ms, a.http_status, a.response_body, a.error,
       q.completed_at AS delivery_completed_at
FROM webhook_queue q
CROSS JOIN LATERAL (VALUES
  (0, q.retry_0_started_at, q.retry_0_completed_at, q.retry_0_duration_ms, q.retry_0_http_status, q.retry_0_response_body, q.retry_0_error),
  (1, q.retry_1_started_at, q.retry_1_completed_at, q.retry_1_duration_ms, q.retry_1_http_status, q.retry_1_response_body, q.retry_1_error),
  (2, q.retry_2_started_at, q.retry_2_completed_at, q.retry_2_duration_ms, q.retry_2_http_status, q.retry_2_response_body, q.retry_2_error),
  (3, q.retry_3_started_at, q.retry_3_completed_at, q.retry_3_duration_ms, q.retry_3_http_status, q.retry_3_response_body, q.retry_3_error),
  (4, q.retry_4_started_at, q.retry_4_completed_at, q.retry_4_duration_ms, q.retry_4_http_status, q.retry_4_response_body, q.retry_4_error),
  (5, q.retry_5_started_at, q.retry_5_completed_at, q.retry_5_duration_ms, q.retry_5_http_status, q.retry_5_response_body, q.retry_5_error),
  (6, q.retry_6_started_at, q.retry_6_completed_at, q.retry_6_duration_ms, q.retry_6_http_status, q.retry_6_response_body, q.retry_6_error)
) AS a (attempt, started_at, completed_at, duration_ms, http_status, response_body, error)
WHERE a.started_at IS NOT NULL;
COMMENT ON VIEW webhook_attempts IS 'One row an attempt: what was requested, when, and what the receiver said. A condition on delivery_completed_at leaves archives out.';

CREATE VIEW webhook_dead_letters AS
SELECT q.queue_id, q.config_id, c.name AS config_name, q.event_type, q.event_id, q.webhook_url, q.url_params,
       q.correlation_id, q.retry_count, q.status_reason, q.created_at, q.completed_at,
       a.http_status AS last_http_status, a.error AS last_error
FROM webhook_queue q
JOIN webhook_configs c ON c.id = q.config_id
CROSS JOIN LATERAL (VALUES
  (0, q.retry_0_http_status, q.retry_0_error), (1, q.retry_1_http_status, q.retry_1_error),
  (2, q.retry_2_http_status, q.retry_2_error), (3, q.retry_3_http_status, q.retry_3_error),
  (4, q.retry_4_http_status, q.retry_4_error), (5, q.retry_5_http_status, q.retry_5_error),
  (6, q.retry_6_http_status, q.retry_6_error)
) AS a (attempt, http_status, error)
WHERE q.status = 'failed' AND q.completed_at IS NOT NULL AND a.attempt = q.retry_count;
-- The deliveries of an event, its replays, and theirs.
CREATE FUNCTION webhook_deliveries_of_event(p_event_id text) RETURNS SETOF uuid
LANGUAGE sql STABLE
SET enable_seqscan = off
SET jit = off
AS $$
  WITH RECURSIVE of_event AS (
    SELECT k.queue_id FROM webhook_event_keys k WHERE k.event_id = p_event_id AND k.event_type <> 'replay'
    UNION
    -- an event without a name of its own has that of its delivery
    SELECT p_event_id::uuid WHERE p_event_id ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
    UNION
    SELECT k.queue_id FROM of_event o JOIN webhook_event_keys k ON k.event_id = o.queue_id::text AND k.event_type = 'replay'
  )
  SELECT o.queue_id FROM of_event o
$$;
COMMENT ON FUNCTION webhook_deliveries_of_event IS 'The deliveries of an event, with their replays, found without reading the history.';

COMMENT ON VIEW webhook_dead_letters IS 'Failed deliveries with their last attempt: nothing will attempt them again unless asked.';
