-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- The delivery to probe an open circuit with, near the front of the line. Preferred is one that has used up no attempt and goes
-- to a URL that the endpoint still has; otherwise any that goes to such a URL. A delivery that its receiver never accepts, or
-- one that goes elsewhere, must not keep the circuit open. NULL: there is no such delivery, and any other will do.
CREATE OR REPLACE FUNCTION webhook_fresh_probe(p_config_id bigint, p_priority integer)
 RETURNS uuid
 LANGUAGE sql
 STABLE
 SET enable_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET jit TO 'off'
RETURN (WITH candidates AS MATERIALIZED (SELECT front.queue_id, front.retry_count FROM ((SELECT q.queue_id, q.retry_count, q.webhook_url FROM webhook_queue_open q WHERE ((q.ready_since IS NOT NULL) AND (q.priority = webhook_fresh_probe.p_priority) AND (q.config_id = webhook_fresh_probe.p_config_id) AND (q.status = 'pending'::text)) ORDER BY q.ready_since LIMIT 1000) front CROSS JOIN webhook_configs c) WHERE ((c.id = webhook_fresh_probe.p_config_id) AND (webhook_is_at(front.webhook_url, c.postback_url) OR webhook_is_at(front.webhook_url, c.chargeback_url)))) SELECT COALESCE((SELECT candidates.queue_id FROM candidates WHERE (candidates.retry_count = 0) LIMIT 1), (SELECT candidates.queue_id FROM candidates LIMIT 1)) AS "coalesce");

COMMENT ON FUNCTION webhook_fresh_probe IS 'The best delivery to probe an open circuit with.';
