-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE TABLE webhook_event_keys (
    config_id bigint NOT NULL,
    event_type text NOT NULL,
    event_id text NOT NULL,
    queue_id uuid NOT NULL,
    remembered_at timestamp with time zone DEFAULT now() NOT NULL,
    cancelled_at timestamp with time zone
);

COMMENT ON TABLE webhook_event_keys IS 'The keys of events that callers named, so that the same event makes one delivery per endpoint, and of replays, so that a delivery is replayed once. It is a separate table, so that settles need not maintain its index.';

COMMENT ON COLUMN webhook_event_keys.config_id IS 'The endpoint.';

COMMENT ON COLUMN webhook_event_keys.event_type IS 'The event''s type, or `replay`.';

COMMENT ON COLUMN webhook_event_keys.event_id IS 'The event''s id, as the caller gave it; for a replay, the queue_id of the delivery that it repeats.';

COMMENT ON COLUMN webhook_event_keys.queue_id IS 'The delivery that the first enqueue made.';

COMMENT ON COLUMN webhook_event_keys.remembered_at IS 'When the key was stored. It is deleted with the archive of its delivery; the key of a replay with the archive of the delivery that was replayed.';

COMMENT ON COLUMN webhook_event_keys.cancelled_at IS 'When the delivery was cancelled. Anyone who sends the event again gets an error, because nothing will be delivered.';

ALTER TABLE ONLY webhook_event_keys
    ADD CONSTRAINT webhook_event_keys_pkey PRIMARY KEY (event_id, event_type, config_id);
