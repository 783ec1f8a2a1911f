-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- What claims remember about endpoints with limits. UNLOGGED, because it is rebuilt after a crash.
CREATE UNLOGGED TABLE webhook_limit_states (
    config_id bigint NOT NULL,
    config_revision timestamp with time zone NOT NULL,
    next_start_at timestamp with time zone NOT NULL,
    claimed_upto timestamp with time zone[] NOT NULL
)
WITH (fillfactor='50');

COMMENT ON TABLE webhook_limit_states IS 'What claims remember about endpoints with limits. A missing row is created again.';

COMMENT ON COLUMN webhook_limit_states.config_id IS 'The endpoint.';

COMMENT ON COLUMN webhook_limit_states.config_revision IS 'The revision (updated_at) of the endpoint that this row is valid for.';

COMMENT ON COLUMN webhook_limit_states.next_start_at IS 'When the next attempt may begin; the one after it begins 1 / rate_limit_per_second later.';

COMMENT ON COLUMN webhook_limit_states.claimed_upto IS 'Per priority, the latest ready_since that was claimed: no delivery in flight has a later one.';

ALTER TABLE ONLY webhook_limit_states
    ADD CONSTRAINT webhook_limit_states_pkey PRIMARY KEY (config_id);
