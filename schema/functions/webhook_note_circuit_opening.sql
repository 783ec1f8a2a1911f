-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- A trigger, so that every statement that opens or closes a circuit is recorded. Probes do not fire it.
CREATE OR REPLACE FUNCTION webhook_note_circuit_opening()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
  IF NEW.circuit_state = 'closed' THEN
    UPDATE webhook_circuit_openings SET closed_at = now() WHERE config_id = NEW.id AND closed_at IS NULL;
  ELSE
    INSERT INTO webhook_circuit_openings (config_id, opened_at, reason) VALUES (NEW.id, now(), NEW.circuit_reason);
  END IF;
  RETURN NULL;
END $function$;

COMMENT ON FUNCTION webhook_note_circuit_opening IS 'Records when a circuit opens and closes.';
