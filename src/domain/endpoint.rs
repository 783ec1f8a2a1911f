//! Endpoints, called configs in the API: where deliveries go, and how.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use url::Url;

use super::circuit::{Circuit, CircuitCommand, CircuitParts, CircuitPolicy};
use super::delivery::Priority;
use super::event::EventType;
use super::invalid::{Faults, Invalid, bounded_text};
use super::retry::RetryPolicy;

/// The longest name, in characters.
pub const NAME_CHARS_MAX: usize = 200;
/// The longest URL of an endpoint, in bytes.
pub const ENDPOINT_URL_BYTES_MAX: usize = 2000;
/// The most request headers that an endpoint may add.
pub const HEADERS_MAX: usize = 20;
/// The longest value of such a header, in bytes.
pub const HEADER_VALUE_BYTES_MAX: usize = 2000;
/// The longest that one attempt may take.
pub const TIMEOUT_MAX: Duration = Duration::from_mins(5);
/// The highest limit of attempts under way at a time.
pub const MAX_IN_FLIGHT_MAX: u32 = 10_000;
/// The highest limit of attempts begun in a second.
pub const RATE_LIMIT_MAX: u32 = 100_000;

/// Headers that the sender or the connection owns.
const RESERVED_HEADERS: [&str; 14] = [
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
];

/// Names an endpoint: `config_id`, a positive number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId(i64);

impl EndpointId {
    /// Accepts positive numbers.
    pub fn parse(field: &str, number: i64) -> Result<Self, Invalid> {
        if number > 0 {
            Ok(Self(number))
        } else {
            Err(Invalid::field(field, "must be a positive whole number"))
        }
    }

    /// An id that comes from the store.
    pub fn from_stored(number: i64) -> Self {
        Self(number)
    }

    /// As it is stored.
    pub fn get(self) -> i64 {
        self.0
    }
}

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An absolute http or https URL without credentials, in the form in which an HTTP client sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointUrl(Url);

impl EndpointUrl {
    /// Parses and normalises (WHATWG URL).
    pub fn parse(field: &str, text: &str) -> Result<Self, Invalid> {
        let fault = |message: &str| Err(Invalid::field(field, message));
        let Ok(url) = Url::parse(text) else {
            return fault("must be an absolute URL, such as https://example.com/postback");
        };
        if !matches!(url.scheme(), "http" | "https") {
            return fault("must begin with http:// or https://");
        }
        if !url.username().is_empty() || url.password().is_some() {
            return fault("must not contain a user name or a password; put credentials into `headers`");
        }
        if url.host_str().is_none_or(str::is_empty) {
            return fault("must name a host");
        }
        // as it is stored and sent, which may be longer than it was given
        if url.as_str().len() > ENDPOINT_URL_BYTES_MAX {
            return Err(Invalid::field(
                field,
                format!("must have at most {ENDPOINT_URL_BYTES_MAX} bytes once encoded"),
            ));
        }
        Ok(Self(url))
    }

    /// As it is sent.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// Taken apart.
    pub fn url(&self) -> &Url {
        &self.0
    }
}

/// Request headers that an endpoint adds, by lower-case name. Values may be credentials and are not shown by `Debug`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ExtraHeaders(BTreeMap<String, String>);

impl ExtraHeaders {
    /// Accepts names and values that HTTP allows (RFC 9110), except names that the sender owns.
    pub fn parse(headers: BTreeMap<String, String>) -> Result<Self, Invalid> {
        let mut faults = Faults::default();
        if headers.len() > HEADERS_MAX {
            faults.push("headers", format!("must have at most {HEADERS_MAX} entries"));
        }
        let mut accepted = BTreeMap::new();
        for (name, value) in headers {
            let lower = name.to_ascii_lowercase();
            if lower.is_empty() || lower.len() > 100 || !lower.bytes().all(is_token_byte) {
                faults.push("headers", "must have names of 1 to 100 letters, digits and -_.!#$%&'*+^`|~");
                continue;
            }
            let field = format!("headers.{lower}");
            if RESERVED_HEADERS.contains(&lower.as_str()) || lower.starts_with("webhook-") {
                faults.push(&field, "must not be set: the sender sets it");
            }
            if value.len() > HEADER_VALUE_BYTES_MAX
                || !value.bytes().all(|b| b == b'\t' || (b' '..=b'~').contains(&b))
            {
                faults.push(
                    &field,
                    format!("must be printable ASCII of at most {HEADER_VALUE_BYTES_MAX} bytes"),
                );
            }
            if accepted.insert(lower, value).is_some() {
                faults.push(&field, "must be given once");
            }
        }
        faults.into_result().map(|()| Self(accepted))
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// As a map, for the API and the store.
    pub fn as_map(&self) -> &BTreeMap<String, String> {
        &self.0
    }
}

impl fmt::Debug for ExtraHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// A byte of a `token` (RFC 9110, section 5.6.2).
fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// What can be chosen of an endpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct EndpointSettings {
    /// For people.
    pub name: String,
    /// Where `+credit` events go.
    pub postback_url: Option<EndpointUrl>,
    /// Where `-debit` events go.
    pub chargeback_url: Option<EndpointUrl>,
    /// Added to each request.
    pub headers: ExtraHeaders,
    /// Limit of one attempt, from connect to the end of the body.
    pub timeout: Duration,
    /// How often, and how long after, a failed attempt is repeated.
    pub retry: RetryPolicy,
    /// For events that name none.
    pub priority: Priority,
    /// How many attempts may be under way at a time, in all processes together.
    pub max_in_flight: Option<u32>,
    /// How many attempts may begin in a second, in all processes together.
    pub rate_limit_per_second: Option<u32>,
    /// When its circuit opens, and when it is probed.
    pub circuit: CircuitPolicy,
    /// Whether deliveries may be attempted.
    pub enabled: bool,
}

