-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Deletes the keys and failed probes of the next p_limit deliveries of the oldest detached archive, and drops the archive when
-- none are left. Each call is a transaction; the next call, by any process, continues where it ended. Returns no row if nothing
-- is left to do or another process is doing it.
CREATE OR REPLACE FUNCTION webhook_forget_retired(p_limit integer)
 RETURNS TABLE(archive text, keys bigint, dropped boolean)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET lock_timeout TO '250ms'
 SET enable_seqscan TO 'off'
 SET enable_hashjoin TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET search_path TO 'public', 'pg_temp'
AS $function$
#variable_conflict use_column
DECLARE
  retired webhook_retired_archives;
  last uuid;
  keys_forgotten bigint;
BEGIN
  IF NOT pg_try_advisory_xact_lock(hashtextextended('webhook_retired_archives', 0)) THEN RETURN; END IF;
  SELECT r.* INTO retired FROM webhook_retired_archives r WHERE r.dropped_at IS NULL ORDER BY r.archive LIMIT 1;
  IF NOT FOUND THEN RETURN; END IF;
  -- the archive may have been dropped or attached again by hand
  IF to_regclass(retired.archive) IS NOT NULL AND NOT EXISTS (SELECT FROM webhook_archives a WHERE a.archive = retired.archive) THEN
    EXECUTE format($step$
      WITH batch AS MATERIALIZED (
        SELECT q.queue_id, q.config_id, q.event_type, q.event_id FROM %I q
        WHERE q.queue_id > $1 ORDER BY q.queue_id LIMIT $2
      ), repeated AS MATERIALIZED (
        SELECT b.queue_id, k.queue_id AS replay, k.cancelled_at FROM batch b
        JOIN webhook_event_keys k ON k.event_id = b.queue_id::text AND k.event_type = 'replay' AND k.config_id = b.config_id
        WHERE EXISTS (SELECT FROM webhook_queue q WHERE q.queue_id = k.queue_id)
      ), handed_on AS (
        UPDATE webhook_event_keys k SET queue_id = r.replay, cancelled_at = r.cancelled_at FROM batch b JOIN repeated r ON r.queue_id = b.queue_id
        WHERE k.event_id = b.event_id AND k.event_type = b.event_type AND k.config_id = b.config_id AND k.queue_id = b.queue_id
      ), events AS (
        DELETE FROM webhook_event_keys k USING batch b
        WHERE k.event_id = b.event_id AND k.event_type = b.event_type AND k.config_id = b.config_id AND k.queue_id = b.queue_id
          AND NOT EXISTS (SELECT FROM repeated r WHERE r.queue_id = b.queue_id)
        RETURNING 1
      ), replays AS (
        DELETE FROM webhook_event_keys k USING batch b
        WHERE k.event_id = b.queue_id::text AND k.event_type = 'replay' AND k.config_id = b.config_id
        RETURNING 1
      ), probes AS (
        DELETE FROM webhook_probes p USING batch b WHERE p.queue_id = b.queue_id
      )
      SELECT (SELECT b.queue_id FROM batch b ORDER BY b.queue_id DESC LIMIT 1),
             (SELECT count(*) FROM events) + (SELECT count(*) FROM replays)
      $step$, retired.archive)
    INTO last, keys_forgotten
    USING coalesce(retired.forgotten_upto, '00000000-0000-0000-0000-000000000000'), p_limit;
    IF last IS NOT NULL THEN
      UPDATE webhook_retired_archives r SET forgotten_upto = last WHERE r.archive = retired.archive;
      RETURN QUERY SELECT retired.archive, keys_forgotten, false;
      RETURN;
    END IF;
    -- outages that ended before that day are also past the retention
    DELETE FROM webhook_circuit_openings o WHERE o.closed_at < to_date(right(retired.archive, 8), 'YYYYMMDD')::timestamptz;
    EXECUTE format('DROP TABLE %I', retired.archive);
  END IF;
  UPDATE webhook_retired_archives r SET dropped_at = now() WHERE r.archive = retired.archive;
  RETURN QUERY SELECT retired.archive, 0::bigint, true;
END $function$;

COMMENT ON FUNCTION webhook_forget_retired IS 'Retention: deletes, step by step, the keys and failed probes of detached archives, and then drops the archives.';
