//! Configs, which the code calls endpoints: what may be chosen, and what is shown.

use std::borrow::Cow;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::json;
use utoipa::openapi::schema::{AllOfBuilder, AnyOfBuilder, ObjectBuilder, Schema, Type};
use utoipa::openapi::{Object, RefOr};
use utoipa::{PartialSchema, ToSchema};

use super::schemas;
use crate::domain::circuit::{Circuit, CircuitParts, CircuitPolicy};
use crate::domain::endpoint::Endpoint;
use crate::domain::endpoint_settings::{EndpointParts, EndpointSettings};
use crate::domain::millis;

/// A config: where deliveries go, and how.
#[derive(Debug, Serialize, ToSchema)]
pub struct ConfigView {
    /// Names it.
    id: i64,
    #[serde(flatten)]
    #[schema(inline)]
    settings: EndpointSettings,
    /// Why it is disabled, where the service itself did it.
    disabled_reason: Option<String>,
    /// The limit that holds: `timeout_ms`, or `HTTP_TIMEOUT` if that is less.
    effective_timeout_ms: u64,
    /// Whether deliveries are let through.
    circuit: CircuitView,
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
    #[serde(flatten)]
    #[schema(inline)]
    policy: CircuitPolicy,
}

impl ConfigView {
    /// A config as it is where no attempt may take longer than `timeout_max`.
    pub fn new(endpoint: Endpoint, timeout_max: Duration) -> Self {
        let Endpoint { id, settings, circuit, disabled_reason, created_at, updated_at, deleted_at: _ } =
            endpoint;
        Self {
            id: id.get(),
            disabled_reason,
            effective_timeout_ms: millis(settings.timeout.min(timeout_max)),
            circuit: CircuitView::new(circuit, settings.circuit),
            settings,
            created_at,
            updated_at,
        }
    }
}

impl CircuitView {
    fn new(circuit: Circuit, policy: CircuitPolicy) -> Self {
        let Circuit { state, reason, probe_error, changed_at, probe_at } = circuit;
        Self { state: state.as_str(), reason, probe_error, changed_at, probe_at, policy }
    }
}

/// Describes the body that changes a config: [`EndpointParts`], with what attributes cannot say of them.
pub struct ConfigBody;

impl ToSchema for ConfigBody {
    fn name() -> Cow<'static, str> {
        "ConfigBody".into()
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push((CircuitParts::name().into_owned(), circuit_parts().into()));
    }
}

impl PartialSchema for ConfigBody {
    fn schema() -> RefOr<Schema> {
        config_parts().into()
    }
}

fn config_parts() -> Object {
    let mut parts = object(EndpointParts::schema());
    parts.properties.insert("headers".to_owned(), schemas::headers().into());
    parts.description = Some(
        "What to change of a config: only what is there is changed. In a new config, what is not there has its default."
            .to_owned(),
    );
    parts
}

fn circuit_parts() -> Object {
    let mut parts = object(CircuitParts::schema());
    parts.properties.insert("state".to_owned(), schemas::circuit_command().into());
    parts.description = Some("What to change of a circuit: only what is there is changed.".to_owned());
    parts
}

/// Describes the body that registers a config: what changes one, with a name, a URL, and no circuit that is opened by hand.
pub struct NewConfigBody;

impl ToSchema for NewConfigBody {
    fn name() -> Cow<'static, str> {
        "NewConfig".into()
    }
}

impl PartialSchema for NewConfigBody {
    fn schema() -> RefOr<Schema> {
        let (mut config, mut circuit) = (config_parts(), circuit_parts());
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
