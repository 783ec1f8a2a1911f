-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Ensures that there is an archive for today and for each of the next p_days days (UTC). A process that cannot get the lock soon
-- gives up and tries again later, because waiting would queue every claim behind a long-running reader.
-- Archives are summarized by the count of statistics, which needs the summaries, not by autovacuum.
CREATE OR REPLACE FUNCTION webhook_ensure_archives(p_days integer)
 RETURNS integer
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET lock_timeout TO '250ms'
 SET "TimeZone" TO 'UTC'
 SET search_path TO 'public', 'pg_temp'
AS $function$
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
END $function$;

COMMENT ON FUNCTION webhook_ensure_archives IS 'Creates missing archives for today and the days ahead.';
