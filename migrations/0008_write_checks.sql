-- Write checks: only a write shows whether writes work. A full disk, a standby, and a primary whose commits wait for a replica
-- all answer reads as usual.

CREATE TABLE webhook_write_checks (
    filler bytea NOT NULL
)
-- Without vacuum no space is reused, so each check makes the file grow and notices if it cannot.
WITH (autovacuum_enabled = off, toast.autovacuum_enabled = off);
ALTER TABLE webhook_write_checks ALTER COLUMN filler SET STORAGE EXTERNAL;

COMMENT ON TABLE webhook_write_checks IS
    'Always empty. Processes write to it to find out whether writes work (webhook_check_writes).';
COMMENT ON COLUMN webhook_write_checks.filler IS
    'Bytes without meaning, more than one page, so that a file must grow for them.';

CREATE FUNCTION webhook_check_writes() RETURNS integer
    LANGUAGE plpgsql
    SET lock_timeout = '2s'
AS $$
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
$$;

COMMENT ON FUNCTION webhook_check_writes() IS
    'Writes 16 KiB for which a file must grow, and deletes them again. The caller commits. Returns the process id of the session.';
