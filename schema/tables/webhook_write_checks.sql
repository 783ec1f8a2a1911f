-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE TABLE webhook_write_checks (
    filler bytea NOT NULL
)
WITH (autovacuum_enabled=off, toast.autovacuum_enabled=off);
ALTER TABLE ONLY webhook_write_checks ALTER COLUMN filler SET STORAGE EXTERNAL;

COMMENT ON TABLE webhook_write_checks IS 'Always empty. Processes write to it to find out whether writes work (webhook_check_writes).';

COMMENT ON COLUMN webhook_write_checks.filler IS 'Bytes without meaning, more than one page, so that a file must grow for them.';