/// The parts of an endpoint's settings, unchecked. Also what a change may contain: only what is there is changed.
#[derive(Debug, Clone, Default)]
pub struct EndpointParts {
    /// 1 to 200 characters.
    pub name: Option<String>,
    /// An http or https URL; inner `None` removes it.
    pub postback_url: Option<Option<String>>,
    /// An http or https URL; inner `None` removes it.
    pub chargeback_url: Option<Option<String>>,
    /// Name to value; replaces all.
    pub headers: Option<BTreeMap<String, String>>,
    /// 1 to 300,000.
    pub timeout_ms: Option<i64>,
    /// 0 to 6.
    pub max_retries: Option<i64>,
    /// 1 to `retry_cap_ms`.
    pub retry_base_ms: Option<i64>,
    /// `retry_base_ms` to 86,400,000.
    pub retry_cap_ms: Option<i64>,
    /// 0 to below 1.
    pub retry_jitter: Option<f64>,
    /// 0 to 3.
    pub priority: Option<i64>,
    /// 1 to 10,000; inner `None` removes it.
    pub max_in_flight: Option<Option<i64>>,
    /// 1 to 100,000; inner `None` removes it.
    pub rate_limit_per_second: Option<Option<i64>>,
    /// The policy of its circuit, and the state that it is put into by hand.
    pub circuit: CircuitParts,
    /// Whether deliveries may be attempted.
    pub enabled: Option<bool>,
}

impl EndpointParts {
    /// What is done to the circuit by hand, if anything.
    pub fn circuit_command(&self) -> Result<Option<CircuitCommand>, Invalid> {
        self.circuit.state.as_deref().map(CircuitCommand::parse).transpose()
    }
}

impl EndpointSettings {
    /// Its URLs, with the names of their fields.
    pub fn urls(&self) -> impl Iterator<Item = (&'static str, &EndpointUrl)> {
        let urls = [("postback_url", &self.postback_url), ("chargeback_url", &self.chargeback_url)];
        urls.into_iter().filter_map(|(field, url)| Some((field, url.as_ref()?)))
    }

    /// Those of its URLs that `before` did not have in the same field.
    pub fn urls_that_differ(&self, before: &Self) -> Vec<(&'static str, &EndpointUrl)> {
        self.urls().filter(|url| before.urls().all(|known| known != *url)).collect()
    }

    /// Checks all parts and reports all faults at once; what is missing has its default.
    pub fn parse(parts: EndpointParts) -> Result<Self, Invalid> {
        let unnamed = Self {
            name: String::new(),
            postback_url: None,
            chargeback_url: None,
            headers: ExtraHeaders::default(),
            timeout: Duration::from_secs(30),
            retry: RetryPolicy::default(),
            priority: Priority::default(),
            max_in_flight: None,
            rate_limit_per_second: None,
            circuit: CircuitPolicy::default(),
            enabled: true,
        };
        unnamed.changed(parts)
    }

