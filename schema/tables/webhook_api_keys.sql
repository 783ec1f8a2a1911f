-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE TABLE webhook_api_keys (
    id bigint NOT NULL,
    name text NOT NULL,
    secret_digest bytea NOT NULL,
    scopes text[] NOT NULL,
    config_ids bigint[],
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    last_used_at timestamp with time zone,
    revoked_at timestamp with time zone,
    CONSTRAINT "a bound key names a config, and manages nothing" CHECK (((config_ids IS NULL) OR ((cardinality(config_ids) > 0) AND (NOT ('manage'::text = ANY (scopes)))))),
    CONSTRAINT "a key has a name" CHECK ((name <> ''::text)),
    CONSTRAINT "a key has at least one of the scopes" CHECK (((cardinality(scopes) > 0) AND (scopes <@ ARRAY['enqueue'::text, 'read'::text, 'operate'::text, 'manage'::text]))),
    CONSTRAINT "a secret is stored as its SHA-256" CHECK ((octet_length(secret_digest) = 32))
);

COMMENT ON TABLE webhook_api_keys IS 'API keys. Rows are never removed, so that the record of operators stays whole.';

COMMENT ON COLUMN webhook_api_keys.id IS 'Names the key: it is the number in its text.';

COMMENT ON COLUMN webhook_api_keys.name IS 'For people.';

COMMENT ON COLUMN webhook_api_keys.secret_digest IS 'SHA-256 of the secret, which is not stored.';

COMMENT ON COLUMN webhook_api_keys.scopes IS 'What the key may be used for: enqueue, read, operate, manage.';

COMMENT ON COLUMN webhook_api_keys.config_ids IS 'The only configs that the key reaches; NULL: all.';

COMMENT ON COLUMN webhook_api_keys.created_at IS 'When it was made.';

COMMENT ON COLUMN webhook_api_keys.last_used_at IS 'When it was last used, to within a minute; NULL: never.';

COMMENT ON COLUMN webhook_api_keys.revoked_at IS 'When it was revoked; NULL: it is valid.';

ALTER TABLE webhook_api_keys ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME webhook_api_keys_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

ALTER TABLE ONLY webhook_api_keys
    ADD CONSTRAINT webhook_api_keys_pkey PRIMARY KEY (id);
