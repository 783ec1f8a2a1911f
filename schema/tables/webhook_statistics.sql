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

COMMENT ON TABLE webhook_statistics IS 'Counts of terminal deliveries and their attempts. webhook_statistics_progress shows which deliveries are counted.';

COMMENT ON COLUMN webhook_statistics.config_id IS 'The endpoint; 0 for all endpoints together.';

COMMENT ON COLUMN webhook_statistics.period_start IS 'The start of the period in which the deliveries became terminal.';

COMMENT ON COLUMN webhook_statistics.fact IS 'completed, failed or cancelled counts deliveries; attempt counts first attempts, retry counts later ones; error_ with a kind counts attempts with an error of this kind.';

COMMENT ON COLUMN webhook_statistics.duration_ms IS 'Duration of the attempts in milliseconds, to three significant digits; -1 if there is none.';

COMMENT ON COLUMN webhook_statistics.occurrences IS 'The number of deliveries or attempts.';

COMMENT ON COLUMN webhook_statistics.duration_total_ms IS 'Sum of the exact durations of the attempts.';

ALTER TABLE ONLY webhook_statistics
    ADD CONSTRAINT webhook_statistics_pkey PRIMARY KEY (config_id, period_start, fact, duration_ms);
