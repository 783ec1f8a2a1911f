//! Configs, which the code calls endpoints: what may be chosen, and what is shown.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::json;
use utoipa::openapi::schema::{AllOfBuilder, AnyOfBuilder, ObjectBuilder, Schema, Type};
use utoipa::openapi::{Object, RefOr};
use utoipa::{PartialSchema, ToSchema};

use super::schemas;
use crate::domain::circuit::CircuitParts;
use crate::domain::endpoint::{Endpoint, EndpointParts, EndpointUrl};
use crate::domain::millis;

/// What to change of a config: only what is there is changed. In a new config, what is not there has its default.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfigBody {
    /// For people.
    #[schema(
        example = "partner",
        min_length = 1,
        max_length = 200,
        pattern = r"^[^\u0000-\u001f\u007f-\u009f]*$"
    )]
    name: Option<String>,
    /// Where `+credit` events go. At least one of the two URLs is needed; `null` removes this one.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, example = "https://partner.example/postback", max_length = 2000,
             pattern = r"^https?://[A-Za-z0-9]([A-Za-z0-9.\-]*[A-Za-z0-9])?(:[0-9]{1,4})?([/?#][!-~]*)?$")]
    postback_url: Option<Option<String>>,
    /// Where `-debit` events go; `null` removes it.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>, example = "https://partner.example/chargeback", max_length = 2000,
             pattern = r"^https?://[A-Za-z0-9]([A-Za-z0-9.\-]*[A-Za-z0-9])?(:[0-9]{1,4})?([/?#][!-~]*)?$")]
    chargeback_url: Option<Option<String>>,
    #[schema(schema_with = schemas::headers)]
    headers: Option<BTreeMap<String, String>>,
    /// Limit of one attempt, from connect to the end of the body. It must not be above `HTTP_TIMEOUT`, which is 30 s
    /// unless the operator chose another.
    #[schema(minimum = 1, maximum = 300_000, default = 30_000, example = 30_000)]
    timeout_ms: Option<i64>,
    /// Attempts after the first.
    #[schema(minimum = 0, maximum = 6, default = 6, example = 6)]
    max_retries: Option<i64>,
    /// Delay before the first retry, doubled for each one after. It must not be above `retry_cap_ms`.
    #[schema(minimum = 1, maximum = 86_400_000, default = 1_000, example = 1_000)]
    retry_base_ms: Option<i64>,
    /// Upper bound of that delay.
    #[schema(minimum = 1, maximum = 86_400_000, default = 300_000, example = 300_000)]
    retry_cap_ms: Option<i64>,
    /// Share by which a delay may be longer or shorter.
    #[schema(minimum = 0, exclusive_maximum = 1, default = 0.25, example = 0.25)]
    retry_jitter: Option<f64>,
    /// For events that name none: 0 (critical) to 3 (low).
    #[schema(minimum = 0, maximum = 3, default = 2, example = 2)]
    priority: Option<i64>,
    /// How many attempts may be under way at a time, in all processes together; `null`: no limit.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<i64>, minimum = 1, maximum = 10_000, default = json!(null), example = 50)]
    max_in_flight: Option<Option<i64>>,
    /// How many attempts may begin in a second, in all processes together; `null`: no limit.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<i64>, minimum = 1, maximum = 100_000, default = json!(null), example = 100)]
    rate_limit_per_second: Option<Option<i64>>,
    /// When its circuit opens, and when it is probed; also opens and closes it by hand.
    #[serde(default)]
    circuit: CircuitBody,
    /// `false`: deliveries are accepted and wait.
    #[schema(default = true, example = true)]
    enabled: Option<bool>,
}

