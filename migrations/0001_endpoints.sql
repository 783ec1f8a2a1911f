-- The endpoints, with the state of their circuits and limits. Claims enforce circuits and limits when they choose deliveries, so
-- a held delivery costs nothing and uses up no attempt.

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
  max_in_flight int,
  rate_limit_per_second int,
  circuit_failure_rate double precision DEFAULT 0.8,
  circuit_window_ms int NOT NULL DEFAULT 60000,
  circuit_attempts_min int NOT NULL DEFAULT 20,
  circuit_failures_in_row int DEFAULT 5,
  circuit_cooldown_ms int NOT NULL DEFAULT 5000,
  circuit_cooldown_cap_ms int NOT NULL DEFAULT 300000,
  circuit_state text NOT NULL DEFAULT 'closed',
  circuit_reason text,
  circuit_probe_error text,
  circuit_changed_at timestamptz,
  circuit_probe_at timestamptz,
  circuit_failed_probes int NOT NULL DEFAULT 0,
  enabled boolean NOT NULL DEFAULT true,
  disabled_reason text,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  deleted_at timestamptz,
  cleared_at timestamptz,
  CONSTRAINT "an endpoint has a name" CHECK (name <> ''),
  CONSTRAINT "an endpoint has a postback or a chargeback URL" CHECK (num_nonnulls(postback_url, chargeback_url) > 0),
  CONSTRAINT "headers are an object" CHECK (jsonb_typeof(headers) = 'object'),
  CONSTRAINT "an attempt takes from 1 ms to 5 min" CHECK (timeout_ms BETWEEN 1 AND 300000),
  CONSTRAINT "there are at most 6 retries" CHECK (max_retries BETWEEN 0 AND 6),
  CONSTRAINT "a retry waits from 1 ms to 1 day" CHECK (1 <= retry_base_ms AND retry_base_ms <= retry_cap_ms AND retry_cap_ms <= 86400000),
  CONSTRAINT "jitter is a share below 1" CHECK (0 <= retry_jitter AND retry_jitter < 1),
  CONSTRAINT "priority is from 0, critical, to 3, low" CHECK (priority BETWEEN 0 AND 3),
  CONSTRAINT "only a disabled endpoint has a reason for it" CHECK (disabled_reason IS NULL OR NOT enabled),
  CONSTRAINT "a deleted endpoint is disabled" CHECK (deleted_at IS NULL OR NOT enabled),
  CONSTRAINT "at most 1 to 10,000 attempts are in flight" CHECK (max_in_flight BETWEEN 1 AND 10000),
  CONSTRAINT "a rate is limited to 1 to 100,000 per second" CHECK (rate_limit_per_second BETWEEN 1 AND 100000),
  CONSTRAINT "a circuit opens at a share of failures" CHECK (0 < circuit_failure_rate AND circuit_failure_rate <= 1),
  CONSTRAINT "a circuit looks back 1 s to 1 h" CHECK (circuit_window_ms BETWEEN 1000 AND 3600000),
  CONSTRAINT "a circuit needs 1 to 10,000 attempts" CHECK (circuit_attempts_min BETWEEN 1 AND 10000),
  CONSTRAINT "a circuit opens after 1 to 10,000 failures in a row" CHECK (circuit_failures_in_row BETWEEN 1 AND 10000),
  CONSTRAINT "a circuit cools down for 100 ms to 1 day"
    CHECK (100 <= circuit_cooldown_ms AND circuit_cooldown_ms <= circuit_cooldown_cap_ms AND circuit_cooldown_cap_ms <= 86400000),
  CONSTRAINT "a circuit is closed, open or half open" CHECK (circuit_state IN ('closed', 'open', 'half_open')),
  CONSTRAINT "a circuit that is not closed, and no other, has a reason" CHECK ((circuit_state = 'closed') = (circuit_reason IS NULL)),
  CONSTRAINT "a closed circuit is not probed, a half-open one is"
    CHECK (CASE circuit_state WHEN 'closed' THEN circuit_probe_at IS NULL WHEN 'half_open' THEN circuit_probe_at IS NOT NULL ELSE true END)
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

