-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Cancels at most p_limit open deliveries of deleted endpoints. Leased deliveries are left until their lease ends.
CREATE OR REPLACE FUNCTION webhook_cancel_orphans(p_limit integer)
 RETURNS bigint
 LANGUAGE plpgsql
 SET jit TO 'off'
AS $function$
DECLARE
  gone CONSTANT bigint[] := ARRAY(SELECT c.id FROM webhook_configs c WHERE c.deleted_at IS NOT NULL AND c.cleared_at IS NULL);
  cancelled bigint;
BEGIN
  IF gone = '{}' THEN RETURN 0; END IF;
  SELECT count(*) INTO cancelled FROM webhook_cancel(ARRAY(
    SELECT q.queue_id FROM webhook_queue_open q
    WHERE q.config_id = ANY (gone) AND q.status = 'pending'
    LIMIT p_limit FOR UPDATE SKIP LOCKED), 'the config was deleted');
  IF cancelled = 0 THEN
    UPDATE webhook_configs c SET cleared_at = now()
    WHERE c.id = ANY (gone) AND c.deleted_at < now() - interval '1 minute'
      AND NOT EXISTS (SELECT FROM webhook_queue_open q WHERE q.config_id = c.id);
  END IF;
  RETURN cancelled;
END $function$;

COMMENT ON FUNCTION webhook_cancel_orphans IS 'Cancels open deliveries of deleted endpoints.';
