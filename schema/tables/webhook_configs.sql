-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE TABLE webhook_configs (
    id bigint NOT NULL,
    name text NOT NULL,
    postback_url text,
    chargeback_url text,
    headers jsonb DEFAULT '{}'::jsonb NOT NULL,
    timeout_ms integer DEFAULT 30000 NOT NULL,
    max_retries smallint DEFAULT 6 NOT NULL,
    retry_base_ms integer DEFAULT 1000 NOT NULL,
    retry_cap_ms integer DEFAULT 300000 NOT NULL,
    retry_jitter double precision DEFAULT 0.25 NOT NULL,
    priority smallint DEFAULT 2 NOT NULL,
    max_in_flight integer,
    rate_limit_per_second integer,
    circuit_failure_rate double precision DEFAULT 0.8,
    circuit_window_ms integer DEFAULT 60000 NOT NULL,
    circuit_attempts_min integer DEFAULT 20 NOT NULL,
    circuit_failures_in_row integer DEFAULT 5,
    circuit_cooldown_ms integer DEFAULT 5000 NOT NULL,
    circuit_cooldown_cap_ms integer DEFAULT 300000 NOT NULL,
    circuit_state text DEFAULT 'closed'::text NOT NULL,
    circuit_reason text,
    circuit_probe_error text,
    circuit_changed_at timestamp with time zone,
    circuit_probe_at timestamp with time zone,
    circuit_failed_probes integer DEFAULT 0 NOT NULL,
    enabled boolean DEFAULT true NOT NULL,
    disabled_reason text,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    deleted_at timestamp with time zone,
    cleared_at timestamp with time zone,
    CONSTRAINT "a circuit cools down for 100 ms to 1 day" CHECK (((100 <= circuit_cooldown_ms) AND (circuit_cooldown_ms <= circuit_cooldown_cap_ms) AND (circuit_cooldown_cap_ms <= 86400000))),
    CONSTRAINT "a circuit is closed, open or half open" CHECK ((circuit_state = ANY (ARRAY['closed'::text, 'open'::text, 'half_open'::text]))),
    CONSTRAINT "a circuit looks back 1 s to 1 h" CHECK (((circuit_window_ms >= 1000) AND (circuit_window_ms <= 3600000))),
    CONSTRAINT "a circuit needs 1 to 10,000 attempts" CHECK (((circuit_attempts_min >= 1) AND (circuit_attempts_min <= 10000))),
    CONSTRAINT "a circuit opens after 1 to 10,000 failures in a row" CHECK (((circuit_failures_in_row >= 1) AND (circuit_failures_in_row <= 10000))),
    CONSTRAINT "a circuit opens at a share of failures" CHECK ((((0)::double precision < circuit_failure_rate) AND (circuit_failure_rate <= (1)::double precision))),
    CONSTRAINT "a circuit that is not closed, and no other, has a reason" CHECK (((circuit_state = 'closed'::text) = (circuit_reason IS NULL))),
    CONSTRAINT "a closed circuit is not probed, a half-open one is" CHECK (
CASE circuit_state
    WHEN 'closed'::text THEN (circuit_probe_at IS NULL)
    WHEN 'half_open'::text THEN (circuit_probe_at IS NOT NULL)
    ELSE true
END),
    CONSTRAINT "a deleted endpoint is disabled" CHECK (((deleted_at IS NULL) OR (NOT enabled))),
    CONSTRAINT "a rate is limited to 1 to 100,000 per second" CHECK (((rate_limit_per_second >= 1) AND (rate_limit_per_second <= 100000))),
    CONSTRAINT "a retry waits from 1 ms to 1 day" CHECK (((1 <= retry_base_ms) AND (retry_base_ms <= retry_cap_ms) AND (retry_cap_ms <= 86400000))),
    CONSTRAINT "an attempt takes from 1 ms to 5 min" CHECK (((timeout_ms >= 1) AND (timeout_ms <= 300000))),
    CONSTRAINT "an endpoint has a name" CHECK ((name <> ''::text)),
    CONSTRAINT "an endpoint has a postback or a chargeback URL" CHECK ((num_nonnulls(postback_url, chargeback_url) > 0)),
    CONSTRAINT "at most 1 to 10,000 attempts are in flight" CHECK (((max_in_flight >= 1) AND (max_in_flight <= 10000))),
    CONSTRAINT "headers are an object" CHECK ((jsonb_typeof(headers) = 'object'::text)),
    CONSTRAINT "jitter is a share below 1" CHECK ((((0)::double precision <= retry_jitter) AND (retry_jitter < (1)::double precision))),
    CONSTRAINT "only a disabled endpoint has a reason for it" CHECK (((disabled_reason IS NULL) OR (NOT enabled))),
    CONSTRAINT "priority is from 0, critical, to 3, low" CHECK (((priority >= 0) AND (priority <= 3))),
    CONSTRAINT "there are at most 6 retries" CHECK (((max_retries >= 0) AND (max_retries <= 6)))
);

COMMENT ON TABLE webhook_configs IS 'Endpoints: where deliveries go, and how. Rows are never removed, so that the audit stays whole.';

