-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE VIEW webhook_archives AS
 SELECT (child.relname)::text AS archive,
    to_date("right"((child.relname)::text, 8), 'YYYYMMDD'::text) AS archive_day
   FROM (pg_inherits i
     JOIN pg_class child ON ((child.oid = i.inhrelid)))
  WHERE ((i.inhparent = ('webhook_queue'::regclass)::oid) AND (child.relname ~ '^webhook_queue_archive_\d{8}$'::text));

COMMENT ON VIEW webhook_archives IS 'The archive partitions of webhook_queue and their days (UTC).';