-- Deleted endpoints that may still have open deliveries, such as one accepted at the moment of the deletion.
CREATE INDEX webhook_configs_uncleared ON webhook_configs (deleted_at) WHERE deleted_at IS NOT NULL AND cleared_at IS NULL;

CREATE INDEX webhook_configs_circuit ON webhook_configs (id) WHERE circuit_state <> 'closed';

CREATE TABLE webhook_circuit_openings (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  config_id bigint NOT NULL,
  opened_at timestamptz NOT NULL,
  reason text NOT NULL,
  closed_at timestamptz
);
COMMENT ON TABLE webhook_circuit_openings IS 'When the circuits of endpoints were open, and why.';
COMMENT ON COLUMN webhook_circuit_openings.id IS 'A sequence number.';
COMMENT ON COLUMN webhook_circuit_openings.config_id IS 'The endpoint.';
COMMENT ON COLUMN webhook_circuit_openings.opened_at IS 'When the circuit opened.';
COMMENT ON COLUMN webhook_circuit_openings.reason IS 'Why the circuit opened.';
COMMENT ON COLUMN webhook_circuit_openings.closed_at IS 'When the circuit closed again; NULL: it is still open.';

CREATE INDEX webhook_circuit_openings_config ON webhook_circuit_openings (config_id, opened_at);

-- Whether a delivery's URL is an endpoint's URL, with or without parameters added to its query. NULL if the endpoint has no URL.
CREATE FUNCTION webhook_is_at(p_delivery_url text, p_endpoint_url text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN split_part(p_delivery_url, '#', 1) = split_part(p_endpoint_url, '#', 1)
    OR starts_with(p_delivery_url, split_part(p_endpoint_url, '#', 1)
                                   || CASE WHEN strpos(split_part(p_endpoint_url, '#', 1), '?') = 0 THEN '?'
                                           WHEN right(split_part(p_endpoint_url, '#', 1), 1) IN ('?', '&') THEN '' ELSE '&' END);
COMMENT ON FUNCTION webhook_is_at IS 'Whether a delivery goes to this URL of an endpoint.';

-- A trigger, so that every statement that opens or closes a circuit is recorded. Probes do not fire it.
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
COMMENT ON FUNCTION webhook_note_circuit_opening IS 'Records when a circuit opens and closes.';

CREATE TRIGGER webhook_configs_circuit AFTER UPDATE OF circuit_state ON webhook_configs
  FOR EACH ROW WHEN ((OLD.circuit_state = 'closed') <> (NEW.circuit_state = 'closed'))
  EXECUTE FUNCTION webhook_note_circuit_opening();

-- What claims remember about endpoints with limits. UNLOGGED, because it is rebuilt after a crash.
CREATE UNLOGGED TABLE webhook_limit_states (
  config_id bigint PRIMARY KEY,
  config_revision timestamptz NOT NULL,
  next_start_at timestamptz NOT NULL,
  claimed_upto timestamptz[] NOT NULL
) WITH (fillfactor = 50);
COMMENT ON TABLE webhook_limit_states IS 'What claims remember about endpoints with limits. A missing row is created again.';
COMMENT ON COLUMN webhook_limit_states.config_id IS 'The endpoint.';
COMMENT ON COLUMN webhook_limit_states.config_revision IS 'The revision (updated_at) of the endpoint that this row is valid for.';
COMMENT ON COLUMN webhook_limit_states.next_start_at IS 'When the next attempt may begin; the one after it begins 1 / rate_limit_per_second later.';
COMMENT ON COLUMN webhook_limit_states.claimed_upto IS 'Per priority, the latest ready_since that was claimed: no delivery in flight has a later one.';