    /// These settings with `parts` in place of what they name.
    pub fn changed(&self, parts: EndpointParts) -> Result<Self, Invalid> {
        let mut faults = Faults::default();
        let name = parts.name.unwrap_or_else(|| self.name.clone());
        faults.note(bounded_text("name", &name, NAME_CHARS_MAX));
        let mut url = |field: &str, given: Option<Option<String>>, current: &Option<EndpointUrl>| match given
        {
            None => current.clone(),
            Some(None) => None,
            Some(Some(text)) => faults.note(EndpointUrl::parse(field, &text)),
        };
        let asked_for_a_url =
            [&parts.postback_url, &parts.chargeback_url].iter().any(|url| matches!(url, Some(Some(_))));
        let postback_url = url("postback_url", parts.postback_url, &self.postback_url);
        let chargeback_url = url("chargeback_url", parts.chargeback_url, &self.chargeback_url);
        if postback_url.is_none() && chargeback_url.is_none() && !asked_for_a_url {
            faults.push("postback_url", "must be given, or chargeback_url");
        }
        let headers = match parts.headers {
            Some(headers) => faults.note(ExtraHeaders::parse(headers)),
            None => Some(self.headers.clone()),
        };
        let timeout = match parts.timeout_ms {
            None => self.timeout,
            Some(ms) => match u64::try_from(ms).map(Duration::from_millis) {
                Ok(timeout) if !timeout.is_zero() && timeout <= TIMEOUT_MAX => timeout,
                _ => {
                    faults.push("timeout_ms", format!("must be from 1 to {}", TIMEOUT_MAX.as_millis()));
                    self.timeout
                }
            },
        };
        let retry = faults.note(self.retry.changed(
            parts.max_retries,
            parts.retry_base_ms,
            parts.retry_cap_ms,
            parts.retry_jitter,
        ));
        let priority = match parts.priority {
            Some(number) => faults.note(Priority::parse("priority", number)),
            None => Some(self.priority),
        };
        let mut limit = |field: &str, given: Option<Option<i64>>, max: u32, current: Option<u32>| match given
        {
            None => current,
            Some(None) => None,
            Some(Some(number)) => match u32::try_from(number) {
                Ok(limit) if (1..=max).contains(&limit) => Some(limit),
                _ => {
                    faults.push(field, format!("must be from 1 to {max}, or null for no limit"));
                    current
                }
            },
        };
        let max_in_flight =
            limit("max_in_flight", parts.max_in_flight, MAX_IN_FLIGHT_MAX, self.max_in_flight);
        let rate_limit_per_second = limit(
            "rate_limit_per_second",
            parts.rate_limit_per_second,
            RATE_LIMIT_MAX,
            self.rate_limit_per_second,
        );
        let circuit = faults.note(self.circuit.changed(&parts.circuit));
        faults.into_result()?;
        Ok(Self {
            name,
            postback_url,
            chargeback_url,
            headers: headers.expect("a fault would have been noted"),
            timeout,
            retry: retry.expect("a fault would have been noted"),
            priority: priority.expect("a fault would have been noted"),
            max_in_flight,
            rate_limit_per_second,
            circuit: circuit.expect("a fault would have been noted"),
            enabled: parts.enabled.unwrap_or(self.enabled),
        })
    }
}

/// A registered endpoint.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Names it.
    pub id: EndpointId,
    /// What was chosen.
    pub settings: EndpointSettings,
    /// Whether its deliveries are let through, as it was when the endpoint was read.
    pub circuit: Circuit,
    /// Why it is disabled, where the service itself did it.
    pub disabled_reason: Option<String>,
    /// When it was registered.
    pub created_at: DateTime<Utc>,
    /// When it last changed; names this revision of it.
    pub updated_at: DateTime<Utc>,
    /// When it was deleted.
    pub deleted_at: Option<DateTime<Utc>>,
}

impl Endpoint {
    /// Whether it is enabled and has no limits, so that nothing but its circuit may make a delivery wait.
    pub fn is_unhindered(&self) -> bool {
        let EndpointSettings { enabled, max_in_flight, rate_limit_per_second, .. } = &self.settings;
        *enabled && max_in_flight.is_none() && rate_limit_per_second.is_none()
    }

    /// The URL for events of this type.
    pub fn url_for(&self, event_type: EventType) -> Result<&EndpointUrl, Invalid> {
        let (url, field) = match event_type {
            EventType::Credit => (&self.settings.postback_url, "postback_url"),
            EventType::Debit => (&self.settings.chargeback_url, "chargeback_url"),
        };
        url.as_ref().ok_or_else(|| {
            Invalid::field(
                "event_type",
                format!("config {} has no {field}, which {event_type} needs", self.id),
            )
        })
    }

