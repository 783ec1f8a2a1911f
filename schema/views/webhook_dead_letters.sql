-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE VIEW webhook_dead_letters AS
 SELECT q.queue_id,
    q.config_id,
    c.name AS config_name,
    q.event_type,
    q.event_id,
    q.webhook_url,
    q.url_params,
    q.correlation_id,
    q.retry_count,
    q.status_reason,
    q.created_at,
    q.completed_at,
    a.http_status AS last_http_status,
    a.error AS last_error,
    a.error_kind AS last_error_kind
   FROM ((webhook_queue q
     JOIN webhook_configs c ON ((c.id = q.config_id)))
     CROSS JOIN LATERAL ( VALUES (0,q.retry_0_http_status,q.retry_0_error,q.retry_0_error_kind), (1,q.retry_1_http_status,q.retry_1_error,q.retry_1_error_kind), (2,q.retry_2_http_status,q.retry_2_error,q.retry_2_error_kind), (3,q.retry_3_http_status,q.retry_3_error,q.retry_3_error_kind), (4,q.retry_4_http_status,q.retry_4_error,q.retry_4_error_kind), (5,q.retry_5_http_status,q.retry_5_error,q.retry_5_error_kind), (6,q.retry_6_http_status,q.retry_6_error,q.retry_6_error_kind)) a(attempt, http_status, error, error_kind))
  WHERE ((q.status = 'failed'::text) AND (q.completed_at IS NOT NULL) AND (a.attempt = q.retry_count));

COMMENT ON VIEW webhook_dead_letters IS 'Failed deliveries with their last attempt. They are not attempted again unless someone replays them.';
