-- Least privilege: a service may run as a role that owns nothing. What only the owner of the tables may do, and what changes
-- archives or statistics, is done for it by these functions as their owner. Only roles that were granted them may call them
-- (deploy/grants.sql). Their search_path is fixed, so a caller cannot put a table or an operator of its own in between.
-- CREATE OR REPLACE forgets both: whoever replaces one of them repeats the ALTER.
DO $$
DECLARE
  function_of_owner text;
BEGIN
  FOREACH function_of_owner IN ARRAY ARRAY[
    'webhook_ensure_archives(int)',
    'webhook_index_closed_archive()',
    'webhook_summarize_archives()',
    'webhook_retire_archives(interval, int)',
    'webhook_forget_retired(int)',
    'webhook_count_statistics(bigint, interval)',
    'webhook_coarsen_statistics()',
    'webhook_forget_statistics()'
  ] LOOP
    EXECUTE format('ALTER FUNCTION %s SECURITY DEFINER SET search_path = %I, pg_temp', function_of_owner, current_schema());
    EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', function_of_owner);
  END LOOP;
END $$;

-- Rewrites functions of the schema: for migrations only.
REVOKE EXECUTE ON FUNCTION webhook_write_settles FROM PUBLIC;
