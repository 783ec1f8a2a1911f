-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Retention. Keys and failed probes are kept exactly as long as their delivery can be found. An event's key and the failed probes
-- go with the archive of their delivery. The key of a replay goes with the archive of the delivery that was replayed. After a
-- replay, the event's key belongs to the replay and is kept as long as that can be found. So nothing that can still be found,
-- replayed or sent is accepted a second time, and nothing is forgotten because of its age alone.
CREATE TABLE webhook_retired_archives (
    archive text NOT NULL,
    retired_at timestamp with time zone DEFAULT now() NOT NULL,
    forgotten_upto uuid,
    dropped_at timestamp with time zone
);

COMMENT ON TABLE webhook_retired_archives IS 'Archives that are past the retention. They are detached first; then the keys and failed probes of their deliveries are deleted; then they are dropped.';

COMMENT ON COLUMN webhook_retired_archives.archive IS 'The name of the table.';

COMMENT ON COLUMN webhook_retired_archives.retired_at IS 'When it was detached. Since then, its deliveries are not found, replayed or shown.';

COMMENT ON COLUMN webhook_retired_archives.forgotten_upto IS 'Up to this queue_id, the keys and failed probes of its deliveries are deleted; NULL: none are yet.';

COMMENT ON COLUMN webhook_retired_archives.dropped_at IS 'When the table was dropped; NULL: not yet.';

ALTER TABLE ONLY webhook_retired_archives
    ADD CONSTRAINT webhook_retired_archives_pkey PRIMARY KEY (archive);
