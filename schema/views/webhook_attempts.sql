-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE VIEW webhook_attempts AS
 SELECT q.queue_id,
    q.config_id,
    q.event_type,
    q.event_id,
    q.webhook_url,
    q.status,
    q.created_at,
    a.attempt,
    a.started_at,
    a.completed_at,
    a.duration_ms,
    a.http_status,
    a.response_body,
    a.error,
    q.completed_at AS delivery_completed_at,
    a.probe,
    a.error_kind,
    (a.evidence ->> 'address'::text) AS remote_address,
    ((a.evidence ->> 'first_byte_ms'::text))::integer AS first_byte_ms,
    (a.evidence -> 'headers'::text) AS response_headers,
    ((a.evidence ->> 'body_cut'::text))::boolean AS body_cut
   FROM (webhook_queue q
     CROSS JOIN LATERAL ( SELECT made.column1,
            made.column2,
            made.column3,
            made.column4,
            made.column5,
            made.column6,
            made.column7,
            made.column8,
            made.column9,
            false AS "?column?"
           FROM ( VALUES (0,q.retry_0_started_at,q.retry_0_completed_at,q.retry_0_duration_ms,q.retry_0_http_status,q.retry_0_response_body,q.retry_0_error,q.retry_0_error_kind,q.retry_0_evidence), (1,q.retry_1_started_at,q.retry_1_completed_at,q.retry_1_duration_ms,q.retry_1_http_status,q.retry_1_response_body,q.retry_1_error,q.retry_1_error_kind,q.retry_1_evidence), (2,q.retry_2_started_at,q.retry_2_completed_at,q.retry_2_duration_ms,q.retry_2_http_status,q.retry_2_response_body,q.retry_2_error,q.retry_2_error_kind,q.retry_2_evidence), (3,q.retry_3_started_at,q.retry_3_completed_at,q.retry_3_duration_ms,q.retry_3_http_status,q.retry_3_response_body,q.retry_3_error,q.retry_3_error_kind,q.retry_3_evidence), (4,q.retry_4_started_at,q.retry_4_completed_at,q.retry_4_duration_ms,q.retry_4_http_status,q.retry_4_response_body,q.retry_4_error,q.retry_4_error_kind,q.retry_4_evidence), (5,q.retry_5_started_at,q.retry_5_completed_at,q.retry_5_duration_ms,q.retry_5_http_status,q.retry_5_response_body,q.retry_5_error,q.retry_5_error_kind,q.retry_5_evidence), (6,q.retry_6_started_at,q.retry_6_completed_at,q.retry_6_duration_ms,q.retry_6_http_status,q.retry_6_response_body,q.retry_6_error,q.retry_6_error_kind,q.retry_6_evidence)) made
        UNION ALL
         SELECT p.attempt,
            p.started_at,
            p.completed_at,
            p.duration_ms,
            p.http_status,
            p.response_body,
            p.error,
            p.error_kind,
            p.evidence,
            true
           FROM webhook_probes p
          WHERE (p.queue_id = q.queue_id)) a(attempt, started_at, completed_at, duration_ms, http_status, response_body, error, error_kind, evidence, probe))
  WHERE (a.started_at IS NOT NULL);

COMMENT ON VIEW webhook_attempts IS 'One row per attempt, including failed probes (probe): what was requested, when, and what the receiver answered. A condition on delivery_completed_at skips archives.';
