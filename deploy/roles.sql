-- Two roles for webhook-processor: one owns the tables and migrates them, one runs the service and owns nothing.
--
-- Run it once as a superuser, in the database of the program, before the first migration:
--
--   psql -d webhooks -f deploy/roles.sql
--
-- Then give both a password (\password webhook_migrations, \password webhook_service), migrate, and run deploy/grants.sql.
-- It may be run again.

DO $$
DECLARE
  wanted text;
BEGIN
  FOREACH wanted IN ARRAY ARRAY['webhook_migrations', 'webhook_service'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
      EXECUTE format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION', wanted);
    END IF;
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), wanted);
  END LOOP;
  EXECUTE format('REVOKE CONNECT, TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
END $$;

-- Nobody else may put a table or a function where the program looks for its own.
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO webhook_migrations;
GRANT USAGE ON SCHEMA public TO webhook_service;
