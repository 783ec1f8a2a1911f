-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE TABLE webhook_queue (
    id bigint DEFAULT nextval('webhook_queue_id_seq'::regclass) NOT NULL,
    queue_id uuid NOT NULL,
    event_type text NOT NULL,
    event_id text NOT NULL,
    config_id bigint NOT NULL,
    webhook_url text NOT NULL,
    url_params json DEFAULT '{}'::json NOT NULL,
    priority smallint NOT NULL,
    max_retries smallint NOT NULL,
    correlation_id text,
    traceparent text,
    replay_of uuid,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    status text DEFAULT 'pending'::text NOT NULL,
    worker_id text,
    locked_at timestamp with time zone,
    lock_expires_at timestamp with time zone,
    abandoned_by text,
    abandoned_at timestamp with time zone,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    retry_count smallint DEFAULT 0 NOT NULL,
    next_retry_at timestamp with time zone DEFAULT now() NOT NULL,
    ready_since timestamp with time zone DEFAULT now(),
    completed_at timestamp with time zone,
    status_reason text,
    settled_in bigint,
    deleted_at timestamp with time zone,
    retry_0_started_at timestamp with time zone,
    retry_0_completed_at timestamp with time zone,
    retry_0_duration_ms integer,
    retry_0_http_status smallint,
    retry_0_response_body text,
    retry_0_error text,
    retry_0_error_kind text,
    retry_0_evidence json,
    retry_1_started_at timestamp with time zone,
    retry_1_completed_at timestamp with time zone,
    retry_1_duration_ms integer,
    retry_1_http_status smallint,
    retry_1_response_body text,
    retry_1_error text,
    retry_1_error_kind text,
    retry_1_evidence json,
    retry_2_started_at timestamp with time zone,
    retry_2_completed_at timestamp with time zone,
    retry_2_duration_ms integer,
    retry_2_http_status smallint,
    retry_2_response_body text,
    retry_2_error text,
    retry_2_error_kind text,
    retry_2_evidence json,
    retry_3_started_at timestamp with time zone,
    retry_3_completed_at timestamp with time zone,
    retry_3_duration_ms integer,
    retry_3_http_status smallint,
    retry_3_response_body text,
    retry_3_error text,
    retry_3_error_kind text,
    retry_3_evidence json,
    retry_4_started_at timestamp with time zone,
    retry_4_completed_at timestamp with time zone,
    retry_4_duration_ms integer,
    retry_4_http_status smallint,
    retry_4_response_body text,
    retry_4_error text,
    retry_4_error_kind text,
    retry_4_evidence json,
    retry_5_started_at timestamp with time zone,
    retry_5_completed_at timestamp with time zone,
    retry_5_duration_ms integer,
    retry_5_http_status smallint,
    retry_5_response_body text,
    retry_5_error text,
    retry_5_error_kind text,
    retry_5_evidence json,
    retry_6_started_at timestamp with time zone,
    retry_6_completed_at timestamp with time zone,
    retry_6_duration_ms integer,
    retry_6_http_status smallint,
    retry_6_response_body text,
    retry_6_error text,
    retry_6_error_kind text,
    retry_6_evidence json,
    CONSTRAINT "a failed or cancelled delivery, and no other, has a reason" CHECK (((status = ANY (ARRAY['failed'::text, 'cancelled'::text])) = (status_reason IS NOT NULL))),
    CONSTRAINT "a processing delivery is ready, a terminal one is not" CHECK (
CASE
    WHEN (status = 'processing'::text) THEN (ready_since IS NOT NULL)
    WHEN (status = 'pending'::text) THEN true
    ELSE (ready_since IS NULL)
END),
    CONSTRAINT "a processing delivery, and no other, is under a lease" CHECK (
CASE
    WHEN (status = 'processing'::text) THEN ((num_nulls(worker_id, locked_at, lock_expires_at) = 0) AND (locked_at < lock_expires_at))
    ELSE (num_nonnulls(worker_id, locked_at, lock_expires_at) = 0)
END),
    CONSTRAINT "priority is from 0, critical, to 3, low" CHECK (((priority >= 0) AND (priority <= 3))),
    CONSTRAINT "retries are counted from 0 to a maximum of at most 6" CHECK (((0 <= retry_count) AND (retry_count <= max_retries) AND (max_retries <= 6))),
    CONSTRAINT "terminal deliveries, and no others, have an end" CHECK (
CASE status
    WHEN 'pending'::text THEN (completed_at IS NULL)
    WHEN 'processing'::text THEN (completed_at IS NULL)
    WHEN 'completed'::text THEN (completed_at IS NOT NULL)
    WHEN 'failed'::text THEN (completed_at IS NOT NULL)
    WHEN 'cancelled'::text THEN (completed_at IS NOT NULL)
    ELSE false
END),
    CONSTRAINT "the attempts made are as many as the retry count says" CHECK ((num_nonnulls(retry_0_started_at, retry_1_started_at, retry_2_started_at, retry_3_started_at, retry_4_started_at, retry_5_started_at, retry_6_started_at) = (retry_count +
CASE
    WHEN (status = ANY (ARRAY['completed'::text, 'failed'::text])) THEN 1
    ELSE 0
END)))
)
PARTITION BY RANGE (completed_at);

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

