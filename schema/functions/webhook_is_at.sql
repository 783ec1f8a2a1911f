-- Written by scripts/prepare-queries from migrations/. See migrations/README.md.

-- Whether a delivery's URL is an endpoint's URL, with or without parameters added to its query. NULL if the endpoint has no URL.
CREATE OR REPLACE FUNCTION webhook_is_at(p_delivery_url text, p_endpoint_url text)
 RETURNS boolean
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE
RETURN ((split_part(p_delivery_url, '#'::text, 1) = split_part(p_endpoint_url, '#'::text, 1)) OR starts_with(p_delivery_url, (split_part(p_endpoint_url, '#'::text, 1) || CASE WHEN (strpos(split_part(p_endpoint_url, '#'::text, 1), '?'::text) = 0) THEN '?'::text WHEN ("right"(split_part(p_endpoint_url, '#'::text, 1), 1) = ANY (ARRAY['?'::text, '&'::text])) THEN ''::text ELSE '&'::text END)));

COMMENT ON FUNCTION webhook_is_at IS 'Whether a delivery goes to this URL of an endpoint.';
