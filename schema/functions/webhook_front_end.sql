-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Where the front of a long line ends; NULL if the line is not long. Leased deliveries are in the front, because claims begin
-- there. So expired leases are found without a look at millions of waiting deliveries.
CREATE OR REPLACE FUNCTION webhook_front_end(p_config_id bigint, p_priority integer)
 RETURNS timestamp with time zone
 LANGUAGE sql
 STABLE
 SET enable_sort TO 'off'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET jit TO 'off'
RETURN (SELECT q.ready_since FROM webhook_queue_open q WHERE ((q.ready_since IS NOT NULL) AND (q.priority = webhook_front_end.p_priority) AND (q.config_id = webhook_front_end.p_config_id)) ORDER BY q.ready_since OFFSET 20000 LIMIT 1);

COMMENT ON FUNCTION webhook_front_end IS 'Where the front of an endpoint''s line of ready deliveries ends.';