COMMENT ON COLUMN webhook_queue.retry_0_started_at IS 'Attempt 0: when it began.';

COMMENT ON COLUMN webhook_queue.retry_0_completed_at IS 'Attempt 0: when it ended.';

COMMENT ON COLUMN webhook_queue.retry_0_duration_ms IS 'Attempt 0: time from connecting to the end of the response body, in milliseconds; NULL if unknown.';

COMMENT ON COLUMN webhook_queue.retry_0_http_status IS 'Attempt 0: status of the response; NULL if none came.';

COMMENT ON COLUMN webhook_queue.retry_0_response_body IS 'Attempt 0: first RESPONSE_BODY_MAX bytes of the response body.';

COMMENT ON COLUMN webhook_queue.retry_0_error IS 'Attempt 0: what went wrong, in words; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_0_error_kind IS 'Attempt 0: the kind of its error, to count by; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_0_evidence IS 'Attempt 0: address (ip:port that was called), first_byte_ms, headers of the response (bounded), body_cut; each if it is known.';

COMMENT ON COLUMN webhook_queue.retry_1_started_at IS 'Attempt 1: when it began.';

COMMENT ON COLUMN webhook_queue.retry_1_completed_at IS 'Attempt 1: when it ended.';

COMMENT ON COLUMN webhook_queue.retry_1_duration_ms IS 'Attempt 1: time from connecting to the end of the response body, in milliseconds; NULL if unknown.';

COMMENT ON COLUMN webhook_queue.retry_1_http_status IS 'Attempt 1: status of the response; NULL if none came.';

COMMENT ON COLUMN webhook_queue.retry_1_response_body IS 'Attempt 1: first RESPONSE_BODY_MAX bytes of the response body.';

COMMENT ON COLUMN webhook_queue.retry_1_error IS 'Attempt 1: what went wrong, in words; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_1_error_kind IS 'Attempt 1: the kind of its error, to count by; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_1_evidence IS 'Attempt 1: address (ip:port that was called), first_byte_ms, headers of the response (bounded), body_cut; each if it is known.';

COMMENT ON COLUMN webhook_queue.retry_2_started_at IS 'Attempt 2: when it began.';

COMMENT ON COLUMN webhook_queue.retry_2_completed_at IS 'Attempt 2: when it ended.';

COMMENT ON COLUMN webhook_queue.retry_2_duration_ms IS 'Attempt 2: time from connecting to the end of the response body, in milliseconds; NULL if unknown.';

COMMENT ON COLUMN webhook_queue.retry_2_http_status IS 'Attempt 2: status of the response; NULL if none came.';

COMMENT ON COLUMN webhook_queue.retry_2_response_body IS 'Attempt 2: first RESPONSE_BODY_MAX bytes of the response body.';

COMMENT ON COLUMN webhook_queue.retry_2_error IS 'Attempt 2: what went wrong, in words; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_2_error_kind IS 'Attempt 2: the kind of its error, to count by; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_2_evidence IS 'Attempt 2: address (ip:port that was called), first_byte_ms, headers of the response (bounded), body_cut; each if it is known.';

