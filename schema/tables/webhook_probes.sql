-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Failed probes are numbered, so that their count is still known after all but the newest 100 of a delivery are removed.
CREATE TABLE webhook_probes (
    id bigint NOT NULL,
    queue_id uuid NOT NULL,
    number integer NOT NULL,
    attempt smallint NOT NULL,
    started_at timestamp with time zone NOT NULL,
    completed_at timestamp with time zone NOT NULL,
    duration_ms integer,
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

ALTER TABLE webhook_probes ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME webhook_probes_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

ALTER TABLE ONLY webhook_probes
    ADD CONSTRAINT webhook_probes_pkey PRIMARY KEY (id);

CREATE INDEX webhook_probes_number ON webhook_probes USING btree (queue_id, number);
