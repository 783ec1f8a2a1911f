//! The rules that hold whatever the database and the network: events, endpoints, deliveries, attempts.
//!
//! Nothing here does I/O, reads a clock or draws random numbers. If a rule needs the time or a random number, it is passed in.

#![warn(missing_docs)]

pub mod access;
pub mod address;
pub mod attempt;
pub mod circuit;
pub mod delivery;
pub mod durations;
pub mod egress;
pub mod endpoint;
pub mod endpoint_settings;
pub mod error_kind;
pub mod event;
pub mod evidence;
pub mod held;
pub mod invalid;
pub mod postback_url;
pub mod replay;
pub mod retry;
pub mod url_params;

use serde::{Deserialize, Deserializer, Serializer};

/// Whole milliseconds, as they are shown and logged.
pub(crate) fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Writes a duration as whole milliseconds.
fn serialize_millis<S: Serializer>(duration: &std::time::Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(millis(*duration))
}

/// Tells `null`, which removes a value, from a field that is missing, which keeps it.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}
