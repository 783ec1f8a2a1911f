-- Archives are summarized by the count of statistics, which needs it. Left to autovacuum it came a minute late: until then
-- each count read all that was new once more; and a busy queue filled the server's log with requests that found no room.

CREATE OR REPLACE FUNCTION webhook_ensure_archives(p_days int) RETURNS int
LANGUAGE plpgsql
SET lock_timeout = '250ms'
SET timezone = 'UTC'
AS $$
DECLARE
  archive_day date;
  archive text;
  created int := 0;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('webhook_queue archives', 0));
  FOR archive_day IN SELECT generate_series(current_date, current_date + p_days, interval '1 day') LOOP
    archive := 'webhook_queue_archive_' || to_char(archive_day, 'YYYYMMDD');
    CONTINUE WHEN to_regclass(archive) IS NOT NULL;
    EXECUTE format('CREATE TABLE %I PARTITION OF webhook_queue (PRIMARY KEY (queue_id)) FOR VALUES FROM (%L) TO (%L)',
                   archive, archive_day::timestamptz, (archive_day + 1)::timestamptz);
    EXECUTE format('CREATE INDEX %I ON %I USING brin (settled_in) WITH (pages_per_range = 64)', archive || '_settled_in', archive);
    EXECUTE format('CREATE INDEX %I ON %I (queue_id) WHERE status = ''failed''', archive || '_failed', archive);
    EXECUTE format('COMMENT ON TABLE %I IS %L', archive, 'Deliveries that became terminal on ' || archive_day || ' (UTC).');
    created := created + 1;
  END LOOP;
  RETURN created;
END $$;

DO $$
DECLARE
  known record;
BEGIN
  FOR known IN SELECT a.archive FROM webhook_archives a LOOP
    EXECUTE format('ALTER INDEX %I SET (autosummarize = off)', known.archive || '_settled_in');
  END LOOP;
END $$;

-- Summarizes what has been settled lately, so that counts need not read it again. An archive that is being vacuumed is left
-- for the next time: to wait for its lock would cancel the vacuum, which summarizes it too. Answers how many ranges.
CREATE FUNCTION webhook_summarize_archives() RETURNS bigint
LANGUAGE plpgsql
SET timezone = 'UTC'
AS $$
DECLARE
  written record;
  summarized bigint := 0;
BEGIN
  FOR written IN SELECT a.archive FROM webhook_archives a WHERE a.archive_day BETWEEN current_date - 1 AND current_date LOOP
    BEGIN
      EXECUTE format('LOCK TABLE %I IN SHARE UPDATE EXCLUSIVE MODE NOWAIT', written.archive);
      summarized := summarized + brin_summarize_new_values((written.archive || '_settled_in')::regclass);
    EXCEPTION WHEN lock_not_available THEN NULL;
    END;
  END LOOP;
  RETURN summarized;
END $$;
COMMENT ON FUNCTION webhook_summarize_archives IS 'Lets counts of statistics pass over what was counted.';
