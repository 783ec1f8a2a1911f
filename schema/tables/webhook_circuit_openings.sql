-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE TABLE webhook_circuit_openings (
    id bigint NOT NULL,
    config_id bigint NOT NULL,
    opened_at timestamp with time zone NOT NULL,
    reason text NOT NULL,
    closed_at timestamp with time zone
);

COMMENT ON TABLE webhook_circuit_openings IS 'When the circuits of endpoints were open, and why.';

COMMENT ON COLUMN webhook_circuit_openings.id IS 'A sequence number.';

COMMENT ON COLUMN webhook_circuit_openings.config_id IS 'The endpoint.';

COMMENT ON COLUMN webhook_circuit_openings.opened_at IS 'When the circuit opened.';

COMMENT ON COLUMN webhook_circuit_openings.reason IS 'Why the circuit opened.';

COMMENT ON COLUMN webhook_circuit_openings.closed_at IS 'When the circuit closed again; NULL: it is still open.';

ALTER TABLE webhook_circuit_openings ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME webhook_circuit_openings_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

ALTER TABLE ONLY webhook_circuit_openings
    ADD CONSTRAINT webhook_circuit_openings_pkey PRIMARY KEY (id);

CREATE INDEX webhook_circuit_openings_config ON webhook_circuit_openings USING btree (config_id, opened_at);