/// What to change of a circuit: only what is there is changed.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CircuitBody {
    #[schema(schema_with = schemas::circuit_command)]
    state: Option<String>,
    /// It opens when this share of attempts has failed; `null`: never by itself.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<f64>, exclusive_minimum = 0, maximum = 1, default = 0.8, example = 0.8)]
    failure_rate: Option<Option<f64>>,
    /// How far back attempts count for that.
    #[schema(minimum = 1_000, maximum = 3_600_000, default = 60_000, example = 60_000)]
    window_ms: Option<i64>,
    /// How many attempts it takes at least.
    #[schema(minimum = 1, maximum = 10_000, default = 20, example = 20)]
    attempts_min: Option<i64>,
    /// With fewer attempts than that, it opens when so many in a row have failed; `null`: never.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<i64>, minimum = 1, maximum = 10_000, default = 5, example = 5)]
    failures_in_row: Option<Option<i64>>,
    /// From the opening to the first probe, doubled after each failed probe. It must not be above `cooldown_cap_ms`.
    #[schema(minimum = 100, maximum = 86_400_000, default = 5_000, example = 5_000)]
    cooldown_ms: Option<i64>,
    /// Upper bound of that.
    #[schema(minimum = 100, maximum = 86_400_000, default = 300_000, example = 300_000)]
    cooldown_cap_ms: Option<i64>,
}

/// Tells `null`, which removes a value, from a field that is missing, which keeps it.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl From<ConfigBody> for EndpointParts {
    fn from(body: ConfigBody) -> Self {
        Self {
            name: body.name,
            postback_url: body.postback_url,
            chargeback_url: body.chargeback_url,
            headers: body.headers,
            timeout_ms: body.timeout_ms,
            max_retries: body.max_retries,
            retry_base_ms: body.retry_base_ms,
            retry_cap_ms: body.retry_cap_ms,
            retry_jitter: body.retry_jitter,
            priority: body.priority,
            max_in_flight: body.max_in_flight,
            rate_limit_per_second: body.rate_limit_per_second,
            circuit: CircuitParts {
                state: body.circuit.state,
                failure_rate: body.circuit.failure_rate,
                window_ms: body.circuit.window_ms,
                attempts_min: body.circuit.attempts_min,
                failures_in_row: body.circuit.failures_in_row,
                cooldown_ms: body.circuit.cooldown_ms,
                cooldown_cap_ms: body.circuit.cooldown_cap_ms,
            },
            enabled: body.enabled,
        }
    }
}

/// A config: where deliveries go, and how.
#[derive(Debug, Serialize, ToSchema)]
pub struct ConfigView {
    /// Names it.
    id: i64,
    /// For people.
    name: String,
    /// Where `+credit` events go.
    postback_url: Option<String>,
    /// Where `-debit` events go.
    chargeback_url: Option<String>,
    /// Added to each request.
    headers: BTreeMap<String, String>,
    /// Limit of one attempt.
    timeout_ms: u64,
    /// The limit that holds: `timeout_ms`, or `HTTP_TIMEOUT` if that is less.
    effective_timeout_ms: u64,
    /// Attempts after the first.
    max_retries: u8,
    /// Delay before the first retry.
    retry_base_ms: u64,
    /// Upper bound of that delay.
    retry_cap_ms: u64,
    /// Share by which a delay may be longer or shorter.
    retry_jitter: f64,
    /// For events that name none.
    priority: u8,
    /// How many attempts may be under way at a time; `null`: no limit.
    max_in_flight: Option<u32>,
    /// How many attempts may begin in a second; `null`: no limit.
    rate_limit_per_second: Option<u32>,
    /// Whether deliveries are let through.
    circuit: CircuitView,
    /// `false`: deliveries are accepted and wait.
    enabled: bool,
    /// Why it is disabled, where the service itself did it.
    disabled_reason: Option<String>,
    /// When it was registered.
    created_at: DateTime<Utc>,
    /// When it last changed.
    updated_at: DateTime<Utc>,
}

