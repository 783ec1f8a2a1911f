//! Validation errors of a value that someone sent, field by field.

use std::fmt;

/// One field that cannot be accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// The field's path as the sender knows it, such as `url_params.amount`.
    pub field: String,
    /// What was expected. It never repeats the value, which may be a secret.
    pub message: String,
}

/// All validation errors of a value; never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Invalid(Vec<FieldError>);

impl Invalid {
    /// An error with a single fault.
    pub fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self(vec![FieldError { field: field.into(), message: message.into() }])
    }

    /// The faults, in the order in which they were found.
    pub fn errors(&self) -> &[FieldError] {
        &self.0
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", error.field, error.message)?;
        }
        Ok(())
    }
}

/// Collects the faults of several fields, so that a sender gets all of them at once.
#[derive(Debug, Default)]
pub struct Faults(Vec<FieldError>);

impl Faults {
    /// Returns the value, or notes its faults and returns `None`.
    pub fn note<T>(&mut self, parsed: Result<T, Invalid>) -> Option<T> {
        parsed.map_err(|invalid| self.0.extend(invalid.0)).ok()
    }

    /// Puts the value in place of another, or notes its faults.
    pub fn put<T>(&mut self, place: &mut T, parsed: Result<T, Invalid>) {
        if let Some(value) = self.note(parsed) {
            *place = value;
        }
    }

    /// Notes one fault.
    pub fn push(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(FieldError { field: field.into(), message: message.into() });
    }

    /// Fails if anything was noted.
    pub fn into_result(self) -> Result<(), Invalid> {
        if self.0.is_empty() { Ok(()) } else { Err(Invalid(self.0)) }
    }
}

/// Accepts text of 1 to `chars_max` characters without control characters. PostgreSQL could not store a NUL.
pub fn bounded_text(field: &str, text: &str, chars_max: usize) -> Result<(), Invalid> {
    if text.is_empty() {
        return Err(Invalid::field(field, "must not be empty"));
    }
    if text.chars().count() > chars_max {
        return Err(Invalid::field(field, format!("must have at most {chars_max} characters")));
    }
    if text.chars().any(char::is_control) {
        return Err(Invalid::field(field, "must not contain control characters"));
    }
    Ok(())
}
