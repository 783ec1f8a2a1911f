//! What can be chosen of an endpoint: how it is spelled, what is accepted, and the defaults.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::circuit::{CircuitCommand, CircuitParts, CircuitPolicy};
use super::delivery::Priority;
use super::endpoint::{EndpointUrl, ExtraHeaders};
use super::invalid::{Faults, Invalid, bounded_text};
use super::retry::RetryPolicy;
use super::{present, serialize_millis};

/// The longest name, in characters.
pub const NAME_CHARS_MAX: usize = 200;
/// The longest that one attempt may take.
pub const TIMEOUT_MAX: Duration = Duration::from_mins(5);
/// The highest limit of attempts under way at a time.
pub const MAX_IN_FLIGHT_MAX: u32 = 10_000;
/// The highest limit of attempts begun in a second.
pub const RATE_MAX: u32 = 100_000;

/// What can be chosen of an endpoint. It is spelled as the API shows it; the store's columns have the same names.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct EndpointSettings {
    /// For people.
    pub name: String,
    /// Where `+credit` events go.
    #[schema(value_type = Option<String>)]
    pub postback_url: Option<EndpointUrl>,
    /// Where `-debit` events go.
    #[schema(value_type = Option<String>)]
    pub chargeback_url: Option<EndpointUrl>,
    /// Added to each request.
    #[schema(value_type = BTreeMap<String, String>)]
    pub headers: ExtraHeaders,
    /// Limit of one attempt, from connect to the end of the body.
    #[serde(rename = "timeout_ms", serialize_with = "serialize_millis")]
    #[schema(value_type = u64)]
    pub timeout: Duration,
    /// How often, and how long after, a failed attempt is repeated.
    #[serde(flatten)]
    #[schema(inline)]
    pub retry: RetryPolicy,
    /// For events that name none.
    #[schema(value_type = u8)]
    pub priority: Priority,
    /// How many attempts may be under way at a time, in all processes together; `null`: no limit.
    pub max_in_flight: Option<u32>,
    /// How many attempts may begin in a second, in all processes together; `null`: no limit.
    pub rate_limit_per_second: Option<u32>,
    /// When its circuit opens, and when it is probed. Spelled apart: the API shows it with the circuit's state.
    #[serde(skip)]
    pub circuit: CircuitPolicy,
    /// `false`: deliveries are accepted and wait.
    pub enabled: bool,
}

/// The parts of an endpoint's settings as they come in, unchecked. Also what a change may contain: only what is there is
/// changed, and an inner `None`, which is `null`, removes a value.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EndpointParts {
    /// For people.
    #[schema(
        example = "partner",
        min_length = 1,
        max_length = 200,
        pattern = r"^[^\u0000-\u001f\u007f-\u009f]*$"
    )]
    pub name: Option<String>,
    /// Where `+credit` events go. At least one of the two URLs is needed; `null` removes this one.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, example = "https://partner.example/postback", max_length = 2000,
             pattern = r"^https?://[A-Za-z0-9]([A-Za-z0-9.\-]*[A-Za-z0-9])?(:[0-9]{1,4})?([/?#][!-~]*)?$")]
    pub postback_url: Option<Option<String>>,
    /// Where `-debit` events go; `null` removes it.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, example = "https://partner.example/chargeback", max_length = 2000,
             pattern = r"^https?://[A-Za-z0-9]([A-Za-z0-9.\-]*[A-Za-z0-9])?(:[0-9]{1,4})?([/?#][!-~]*)?$")]
    pub chargeback_url: Option<Option<String>>,
    /// Name to value. Replaces all that were there.
    pub headers: Option<BTreeMap<String, String>>,
    /// Limit of one attempt, from connect to the end of the body. It must not be above `HTTP_TIMEOUT`, which is 30 s
    /// unless the operator chose another.
    #[schema(minimum = 1, maximum = 300_000, default = 30_000, example = 30_000)]
    pub timeout_ms: Option<i64>,
    /// Attempts after the first.
    #[schema(minimum = 0, maximum = 6, default = 6, example = 6)]
    pub max_retries: Option<i64>,
    /// Delay before the first retry, doubled for each one after. It must not be above `retry_cap_ms`.
    #[schema(minimum = 1, maximum = 86_400_000, default = 1_000, example = 1_000)]
    pub retry_base_ms: Option<i64>,
    /// Upper bound of that delay.
    #[schema(minimum = 1, maximum = 86_400_000, default = 300_000, example = 300_000)]
    pub retry_cap_ms: Option<i64>,
    /// Share by which a delay may be longer or shorter.
    #[schema(minimum = 0, exclusive_maximum = 1, default = 0.25, example = 0.25)]
    pub retry_jitter: Option<f64>,
    /// For events that name none: 0 (critical) to 3 (low).
    #[schema(minimum = 0, maximum = 3, default = 2, example = 2)]
    pub priority: Option<i64>,
    /// How many attempts may be under way at a time, in all processes together; `null`: no limit.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<i64>, minimum = 1, maximum = 10_000, default = json!(null), example = 50)]
    pub max_in_flight: Option<Option<i64>>,
    /// How many attempts may begin in a second, in all processes together; `null`: no limit.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<i64>, minimum = 1, maximum = 100_000, default = json!(null), example = 100)]
    pub rate_limit_per_second: Option<Option<i64>>,
    /// When its circuit opens, and when it is probed; also opens and closes it by hand.
    #[serde(default)]
    pub circuit: CircuitParts,
    /// `false`: deliveries are accepted and wait.
    #[schema(default = true, example = true)]
    pub enabled: Option<bool>,
}

