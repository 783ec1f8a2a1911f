-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Holds open rows only, so it stays small even with a long history. Because of the CHECK, an archive can be added without a
-- scan of this partition.
CREATE TABLE webhook_queue_open (
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
END))),
    CONSTRAINT "the open partition holds open deliveries" CHECK ((completed_at IS NULL))
)
WITH (fillfactor='40', autovacuum_vacuum_scale_factor='0.01', autovacuum_vacuum_threshold='5000', autovacuum_vacuum_cost_delay='0');

COMMENT ON TABLE webhook_queue_open IS 'The deliveries that may still be attempted.';

ALTER TABLE ONLY webhook_queue ATTACH PARTITION webhook_queue_open DEFAULT;

ALTER TABLE ONLY webhook_queue_open
    ADD CONSTRAINT webhook_queue_open_pkey PRIMARY KEY (queue_id);

CREATE INDEX webhook_queue_open_ready ON webhook_queue_open USING btree (priority, config_id, ready_since) WHERE (ready_since IS NOT NULL);

CREATE INDEX webhook_queue_open_scheduled ON webhook_queue_open USING btree (next_retry_at) WHERE (ready_since IS NULL);
