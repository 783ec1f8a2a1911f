-- Access: API keys, and what operators did with them.

CREATE TABLE webhook_api_keys (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  name text NOT NULL,
  secret_digest bytea NOT NULL,
  scopes text[] NOT NULL,
  config_ids bigint[],
  created_at timestamptz NOT NULL DEFAULT now(),
  last_used_at timestamptz,
  revoked_at timestamptz,
  CONSTRAINT "a key has a name" CHECK (name <> ''),
  CONSTRAINT "a secret is stored as its SHA-256" CHECK (octet_length(secret_digest) = 32),
  CONSTRAINT "a key has at least one of the scopes"
    CHECK (cardinality(scopes) > 0 AND scopes <@ ARRAY['enqueue', 'read', 'operate', 'manage']),
  CONSTRAINT "a bound key names a config, and manages nothing"
    CHECK (config_ids IS NULL OR cardinality(config_ids) > 0 AND NOT 'manage' = ANY (scopes))
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

CREATE TABLE webhook_operator_actions (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  acted_at timestamptz NOT NULL DEFAULT now(),
  operator text NOT NULL,
  way text NOT NULL,
  action text NOT NULL,
  scope text NOT NULL,
  subject text NOT NULL,
  reason text,
  before jsonb,
  after jsonb,
  CONSTRAINT "an operator comes by the API, the command line or the console" CHECK (way IN ('api', 'cli', 'console'))
);
COMMENT ON TABLE webhook_operator_actions IS 'What operators changed. A row is written in the transaction that makes the change.';
COMMENT ON COLUMN webhook_operator_actions.id IS 'A running number.';
COMMENT ON COLUMN webhook_operator_actions.acted_at IS 'When.';
COMMENT ON COLUMN webhook_operator_actions.operator IS 'Who: the key, or the user of the machine.';
COMMENT ON COLUMN webhook_operator_actions.way IS 'By which way: api, cli or console.';
COMMENT ON COLUMN webhook_operator_actions.action IS 'What was done, such as config.change or delivery.cancel.';
COMMENT ON COLUMN webhook_operator_actions.scope IS 'The scope that allowed it.';
COMMENT ON COLUMN webhook_operator_actions.subject IS 'The id of what it was done to: a config, a delivery or a key.';
COMMENT ON COLUMN webhook_operator_actions.reason IS 'Why, if the operator said so.';
COMMENT ON COLUMN webhook_operator_actions.before IS 'The settings before, without the values of headers; NULL: there were none.';
COMMENT ON COLUMN webhook_operator_actions.after IS 'The settings after, without the values of headers; NULL: there are none.';

CREATE INDEX webhook_operator_actions_subject ON webhook_operator_actions (subject, id);

-- Writes a row of webhook_operator_actions. The statement that makes a change calls it, so both are committed or neither is.
CREATE FUNCTION webhook_note_action(
  p_operator text, p_way text, p_reason text, p_action text, p_scope text, p_subject text, p_before jsonb, p_after jsonb)
RETURNS bigint
LANGUAGE sql
AS $$
  INSERT INTO webhook_operator_actions (operator, way, reason, action, scope, subject, before, after)
  VALUES (p_operator, p_way, p_reason, p_action, p_scope, p_subject, p_before, p_after)
  RETURNING id
$$;
COMMENT ON FUNCTION webhook_note_action IS 'Records what an operator changed.';
