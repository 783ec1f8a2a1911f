-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE TABLE webhook_statistics_progress (
    only_row boolean DEFAULT true NOT NULL,
    counted_before bigint NOT NULL,
    counted_at timestamp with time zone NOT NULL,
    CONSTRAINT webhook_statistics_progress_only_row_check CHECK (only_row)
);

COMMENT ON TABLE webhook_statistics_progress IS 'Which deliveries webhook_statistics has counted.';

COMMENT ON COLUMN webhook_statistics_progress.only_row IS 'There is one row.';

COMMENT ON COLUMN webhook_statistics_progress.counted_before IS 'Deliveries settled in an earlier transaction than this one are counted.';

COMMENT ON COLUMN webhook_statistics_progress.counted_at IS 'When the latest counted delivery ended, but not later than the time of the count.';

ALTER TABLE ONLY webhook_statistics_progress
    ADD CONSTRAINT webhook_statistics_progress_pkey PRIMARY KEY (only_row);
