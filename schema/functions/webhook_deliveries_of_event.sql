-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- The deliveries of an event, with their replays and the replays of these. The caller checks that each row has the event's id,
-- because the id of an event may equal the id of another delivery.
-- The cast to uuid is inside a CASE. In an AND, PostgreSQL could evaluate it before the condition that guards it, and version
-- 18 does.
CREATE OR REPLACE FUNCTION webhook_deliveries_of_event(p_event_id text)
 RETURNS SETOF uuid
 LANGUAGE sql
 STABLE
 SET enable_seqscan TO 'off'
 SET jit TO 'off'
AS $function$
  WITH RECURSIVE of_event AS (
    SELECT k.queue_id FROM webhook_event_keys k WHERE k.event_id = p_event_id AND k.event_type <> 'replay'
    UNION
    -- an event that its caller did not name has the id of its delivery
    SELECT own.queue_id
    FROM (SELECT CASE WHEN p_event_id ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN p_event_id::uuid END AS queue_id) AS own
    WHERE own.queue_id IS NOT NULL
    UNION
    SELECT k.queue_id FROM of_event o JOIN webhook_event_keys k ON k.event_id = o.queue_id::text AND k.event_type = 'replay'
  )
  SELECT o.queue_id FROM of_event o
$function$;

COMMENT ON FUNCTION webhook_deliveries_of_event IS 'The deliveries of an event, with their replays, found without reading the history.';
