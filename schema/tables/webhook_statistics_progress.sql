-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE TABLE webhook_statistics_progress (
    only_row boolean DEFAULT true NOT NULL,
    counted_before bigint NOT NULL,
    counted_at timestamp with time zone NOT NULL,
    CONSTRAINT webhook_statistics_progress_only_row_check CHECK (only_row)
);

COMMENT ON TABLE webhook_statistics_progress IS 'How far webhook_statistics has come.';

COMMENT ON COLUMN webhook_statistics_progress.only_row IS 'There is one row.';

COMMENT ON COLUMN webhook_statistics_progress.counted_before IS 'Deliveries settled in an earlier transaction than this one are counted.';

COMMENT ON COLUMN webhook_statistics_progress.counted_at IS 'When the latest of them ended, or now() where that was later.';

ALTER TABLE ONLY webhook_statistics_progress
    ADD CONSTRAINT webhook_statistics_progress_pkey PRIMARY KEY (only_row);
