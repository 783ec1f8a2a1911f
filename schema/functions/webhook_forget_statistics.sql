-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Deletes the statistics of archives that no longer exist. Returns the number of rows. This is not part of the drop of an
-- archive, because that blocks all settles.
CREATE OR REPLACE FUNCTION webhook_forget_statistics()
 RETURNS bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET "TimeZone" TO 'UTC'
 SET search_path TO 'public', 'pg_temp'
AS $function$
DECLARE
  forgotten bigint;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('webhook_statistics', 0));
  DELETE FROM webhook_statistics
  WHERE period_start < (SELECT min(a.archive_day)::timestamptz FROM webhook_archives a);
  GET DIAGNOSTICS forgotten = ROW_COUNT;
  RETURN forgotten;
END $function$;

COMMENT ON FUNCTION webhook_forget_statistics IS 'Retention: deletes the statistics of dropped archives.';
