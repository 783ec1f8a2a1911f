//! JSON that comes in, read so that a fault names its field.

use serde::de::DeserializeOwned;

use crate::domain::invalid::Invalid;

/// Why JSON cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// It is not JSON.
    #[error("the body is not valid JSON: {0}")]
    NotJson(serde_json::Error),
    /// It is not what is expected.
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

/// Parses a JSON object. Arrays are refused, in which fields would have no names.
pub fn parse_object<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Unreadable> {
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        return Err(Invalid::field("body", "must be an object").into());
    }
    parse_json(bytes)
}

/// Parses JSON; the field is named that is not as expected.
pub fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Unreadable> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let parsed = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let cause = error.into_inner();
        if !cause.is_data() {
            return Unreadable::NotJson(cause);
        }
        let field = if path == "." { "body".to_owned() } else { path };
        Invalid::field(field, without_position(&cause)).into()
    })?;
    deserializer.end().map_err(Unreadable::NotJson)?;
    Ok(parsed)
}

/// The message without ` at line 1 column 2`, and without the value that was found, which may be a secret.
fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let message = text.rsplit_once(" at line ").map_or(text.as_str(), |(message, _)| message);
    match message.rsplit_once(", expected ") {
        Some((found, expected))
            if found.starts_with("invalid type: ") || found.starts_with("invalid value: ") =>
        {
            format!("must be {}", in_words(expected))
        }
        _ => message.to_owned(),
    }
}

/// What serde calls a type, as a caller would.
fn in_words(expected: &str) -> &str {
    match expected {
        "i64" => "a whole number",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "an array",
        "a map" => "an object",
        name if name.starts_with("struct ") => "an object",
        plain => plain,
    }
}
