-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Adds the index for lists to one archive whose day is over. No settle pays for the index, because nothing is written to that
-- archive any more. Returns whether there was such an archive. Each archive has its own transaction, because a long one delays
-- the count of statistics.
CREATE OR REPLACE FUNCTION webhook_index_closed_archive()
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET lock_timeout TO '250ms'
 SET "TimeZone" TO 'UTC'
 SET search_path TO 'public', 'pg_temp'
AS $function$
DECLARE
  closed text;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('webhook_queue archives', 0));
  SELECT a.archive INTO closed FROM webhook_archives a
  WHERE (a.archive_day + 1)::timestamptz + interval '1 hour' < now() AND to_regclass(a.archive || '_event_id') IS NULL
  ORDER BY a.archive_day LIMIT 1;
  IF closed IS NULL THEN RETURN false; END IF;
  EXECUTE format('CREATE INDEX %I ON %I (config_id, queue_id)', closed || '_config_id', closed);
  EXECUTE format('CREATE INDEX %I ON %I (event_id)', closed || '_event_id', closed);
  RETURN true;
END $function$;

COMMENT ON FUNCTION webhook_index_closed_archive IS 'Adds the indexes for lists to an archive whose day is over.';
