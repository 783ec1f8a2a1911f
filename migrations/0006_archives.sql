-- Archives of terminal deliveries, from the day that they are made for to the end of their retention.

CREATE VIEW webhook_archives AS
SELECT child.relname::text AS archive, to_date(right(child.relname, 8), 'YYYYMMDD') AS archive_day
FROM pg_inherits i
JOIN pg_class child ON child.oid = i.inhrelid
WHERE i.inhparent = 'webhook_queue'::regclass AND child.relname ~ '^webhook_queue_archive_\d{8}$';
COMMENT ON VIEW webhook_archives IS 'The archive partitions of webhook_queue and their days (UTC).';

-- Ensures that there is an archive for today and for each of the next p_days days (UTC). A process that cannot get the lock soon
-- gives up and tries again later, because waiting would queue every claim behind a long-running reader.
-- Archives are summarized by the count of statistics, which needs the summaries, not by autovacuum.
CREATE FUNCTION webhook_ensure_archives(p_days int) RETURNS int
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
COMMENT ON FUNCTION webhook_ensure_archives IS 'Creates missing archives for today and the days ahead.';

-- Adds the index for lists to one archive whose day is over. No settle pays for the index, because nothing is written to that
-- archive any more. Returns whether there was such an archive. Each archive has its own transaction, because a long one delays
-- the count of statistics.
CREATE FUNCTION webhook_index_closed_archive() RETURNS boolean
LANGUAGE plpgsql
SET lock_timeout = '250ms'
SET timezone = 'UTC'
AS $$
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
END $$;
COMMENT ON FUNCTION webhook_index_closed_archive IS 'Adds the indexes for lists to an archive whose day is over.';

-- Summarizes new rows of the archives in their BRIN indexes, so that counts read only what they need. An archive that is being
-- vacuumed is left for the next call: waiting for its lock would cancel the vacuum, which summarizes it too. Returns the number
-- of ranges.
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
COMMENT ON FUNCTION webhook_summarize_archives IS 'Lets counts of statistics skip what was counted before.';

-- Retention. Keys and failed probes are kept exactly as long as their delivery can be found. An event's key and the failed probes
-- go with the archive of their delivery. The key of a replay goes with the archive of the delivery that was replayed. After a
-- replay, the event's key belongs to the replay and is kept as long as that can be found. So nothing that can still be found,
-- replayed or sent is accepted a second time, and nothing is forgotten because of its age alone.
CREATE TABLE webhook_retired_archives (
  archive text PRIMARY KEY,
  retired_at timestamptz NOT NULL DEFAULT now(),
  forgotten_upto uuid,
  dropped_at timestamptz
);
COMMENT ON TABLE webhook_retired_archives IS 'Archives that are past the retention. They are detached first; then the keys and failed probes of their deliveries are deleted; then they are dropped.';
COMMENT ON COLUMN webhook_retired_archives.archive IS 'The name of the table.';
COMMENT ON COLUMN webhook_retired_archives.retired_at IS 'When it was detached. Since then, its deliveries are not found, replayed or shown.';
COMMENT ON COLUMN webhook_retired_archives.forgotten_upto IS 'Up to this queue_id, the keys and failed probes of its deliveries are deleted; NULL: none are yet.';
COMMENT ON COLUMN webhook_retired_archives.dropped_at IS 'When the table was dropped; NULL: not yet.';

-- Detaches the archives whose whole day lies before now() - p_retention, oldest first, and returns their names. All processes
-- together detach at most p_per_hour archives per hour: a clock that is months ahead, or a mistyped retention, must not cost the
-- whole history before someone notices. Whatever the caller says, a day is kept, and at most four are detached per hour: a
-- stolen password of a service must not cost the history either.
CREATE FUNCTION webhook_retire_archives(p_retention interval, p_per_hour int) RETURNS SETOF text
LANGUAGE plpgsql
SET lock_timeout = '250ms'
SET timezone = 'UTC'
AS $$
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
END $$;
COMMENT ON FUNCTION webhook_retire_archives IS 'Retention: detaches old archives, a few per hour.';

-- Deletes the keys and failed probes of the next p_limit deliveries of the oldest detached archive, and drops the archive when
-- none are left. Each call is a transaction; the next call, by any process, continues where it ended. Returns no row if nothing
-- is left to do or another process is doing it.
CREATE FUNCTION webhook_forget_retired(p_limit int) RETURNS TABLE (archive text, keys bigint, dropped boolean)
LANGUAGE plpgsql
SET lock_timeout = '250ms'
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
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
END $$;
COMMENT ON FUNCTION webhook_forget_retired IS 'Retention: deletes, step by step, the keys and failed probes of detached archives, and then drops the archives.';
