-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Summarizes new rows of the archives in their BRIN indexes, so that counts read only what they need. An archive that is being
-- vacuumed is left for the next call: waiting for its lock would cancel the vacuum, which summarizes it too. Returns the number
-- of ranges.
CREATE OR REPLACE FUNCTION webhook_summarize_archives()
 RETURNS bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET "TimeZone" TO 'UTC'
 SET search_path TO 'public', 'pg_temp'
AS $function$
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
END $function$;

COMMENT ON FUNCTION webhook_summarize_archives IS 'Lets counts of statistics skip what was counted before.';
