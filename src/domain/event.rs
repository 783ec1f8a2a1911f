//! Events: facts that other systems must learn about.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Datelike as _, TimeDelta, Utc};

use super::delivery::Priority;
use super::endpoint::EndpointId;
use super::invalid::{Faults, Invalid, bounded_text};
use super::url_params::UrlParams;

/// The longest event id and correlation id, in characters.
pub const ID_CHARS_MAX: usize = 255;

/// How far ahead an event may be scheduled. A later time is a mistake, such as a wrong year or a time in milliseconds.
pub const SCHEDULE_AHEAD_MAX: TimeDelta = TimeDelta::days(366);

/// What happened. It decides which URL of the endpoint is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EventType {
    /// `+credit`: a user was credited. Delivered as a GET postback.
    Credit,
    /// `-debit`: a user was charged back. Delivered as a GET chargeback.
    Debit,
}

impl EventType {
    /// The text in the API and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Credit => "+credit",
            Self::Debit => "-debit",
        }
    }
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for EventType {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "+credit" => Ok(Self::Credit),
            "-debit" => Ok(Self::Debit),
            _ => Err(Invalid::field("event_type", "must be \"+credit\" or \"-debit\"")),
        }
    }
}

/// An event as a caller hands it in, with the endpoint that it is owed to.
#[derive(Debug, Clone)]
pub struct Event {
    event_type: EventType,
    event_id: Option<String>,
    config_id: EndpointId,
    url_params: UrlParams,
    priority: Option<Priority>,
    scheduled_at: Option<DateTime<Utc>>,
    correlation_id: Option<String>,
    traceparent: Option<String>,
}

/// The parts of an event as they came in, unchecked.
#[derive(Debug, Clone, Default)]
pub struct EventParts {
    /// `+credit` or `-debit`.
    pub event_type: String,
    /// The caller's name for the event. A named event is accepted once; an unnamed one, each time.
    pub event_id: Option<String>,
    /// The id of the endpoint.
    pub config_id: i64,
    /// The query parameters, in order.
    pub url_params: UrlParams,
    /// 0 (critical) to 3 (low); `None` for the endpoint's default.
    pub priority: Option<i64>,
    /// The time before which nothing is sent, in the format of RFC 3339.
    pub scheduled_at: Option<String>,
    /// The caller's own id for what led to the event.
    pub correlation_id: Option<String>,
    /// W3C trace context. A malformed one is dropped, as the standard demands.
    pub traceparent: Option<String>,
}

impl Event {
    /// Checks all parts. Reports all faults at once.
    pub fn parse(parts: EventParts) -> Result<Self, Invalid> {
        let mut faults = Faults::default();
        let event_type = faults.note(parts.event_type.parse::<EventType>());
        for (field, text) in [("event_id", &parts.event_id), ("correlation_id", &parts.correlation_id)] {
            if let Some(text) = text {
                faults.note(bounded_text(field, text, ID_CHARS_MAX));
            }
        }
        let config_id = faults.note(EndpointId::parse("config_id", parts.config_id));
        let scheduled_at = parts.scheduled_at.and_then(|text| faults.note(parse_time("scheduled_at", &text)));
        let priority = parts.priority.and_then(|number| faults.note(Priority::parse("priority", number)));
        faults.note(parts.url_params.check());
        faults.into_result()?;
        Ok(Self {
            event_type: event_type.expect("a fault would have been noted"),
            event_id: parts.event_id,
            config_id: config_id.expect("a fault would have been noted"),
            url_params: parts.url_params,
            priority,
            scheduled_at,
            correlation_id: parts.correlation_id,
            traceparent: parts.traceparent.filter(|text| is_traceparent(text)),
        })
    }