    /// Whether the URL of a delivery is one that this endpoint still has, with parameters added to its query or without. A
    /// delivery keeps the URL that was valid when it was accepted. The store's `webhook_is_at` answers the same.
    pub fn is_at(&self, delivery_url: &str) -> bool {
        let delivery_url = without_fragment(delivery_url);
        self.settings.urls().any(|(_, url)| {
            let url = without_fragment(url.as_str());
            delivery_url.strip_prefix(url).is_some_and(|added| {
                added.is_empty()
                    || url.ends_with(['?', '&'])
                    || added.starts_with(if url.contains('?') { '&' } else { '?' })
            })
        })
    }
}

fn without_fragment(url: &str) -> &str {
    url.split('#').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::circuit::CircuitState;

    fn parts() -> EndpointParts {
        EndpointParts {
            name: Some("shop".into()),
            postback_url: Some(Some("http://h.example/p".into())),
            ..EndpointParts::default()
        }
    }

    fn fields(parts: EndpointParts) -> Vec<String> {
        EndpointSettings::parse(parts).unwrap_err().errors().iter().map(|e| e.field.clone()).collect()
    }

    #[test]
    fn all_but_the_name_and_one_url_has_defaults() {
        let settings = EndpointSettings::parse(parts()).unwrap();
        assert_eq!(settings.timeout, Duration::from_secs(30));
        assert_eq!(settings.retry.max_retries(), 6);
        assert_eq!(fields(EndpointParts::default()), ["name", "postback_url"]);
    }

    #[test]
    fn urls_must_be_http_and_without_credentials() {
        for url in ["", "not a url", "/path", "ftp://h/", "http://u:p@h/", "http://u@h/", "http://"] {
            let given = EndpointParts { chargeback_url: Some(Some(url.into())), ..parts() };
            assert_eq!(fields(given), ["chargeback_url"], "{url}");
        }
    }

    #[test]
    fn what_is_accepted_is_accepted_again_as_it_is_stored() {
        for count in [300, 330, 340, 1000, 1990] {
            let given = format!("http://h.example/?{}", "é".repeat(count));
            if let Ok(url) = EndpointUrl::parse("postback_url", &given) {
                assert_eq!(EndpointUrl::parse("postback_url", url.as_str()), Ok(url), "{count}");
            } else {
                assert!(count >= 330, "{count}");
            }
        }
    }

    #[test]
    fn headers_that_the_sender_owns_or_http_forbids_are_refused() {
        for (name, value) in
            [("Host", "x"), ("webhook-id", "x"), ("a b", "x"), ("x-a", "line\nbreak"), ("", "x")]
        {
            let headers = BTreeMap::from([(name.to_owned(), value.to_owned())]);
            assert!(ExtraHeaders::parse(headers).is_err(), "{name}");
        }
        let headers =
            ExtraHeaders::parse(BTreeMap::from([("Authorization".into(), "Bearer s3cret".into())])).unwrap();
        assert_eq!(format!("{headers:?}"), "{\"authorization\"}");
    }

    #[test]
    fn a_change_touches_only_what_it_names() {
        let before = EndpointSettings::parse(parts()).unwrap();
        let change = EndpointParts { max_retries: Some(2), enabled: Some(false), ..EndpointParts::default() };
        let after = before.changed(change).unwrap();
        assert_eq!((after.retry.max_retries(), after.enabled), (2, false));
        assert_eq!((&after.name, &after.postback_url), (&before.name, &before.postback_url));
        let last_url_removed = EndpointParts { postback_url: Some(None), ..EndpointParts::default() };
        assert!(before.changed(last_url_removed).is_err());
    }

    #[test]
    fn an_endpoint_is_at_its_urls_with_parameters_or_without() {
        let urls = EndpointParts {
            postback_url: Some(Some("https://h/credit?k=v".into())),
            chargeback_url: Some(Some("https://h/debit#part".into())),
            ..parts()
        };
        let endpoint = Endpoint {
            id: EndpointId::from_stored(1),
            settings: EndpointSettings::parse(urls).unwrap(),
            circuit: Circuit {
                state: CircuitState::Closed,
                reason: None,
                probe_error: None,
                changed_at: None,
                probe_at: None,
            },
            disabled_reason: None,
            created_at: DateTime::UNIX_EPOCH,
            updated_at: DateTime::UNIX_EPOCH,
            deleted_at: None,
        };
        for (url, is_there) in [
            ("https://h/credit?k=v&amount=1", true),
            ("https://h/credit?k=v", true),
            ("https://h/credit", false),
            ("https://h/credit?k=of_before&amount=1", false),
            ("https://h/credit?k=v2", false),
            ("https://h/debit?amount=1#part", true),
            ("https://h/credit2?k=v", false),
            ("https://h/", false),
            ("http://h/credit", false),
        ] {
            assert_eq!(endpoint.is_at(url), is_there, "{url}");
        }
    }
}