impl EndpointParts {
    /// What is done to the circuit by hand, if anything.
    pub fn circuit_command(&self) -> Result<Option<CircuitCommand>, Invalid> {
        self.circuit.state.as_deref().map(CircuitCommand::parse).transpose()
    }
}

impl EndpointSettings {
    /// As they are recorded when an operator changes them: with the names of the headers, whose values may be secret.
    pub fn for_the_record(&self) -> Value {
        let mut settings = serde_json::to_value(self).expect("it is plain data");
        let headers = self.headers.iter().map(|(name, _)| (name.to_owned(), "(not shown)".into()));
        settings["headers"] = Value::Object(headers.collect());
        settings["circuit"] = serde_json::to_value(self.circuit).expect("it is plain data");
        settings
    }

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
        let (mut new, mut faults) = (self.clone(), Faults::default());
        new.name = parts.name.unwrap_or(new.name);
        faults.note(bounded_text("name", &new.name, NAME_CHARS_MAX));
        let urls = [&parts.postback_url, &parts.chargeback_url];
        let asked_for_a_url = urls.iter().any(|url| matches!(url, Some(Some(_))));
        for (field, given, kept) in [
            ("postback_url", parts.postback_url, &mut new.postback_url),
            ("chargeback_url", parts.chargeback_url, &mut new.chargeback_url),
        ] {
            match given {
                None => {}
                Some(None) => *kept = None,
                Some(Some(text)) => *kept = faults.note(EndpointUrl::parse(field, &text)),
            }
        }
        if new.postback_url.is_none() && new.chargeback_url.is_none() && !asked_for_a_url {
            faults.push("postback_url", "must be given, or chargeback_url");
        }
        if let Some(headers) = parts.headers {
            faults.put(&mut new.headers, ExtraHeaders::parse(headers));
        }
        if let Some(ms) = parts.timeout_ms {
            faults.put(&mut new.timeout, timeout(ms));
        }
        let retry = self.retry.changed(
            parts.max_retries,
            parts.retry_base_ms,
            parts.retry_cap_ms,
            parts.retry_jitter,
        );
        faults.put(&mut new.retry, retry);
        if let Some(number) = parts.priority {
            faults.put(&mut new.priority, Priority::parse("priority", number));
        }
        for (field, given, max, kept) in [
            ("max_in_flight", parts.max_in_flight, MAX_IN_FLIGHT_MAX, &mut new.max_in_flight),
            ("rate_limit_per_second", parts.rate_limit_per_second, RATE_MAX, &mut new.rate_limit_per_second),
        ] {
            if let Some(number) = given {
                faults.put(kept, limit(field, number, max));
            }
        }
        faults.put(&mut new.circuit, self.circuit.changed(&parts.circuit));
        new.enabled = parts.enabled.unwrap_or(new.enabled);
        faults.into_result().map(|()| new)
    }
}

fn timeout(ms: i64) -> Result<Duration, Invalid> {
    match u64::try_from(ms).map(Duration::from_millis) {
        Ok(timeout) if !timeout.is_zero() && timeout <= TIMEOUT_MAX => Ok(timeout),
        _ => Err(Invalid::field("timeout_ms", format!("must be from 1 to {}", TIMEOUT_MAX.as_millis()))),
    }
}

/// A limit of 1 to `max`, or none.
fn limit(field: &str, given: Option<i64>, max: u32) -> Result<Option<u32>, Invalid> {
    match given.map(u32::try_from) {
        None => Ok(None),
        Some(Ok(limit)) if (1..=max).contains(&limit) => Ok(Some(limit)),
        Some(_) => Err(Invalid::field(field, format!("must be from 1 to {max}, or null for no limit"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn settings_are_read_again_as_they_are_spelled() {
        let given = EndpointParts {
            chargeback_url: Some(Some("https://h.example/c".into())),
            headers: Some(BTreeMap::from([("x-key".into(), "k".into())])),
            timeout_ms: Some(1_234),
            max_retries: Some(3),
            retry_base_ms: Some(10),
            retry_cap_ms: Some(20),
            retry_jitter: Some(0.1),
            priority: Some(1),
            max_in_flight: Some(Some(5)),
            rate_limit_per_second: Some(Some(7)),
            circuit: CircuitParts {
                state: None,
                failure_rate: Some(None),
                window_ms: Some(2_000),
                attempts_min: Some(9),
                failures_in_row: Some(Some(4)),
                cooldown_ms: Some(300),
                cooldown_cap_ms: Some(400),
            },
            enabled: Some(false),
            ..parts()
        };
        let settings = EndpointSettings::parse(given).unwrap();
        let mut spelled = serde_json::to_value(&settings).unwrap();
        spelled["circuit"] = serde_json::to_value(settings.circuit).unwrap();
        let read: EndpointParts = serde_json::from_value(spelled).unwrap();
        assert_eq!(EndpointSettings::parse(read), Ok(settings));
    }
}
