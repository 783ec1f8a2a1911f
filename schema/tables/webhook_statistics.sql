-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Facts about terminal deliveries and their attempts, counted by period. A recent period is a minute, an older one an hour, the
-- oldest ones are days. A fact is in one period only, so a sum over all periods from some time on is exact.
CREATE TABLE webhook_statistics (
    config_id bigint NOT NULL,
    period_start timestamp with time zone NOT NULL,
    fact text NOT NULL,
    duration_ms integer NOT NULL,
    occurrences bigint NOT NULL,
    duration_total_ms bigint NOT NULL,
    CONSTRAINT "a fact is a final status, a kind of attempt, or a kind of error" CHECK (((fact = ANY (ARRAY['completed'::text, 'failed'::text, 'cancelled'::text, 'attempt'::text, 'retry'::text])) OR starts_with(fact, 'error_'::text)))
);

COMMENT ON TABLE webhook_statistics IS 'Terminal deliveries and their attempts, counted. What is not counted yet is in the archives from webhook_statistics_progress on.';

COMMENT ON COLUMN webhook_statistics.config_id IS 'The endpoint; 0 for all together.';

COMMENT ON COLUMN webhook_statistics.period_start IS 'When the period began that the delivery became terminal in.';

COMMENT ON COLUMN webhook_statistics.fact IS 'completed, failed or cancelled: a delivery; attempt or retry: a first attempt or a later one; error_ and a kind: an attempt with an error of this kind.';

COMMENT ON COLUMN webhook_statistics.duration_ms IS 'Duration of those attempts, to three significant digits; -1 where there is none.';

COMMENT ON COLUMN webhook_statistics.occurrences IS 'How many.';

COMMENT ON COLUMN webhook_statistics.duration_total_ms IS 'Sum of their exact durations.';

ALTER TABLE ONLY webhook_statistics
    ADD CONSTRAINT webhook_statistics_pkey PRIMARY KEY (config_id, period_start, fact, duration_ms);
