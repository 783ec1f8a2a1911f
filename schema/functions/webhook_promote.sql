-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Makes scheduled deliveries ready when they are due, so that a claim never steps over a million future retries.
-- Returns the number of deliveries and the microseconds until the next one is due, NULL if none is scheduled.
CREATE OR REPLACE FUNCTION webhook_promote(p_limit integer)
 RETURNS TABLE(promoted bigint, next_due_us bigint)
 LANGUAGE plpgsql
 SET lock_timeout TO '10s'
 SET enable_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_hashjoin TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
BEGIN
  WITH due AS MATERIALIZED (
    SELECT q.queue_id FROM webhook_queue_open q
    WHERE q.ready_since IS NULL AND q.next_retry_at <= now()
    ORDER BY q.next_retry_at LIMIT p_limit FOR UPDATE SKIP LOCKED
  )
  UPDATE webhook_queue_open q SET ready_since = now(), updated_at = now()
  FROM due WHERE q.queue_id = due.queue_id;
  GET DIAGNOSTICS promoted = ROW_COUNT;
  next_due_us := (
    SELECT extract(epoch FROM q.next_retry_at - clock_timestamp()) * 1000000 FROM webhook_queue_open q
    WHERE q.ready_since IS NULL ORDER BY q.next_retry_at LIMIT 1)::bigint;
  RETURN NEXT;
END $function$;

COMMENT ON FUNCTION webhook_promote IS 'Makes scheduled deliveries ready when they are due.';
