-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Merges minutes older than 3 hours into hours, and hours older than 3 days into days. Returns how many rows it merged.
CREATE OR REPLACE FUNCTION webhook_coarsen_statistics()
 RETURNS bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET "TimeZone" TO 'UTC'
 SET search_path TO 'public', 'pg_temp'
AS $function$
DECLARE
  merged bigint := 0;
  step bigint;
  unit text;
  before timestamptz;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('webhook_statistics', 0));
  FOR unit, before IN VALUES ('hour', date_trunc('hour', now() - interval '3 hours')), ('day', date_trunc('day', now() - interval '3 days')) LOOP
    WITH fine AS (
      DELETE FROM webhook_statistics s
      WHERE s.period_start < before AND s.period_start <> date_trunc(unit, s.period_start)
      RETURNING *
    ), added AS (
      INSERT INTO webhook_statistics AS s
      SELECT config_id, date_trunc(unit, period_start), fact, duration_ms, sum(occurrences), sum(duration_total_ms)
      FROM fine GROUP BY 1, 2, 3, 4
      ON CONFLICT (config_id, period_start, fact, duration_ms) DO UPDATE
      SET occurrences = s.occurrences + excluded.occurrences, duration_total_ms = s.duration_total_ms + excluded.duration_total_ms
    )
    SELECT count(*) INTO step FROM fine;
    merged := merged + step;
  END LOOP;
  RETURN merged;
END $function$;

COMMENT ON FUNCTION webhook_coarsen_statistics IS 'Merges old minutes into hours and old hours into days.';
