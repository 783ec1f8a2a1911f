-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

CREATE TABLE webhook_operator_actions (
    id bigint NOT NULL,
    acted_at timestamp with time zone DEFAULT now() NOT NULL,
    operator text NOT NULL,
    way text NOT NULL,
    action text NOT NULL,
    scope text NOT NULL,
    subject text NOT NULL,
    reason text,
    before jsonb,
    after jsonb,
    CONSTRAINT "an operator comes by the API, the command line or the console" CHECK ((way = ANY (ARRAY['api'::text, 'cli'::text, 'console'::text])))
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

ALTER TABLE webhook_operator_actions ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME webhook_operator_actions_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

ALTER TABLE ONLY webhook_operator_actions
    ADD CONSTRAINT webhook_operator_actions_pkey PRIMARY KEY (id);

CREATE INDEX webhook_operator_actions_subject ON webhook_operator_actions USING btree (subject, id);