    /// Refuses a time of delivery that is more than a year after `now`.
    pub fn check_schedule(&self, now: DateTime<Utc>) -> Result<(), Invalid> {
        match self.scheduled_at {
            Some(time) if time > now + SCHEDULE_AHEAD_MAX => {
                Err(Invalid::field("scheduled_at", "must be at most 1 year ahead"))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// What happened.
    pub fn event_type(&self) -> EventType {
        self.event_type
    }

    /// The caller's name for the event, if any.
    pub fn event_id(&self) -> Option<&str> {
        self.event_id.as_deref()
    }

    /// The endpoint that the event is owed to.
    pub fn config_id(&self) -> EndpointId {
        self.config_id
    }

    /// The query parameters, in order.
    pub fn url_params(&self) -> &UrlParams {
        &self.url_params
    }

    /// The priority that the caller asked for, if any.
    pub fn priority(&self) -> Option<Priority> {
        self.priority
    }

    /// The time before which the event must not be delivered, if any.
    pub fn scheduled_at(&self) -> Option<DateTime<Utc>> {
        self.scheduled_at
    }

    /// The caller's id for what led to the event, if any.
    pub fn correlation_id(&self) -> Option<&str> {
        self.correlation_id.as_deref()
    }

    /// The W3C trace context that the event belongs to, if any.
    pub fn traceparent(&self) -> Option<&str> {
        self.traceparent.as_deref()
    }
}

/// Parses a time in the format of RFC 3339. The error names `field`.
pub fn parse_time(field: &str, text: &str) -> Result<DateTime<Utc>, Invalid> {
    match DateTime::parse_from_rfc3339(text) {
        Ok(time) => storable_time(field, time.to_utc()),
        Err(_) => Err(Invalid::field(field, "must be a time of RFC 3339, such as 2026-01-31T12:00:00Z")),
    }
}

/// Accepts times of the years 1970 to 9999. Others are mistakes, and the store cannot keep all of them.
fn storable_time(field: &str, time: DateTime<Utc>) -> Result<DateTime<Utc>, Invalid> {
    if (1970..=9999).contains(&time.year()) {
        Ok(time)
    } else {
        Err(Invalid::field(field, "must be a time of the years 1970 to 9999"))
    }
}

/// Whether this is a `traceparent` of version 00: `00-<32 hex>-<16 hex>-<2 hex>`, ids not all zero (W3C Trace Context).
fn is_traceparent(text: &str) -> bool {
    let lower_hex = |part: &str, len: usize| {
        part.len() == len && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let parts: Vec<&str> = text.split('-').collect();
    matches!(parts[..], ["00", trace, span, flags]
        if lower_hex(trace, 32) && lower_hex(span, 16) && lower_hex(flags, 2)
            && trace.bytes().any(|b| b != b'0') && span.bytes().any(|b| b != b'0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> EventParts {
        EventParts { event_type: "+credit".into(), config_id: 1, ..EventParts::default() }
    }

    #[test]
    fn an_event_needs_only_a_type_and_an_endpoint() {
        let event = Event::parse(parts()).unwrap();
        assert_eq!(event.event_type(), EventType::Credit);
        assert_eq!(event.event_id(), None);
    }

    #[test]
    fn all_faults_are_reported_at_once() {
        let wrong = EventParts {
            event_type: "credit".into(),
            event_id: Some("a\0b".into()),
            correlation_id: Some("x".repeat(256)),
            config_id: 0,
            priority: Some(4),
            ..EventParts::default()
        };
        let invalid = Event::parse(wrong).unwrap_err();
        let fields: Vec<_> = invalid.errors().iter().map(|e| e.field.as_str()).collect();
        assert_eq!(fields, ["event_type", "event_id", "correlation_id", "config_id", "priority"]);
    }

    #[test]
    fn an_event_is_scheduled_at_most_a_year_ahead() {
        let now = parse_time("now", "2026-01-31T12:00:00Z").unwrap();
        for (time, accepted) in
            [("2000-01-01T00:00:00Z", true), ("2027-01-31T12:00:00Z", true), ("2027-02-02T12:00:00Z", false)]
        {
            let event = Event::parse(EventParts { scheduled_at: Some(time.into()), ..parts() }).unwrap();
            assert_eq!(event.check_schedule(now).is_ok(), accepted, "{time}");
        }
    }

    #[test]
    fn a_malformed_traceparent_is_dropped_and_a_good_one_kept() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let zero = "00-00000000000000000000000000000000-00f067aa0ba902b7-01";
        for (given, kept) in [(good, Some(good)), (zero, None), ("00-xyz", None), ("", None)] {
            let event = Event::parse(EventParts { traceparent: Some(given.into()), ..parts() }).unwrap();
            assert_eq!(event.traceparent(), kept, "{given}");
        }
    }
}
