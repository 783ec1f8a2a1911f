//! Endpoints, called configs in the API: where deliveries go, and how.

use std::collections::BTreeMap;
use std::fmt;

use chrono::{DateTime, Utc};
use serde::{Serialize, Serializer};
use url::Url;

use super::circuit::Circuit;
use super::endpoint_settings::EndpointSettings;
use super::event::EventType;
use super::invalid::{Faults, Invalid};

/// The longest URL of an endpoint, in bytes.
pub const ENDPOINT_URL_BYTES_MAX: usize = 2000;
/// The most request headers that an endpoint may add.
pub const HEADERS_MAX: usize = 20;
/// The longest value of such a header, in bytes.
pub const HEADER_VALUE_BYTES_MAX: usize = 2000;

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

impl Serialize for EndpointUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// Request headers that an endpoint adds, by lower-case name. Values may be credentials: they are stored and shown to callers
/// of the API, but not by `Debug`.
#[derive(Clone, Default, PartialEq, Eq, Serialize)]
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
        let settings = &self.settings;
        settings.enabled && settings.max_in_flight.is_none() && settings.rate_limit_per_second.is_none()
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
impl Endpoint {
    /// Number 1, with defaults for what is not among the parts, as if just registered.
    pub fn of(mut parts: super::endpoint_settings::EndpointParts) -> Self {
        parts.name.get_or_insert_with(|| "receiver".into());
        Self {
            id: EndpointId::from_stored(1),
            settings: EndpointSettings::parse(parts).expect("a test names a URL, and nothing wrong"),
            circuit: Circuit::default(),
            disabled_reason: None,
            created_at: DateTime::UNIX_EPOCH,
            updated_at: DateTime::UNIX_EPOCH,
            deleted_at: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::endpoint_settings::EndpointParts;

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
    fn an_endpoint_is_at_its_urls_with_parameters_or_without() {
        let urls = EndpointParts {
            postback_url: Some(Some("https://h/credit?k=v".into())),
            chargeback_url: Some(Some("https://h/debit#part".into())),
            ..EndpointParts::default()
        };
        let endpoint = Endpoint::of(urls);
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
