-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Writes a row of webhook_operator_actions. The statement that makes a change calls it, so both are committed or neither is.
CREATE OR REPLACE FUNCTION webhook_note_action(p_operator text, p_way text, p_reason text, p_action text, p_scope text, p_subject text, p_before jsonb, p_after jsonb)
 RETURNS bigint
 LANGUAGE sql
AS $function$
  INSERT INTO webhook_operator_actions (operator, way, reason, action, scope, subject, before, after)
  VALUES (p_operator, p_way, p_reason, p_action, p_scope, p_subject, p_before, p_after)
  RETURNING id
$function$;

COMMENT ON FUNCTION webhook_note_action IS 'Records what an operator changed.';