COMMENT ON COLUMN webhook_configs.id IS 'Identifies the endpoint in the API and in webhook_queue.config_id.';

COMMENT ON COLUMN webhook_configs.name IS 'A name for people.';

COMMENT ON COLUMN webhook_configs.postback_url IS 'Where +credit events go; NULL: this endpoint accepts none.';

COMMENT ON COLUMN webhook_configs.chargeback_url IS 'Where -debit events go; NULL: this endpoint accepts none.';

COMMENT ON COLUMN webhook_configs.headers IS 'Request headers to send with each attempt, as an object of names and values. May hold credentials.';

COMMENT ON COLUMN webhook_configs.timeout_ms IS 'Time limit of one attempt, from connecting to the end of the response body, in milliseconds; HTTP_TIMEOUT is the upper bound.';

COMMENT ON COLUMN webhook_configs.max_retries IS 'Attempts after the first; copied to each delivery when it is accepted.';

COMMENT ON COLUMN webhook_configs.retry_base_ms IS 'Delay before the first retry, in milliseconds; it doubles for each further retry.';

COMMENT ON COLUMN webhook_configs.retry_cap_ms IS 'Upper bound of that delay before jitter, in milliseconds.';

COMMENT ON COLUMN webhook_configs.retry_jitter IS 'Share by which a delay is made longer or shorter at random, from 0 to below 1.';

COMMENT ON COLUMN webhook_configs.priority IS 'Priority of its deliveries if the event has none: 0 (critical) to 3 (low).';

COMMENT ON COLUMN webhook_configs.max_in_flight IS 'The most attempts under way at the same time, in all processes together; NULL: no limit.';

COMMENT ON COLUMN webhook_configs.rate_limit_per_second IS 'The most attempts that begin per second, in all processes together; NULL: no limit.';

COMMENT ON COLUMN webhook_configs.circuit_failure_rate IS 'The circuit opens at this share of failed attempts, above 0 and up to 1; NULL: the circuit opens only by hand.';

COMMENT ON COLUMN webhook_configs.circuit_window_ms IS 'The window in which attempts count for that share, in milliseconds.';

COMMENT ON COLUMN webhook_configs.circuit_attempts_min IS 'The fewest attempts in the window for that share to count.';

COMMENT ON COLUMN webhook_configs.circuit_failures_in_row IS 'With fewer attempts, the circuit opens after so many failures in a row; NULL: it does not.';

COMMENT ON COLUMN webhook_configs.circuit_cooldown_ms IS 'Time from the opening to the first probe, in milliseconds; it doubles after each failed probe.';

COMMENT ON COLUMN webhook_configs.circuit_cooldown_cap_ms IS 'Upper bound of that time, in milliseconds.';

COMMENT ON COLUMN webhook_configs.circuit_state IS 'closed: deliveries are attempted; open: they wait; half_open: one of them is attempted, as a probe.';

COMMENT ON COLUMN webhook_configs.circuit_reason IS 'Why the circuit opened.';

COMMENT ON COLUMN webhook_configs.circuit_probe_error IS 'How the last probe failed; NULL: none has failed since the circuit opened.';

COMMENT ON COLUMN webhook_configs.circuit_changed_at IS 'When the circuit last opened or closed; NULL: never. Probes do not change it.';

COMMENT ON COLUMN webhook_configs.circuit_probe_at IS 'When the next probe is due; while a probe is under way, when it counts as lost; NULL: no probe is sent.';

COMMENT ON COLUMN webhook_configs.circuit_failed_probes IS 'The number of probes that have failed since the circuit opened.';

COMMENT ON COLUMN webhook_configs.enabled IS 'False: deliveries are accepted and wait.';

COMMENT ON COLUMN webhook_configs.disabled_reason IS 'Why the service disabled it, for example after 410 Gone; NULL: the service did not.';

COMMENT ON COLUMN webhook_configs.created_at IS 'When the endpoint was registered.';

COMMENT ON COLUMN webhook_configs.updated_at IS 'When the endpoint last changed. It is the revision that an enqueue is checked against.';

COMMENT ON COLUMN webhook_configs.deleted_at IS 'When the endpoint was deleted; its open deliveries are cancelled soon after.';

COMMENT ON COLUMN webhook_configs.cleared_at IS 'When a deleted endpoint was found to have no open deliveries left.';

ALTER TABLE webhook_configs ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME webhook_configs_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

ALTER TABLE ONLY webhook_configs
    ADD CONSTRAINT webhook_configs_pkey PRIMARY KEY (id);

CREATE INDEX webhook_configs_circuit ON webhook_configs USING btree (id) WHERE (circuit_state <> 'closed'::text);

CREATE INDEX webhook_configs_uncleared ON webhook_configs USING btree (deleted_at) WHERE ((deleted_at IS NOT NULL) AND (cleared_at IS NULL));

CREATE TRIGGER webhook_configs_circuit AFTER UPDATE OF circuit_state ON webhook_configs FOR EACH ROW WHEN (((old.circuit_state = 'closed'::text) <> (new.circuit_state = 'closed'::text))) EXECUTE FUNCTION webhook_note_circuit_opening();
