-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Detaches the archives whose whole day lies before now() - p_retention, oldest first, and returns their names. All processes
-- together detach at most p_per_hour archives per hour: a clock that is months ahead, or a mistyped retention, must not cost the
-- whole history before someone notices. Whatever the caller says, a day is kept, and at most four are detached per hour: a
-- stolen password of a service must not cost the history either.
CREATE OR REPLACE FUNCTION webhook_retire_archives(p_retention interval, p_per_hour integer)
 RETURNS SETOF text
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET lock_timeout TO '250ms'
 SET "TimeZone" TO 'UTC'
 SET search_path TO 'public', 'pg_temp'
AS $function$
DECLARE
  old text;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('webhook_queue archives', 0));
  FOR old IN
    SELECT a.archive FROM webhook_archives a
    WHERE (a.archive_day + 1)::timestamptz <= now() - greatest(p_retention, interval '1 day')
    ORDER BY a.archive_day
    LIMIT greatest(0, least(p_per_hour, 4) - (SELECT count(*) FROM webhook_retired_archives r
                                    WHERE r.retired_at BETWEEN now() - interval '1 hour' AND now()))
  LOOP
    EXECUTE format('ALTER TABLE webhook_queue DETACH PARTITION %I', old);
    INSERT INTO webhook_retired_archives AS r (archive) VALUES (old)
    ON CONFLICT (archive) DO UPDATE SET retired_at = now(), forgotten_upto = NULL, dropped_at = NULL;
    RETURN NEXT old;
  END LOOP;
END $function$;

COMMENT ON FUNCTION webhook_retire_archives IS 'Retention: detaches old archives, a few per hour.';