/// A config's circuit, and when it opens.
#[derive(Debug, Serialize, ToSchema)]
pub struct CircuitView {
    /// Whether deliveries are attempted.
    #[schema(schema_with = schemas::circuit_state)]
    state: &'static str,
    /// Why it opened; `null` while it is closed.
    reason: Option<String>,
    /// How the last probe failed.
    probe_error: Option<String>,
    /// When it last opened or closed.
    changed_at: Option<DateTime<Utc>>,
    /// When the next probe is due, or when the one under way counts as lost; `null` while it is closed, and where it was
    /// opened by hand.
    probe_at: Option<DateTime<Utc>>,
    /// It opens when this share of attempts has failed; `null`: never by itself.
    failure_rate: Option<f64>,
    /// How far back attempts count for that.
    window_ms: u64,
    /// How many attempts it takes at least.
    attempts_min: u32,
    /// With fewer than that, it opens when so many in a row have failed; `null`: never.
    failures_in_row: Option<u32>,
    /// From the opening to the first probe; doubled after each failed probe.
    cooldown_ms: u64,
    /// Upper bound of that.
    cooldown_cap_ms: u64,
}

impl ConfigView {
    /// A config as it is where no attempt may take longer than `timeout_max`.
    pub fn new(endpoint: Endpoint, timeout_max: Duration) -> Self {
        let settings = endpoint.settings;
        Self {
            id: endpoint.id.get(),
            name: settings.name,
            postback_url: settings.postback_url.as_ref().map(EndpointUrl::as_str).map(str::to_owned),
            chargeback_url: settings.chargeback_url.as_ref().map(EndpointUrl::as_str).map(str::to_owned),
            headers: settings.headers.as_map().clone(),
            timeout_ms: millis(settings.timeout),
            effective_timeout_ms: millis(settings.timeout.min(timeout_max)),
            max_retries: settings.retry.max_retries(),
            retry_base_ms: millis(settings.retry.base()),
            retry_cap_ms: millis(settings.retry.cap()),
            retry_jitter: settings.retry.jitter(),
            priority: settings.priority.get(),
            max_in_flight: settings.max_in_flight,
            rate_limit_per_second: settings.rate_limit_per_second,
            circuit: CircuitView {
                state: endpoint.circuit.state.as_str(),
                reason: endpoint.circuit.reason,
                probe_error: endpoint.circuit.probe_error,
                changed_at: endpoint.circuit.changed_at,
                probe_at: endpoint.circuit.probe_at,
                failure_rate: settings.circuit.failure_rate(),
                window_ms: millis(settings.circuit.window()),
                attempts_min: settings.circuit.attempts_min(),
                failures_in_row: settings.circuit.failures_in_row(),
                cooldown_ms: millis(settings.circuit.cooldown()),
                cooldown_cap_ms: millis(settings.circuit.cooldown_cap()),
            },
            enabled: settings.enabled,
            disabled_reason: endpoint.disabled_reason,
            created_at: endpoint.created_at,
            updated_at: endpoint.updated_at,
        }
    }
}

/// The body that registers a config: what changes one, with a name, a URL, and no circuit that is opened by hand.
pub struct NewConfigBody;

impl ToSchema for NewConfigBody {
    fn name() -> Cow<'static, str> {
        "NewConfig".into()
    }
}

impl PartialSchema for NewConfigBody {
    fn schema() -> RefOr<Schema> {
        let (mut config, mut circuit) = (object(ConfigBody::schema()), object(CircuitBody::schema()));
        circuit.properties.remove("state");
        circuit.description = Some("When its circuit opens, and when it is probed.".to_owned());
        config.properties.insert("circuit".to_owned(), Schema::Object(circuit).into());
        config.description = None;
        config.required.push("name".to_owned());
        let one_url = AnyOfBuilder::new()
            .item(ObjectBuilder::new().schema_type(Type::Object).required("postback_url"))
            .item(ObjectBuilder::new().schema_type(Type::Object).required("chargeback_url"));
        AllOfBuilder::new()
            .item(config)
            .item(Schema::AnyOf(one_url.build()))
            .description(Some("A new config. It needs a name, and at least one of the two URLs."))
            .examples([json!({
                "name": "partner",
                "postback_url": "https://partner.example/postback",
                "chargeback_url": "https://partner.example/chargeback",
                "max_in_flight": 50
            })])
            .into()
    }
}

fn object(schema: RefOr<Schema>) -> Object {
    match schema {
        RefOr::T(Schema::Object(object)) => object,
        RefOr::T(_) | RefOr::Ref(_) => unreachable!("a struct with named fields is described as an object"),
    }
}
