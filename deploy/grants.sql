-- What the role webhook_service may do. Run it as webhook_migrations after each migration, before new processes start:
--
--   DATABASE_URL=postgres://webhook_migrations:…@host/webhooks webhook-processor migrate
--   psql 'postgres://webhook_migrations:…@host/webhooks' -f deploy/grants.sql
--
-- The service may add a terminal delivery to an archive, and read it. It may not change or delete one: UPDATE and DELETE are
-- granted on the partition of open deliveries, and not on webhook_queue, through which archives could be reached.

GRANT SELECT ON
  _sqlx_migrations, webhook_configs, webhook_circuit_openings, webhook_limit_states, webhook_event_keys, webhook_queue,
  webhook_queue_open, webhook_probes, webhook_statistics, webhook_statistics_progress, webhook_retired_archives,
  webhook_write_checks, webhook_archives, webhook_attempts, webhook_dead_letters, webhook_holds, webhook_api_keys, webhook_operator_actions
TO webhook_service;

GRANT INSERT ON webhook_queue TO webhook_service;
GRANT USAGE ON SEQUENCE webhook_queue_id_seq TO webhook_service;
GRANT INSERT, UPDATE, DELETE ON webhook_queue_open TO webhook_service;
GRANT INSERT, UPDATE ON webhook_configs, webhook_circuit_openings, webhook_limit_states, webhook_event_keys TO webhook_service;
GRANT INSERT, UPDATE ON webhook_api_keys TO webhook_service;
-- The record of what operators changed only grows.
GRANT INSERT ON webhook_operator_actions TO webhook_service;
GRANT INSERT, DELETE ON webhook_probes TO webhook_service;
GRANT INSERT, DELETE, TRUNCATE ON webhook_write_checks TO webhook_service;

-- Archives and statistics are looked after by functions of the owner.
GRANT EXECUTE ON FUNCTION
  webhook_ensure_archives, webhook_index_closed_archive, webhook_summarize_archives, webhook_retire_archives,
  webhook_forget_retired, webhook_count_statistics, webhook_coarsen_statistics, webhook_forget_statistics
TO webhook_service;