COMMENT ON COLUMN webhook_queue.retry_3_started_at IS 'Attempt 3: when it began.';

COMMENT ON COLUMN webhook_queue.retry_3_completed_at IS 'Attempt 3: when it ended.';

COMMENT ON COLUMN webhook_queue.retry_3_duration_ms IS 'Attempt 3: time from connecting to the end of the response body, in milliseconds; NULL if unknown.';

COMMENT ON COLUMN webhook_queue.retry_3_http_status IS 'Attempt 3: status of the response; NULL if none came.';

COMMENT ON COLUMN webhook_queue.retry_3_response_body IS 'Attempt 3: first RESPONSE_BODY_MAX bytes of the response body.';

COMMENT ON COLUMN webhook_queue.retry_3_error IS 'Attempt 3: what went wrong, in words; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_3_error_kind IS 'Attempt 3: the kind of its error, to count by; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_3_evidence IS 'Attempt 3: address (ip:port that was called), first_byte_ms, headers of the response (bounded), body_cut; each if it is known.';

COMMENT ON COLUMN webhook_queue.retry_4_started_at IS 'Attempt 4: when it began.';

COMMENT ON COLUMN webhook_queue.retry_4_completed_at IS 'Attempt 4: when it ended.';

COMMENT ON COLUMN webhook_queue.retry_4_duration_ms IS 'Attempt 4: time from connecting to the end of the response body, in milliseconds; NULL if unknown.';

COMMENT ON COLUMN webhook_queue.retry_4_http_status IS 'Attempt 4: status of the response; NULL if none came.';

COMMENT ON COLUMN webhook_queue.retry_4_response_body IS 'Attempt 4: first RESPONSE_BODY_MAX bytes of the response body.';

COMMENT ON COLUMN webhook_queue.retry_4_error IS 'Attempt 4: what went wrong, in words; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_4_error_kind IS 'Attempt 4: the kind of its error, to count by; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_4_evidence IS 'Attempt 4: address (ip:port that was called), first_byte_ms, headers of the response (bounded), body_cut; each if it is known.';

COMMENT ON COLUMN webhook_queue.retry_5_started_at IS 'Attempt 5: when it began.';

COMMENT ON COLUMN webhook_queue.retry_5_completed_at IS 'Attempt 5: when it ended.';

COMMENT ON COLUMN webhook_queue.retry_5_duration_ms IS 'Attempt 5: time from connecting to the end of the response body, in milliseconds; NULL if unknown.';

COMMENT ON COLUMN webhook_queue.retry_5_http_status IS 'Attempt 5: status of the response; NULL if none came.';

COMMENT ON COLUMN webhook_queue.retry_5_response_body IS 'Attempt 5: first RESPONSE_BODY_MAX bytes of the response body.';

COMMENT ON COLUMN webhook_queue.retry_5_error IS 'Attempt 5: what went wrong, in words; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_5_error_kind IS 'Attempt 5: the kind of its error, to count by; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_5_evidence IS 'Attempt 5: address (ip:port that was called), first_byte_ms, headers of the response (bounded), body_cut; each if it is known.';

COMMENT ON COLUMN webhook_queue.retry_6_started_at IS 'Attempt 6: when it began.';

COMMENT ON COLUMN webhook_queue.retry_6_completed_at IS 'Attempt 6: when it ended.';

COMMENT ON COLUMN webhook_queue.retry_6_duration_ms IS 'Attempt 6: time from connecting to the end of the response body, in milliseconds; NULL if unknown.';

COMMENT ON COLUMN webhook_queue.retry_6_http_status IS 'Attempt 6: status of the response; NULL if none came.';

COMMENT ON COLUMN webhook_queue.retry_6_response_body IS 'Attempt 6: first RESPONSE_BODY_MAX bytes of the response body.';

COMMENT ON COLUMN webhook_queue.retry_6_error IS 'Attempt 6: what went wrong, in words; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_6_error_kind IS 'Attempt 6: the kind of its error, to count by; NULL if nothing went wrong.';

COMMENT ON COLUMN webhook_queue.retry_6_evidence IS 'Attempt 6: address (ip:port that was called), first_byte_ms, headers of the response (bounded), body_cut; each if it is known.';
