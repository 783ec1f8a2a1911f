-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE OR REPLACE FUNCTION webhook_check_writes()
 RETURNS integer
 LANGUAGE plpgsql
 SET lock_timeout TO '2s'
AS $function$
BEGIN
    -- Deleted rows stay in the table until this truncates it.
    IF pg_total_relation_size('webhook_write_checks') > 8 * 1024 * 1024 THEN
        BEGIN
            LOCK TABLE webhook_write_checks IN ACCESS EXCLUSIVE MODE NOWAIT;
            TRUNCATE webhook_write_checks;
        EXCEPTION
            -- another process is checking at this moment
            WHEN lock_not_available THEN NULL;
        END;
    END IF;
    INSERT INTO webhook_write_checks (filler)
    SELECT string_agg(sha256(convert_to(n || clock_timestamp()::text, 'UTF8')), '')
    FROM generate_series(1, 512) AS n;
    DELETE FROM webhook_write_checks;
    RETURN pg_backend_pid();
END
$function$;

COMMENT ON FUNCTION webhook_check_writes IS 'Writes 16 KiB for which a file must grow, and deletes them again. The caller commits. Returns the process id of the session.';
