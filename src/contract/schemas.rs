//! Parts of the OpenAPI document that say more than a Rust type: which words, texts and maps are accepted.

use serde_json::{Value, json};
use utoipa::openapi::Object;
use utoipa::openapi::schema::{AdditionalProperties, ObjectBuilder, Schema, SchemaType, Type};

use crate::domain::delivery::DeliveryStatus;
use crate::domain::endpoint::{HEADER_VALUE_BYTES_MAX, HEADERS_MAX};
use crate::domain::error_kind::ErrorKind;
use crate::domain::event::EventType;
use crate::domain::url_params::PARAMS_MAX;

const EVENT_TYPES: [EventType; 2] = [EventType::Credit, EventType::Debit];

/// The type of an event that comes in.
pub fn event_type() -> Object {
    one_of(EVENT_TYPES.map(EventType::as_str))
        .description(Some(
            "`+credit` (a GET to the config's `postback_url`) or `-debit` (to its `chargeback_url`).",
        ))
        .examples([json!("+credit")])
        .build()
}

/// The type of the events to list.
pub fn event_type_filter() -> Object {
    one_of(EVENT_TYPES.map(EventType::as_str))
        .description(Some("Of events of this type. In a query a plus is written `%2B`."))
        .build()
}

/// The status of the deliveries to list.
pub fn status_filter() -> Object {
    one_of(DeliveryStatus::ALL.map(DeliveryStatus::as_str)).description(Some("In this status.")).build()
}

/// The status of a delivery.
pub fn status() -> Object {
    let meanings = DeliveryStatus::ALL.map(|status| format!("`{status}`: {}", status.meaning()));
    one_of(DeliveryStatus::ALL.map(DeliveryStatus::as_str))
        .description(Some(meanings.join("; ") + "."))
        .examples([json!("pending")])
        .build()
}

/// Why an attempt failed.
pub fn error_kind() -> Object {
    let words = ErrorKind::ALL.iter().map(|kind| Value::from(kind.as_str())).chain([Value::Null]);
    ObjectBuilder::new()
        .schema_type(SchemaType::from_iter([Type::String, Type::Null]))
        .enum_values(Some(words))
        .description(Some(
            "Why it failed, or why its answer is incomplete, in a word to count by. `dns`: the name leads nowhere; \
             `connect`: no connection; `tls`: no TLS, or a certificate that is refused; `timeout`: too slow; `reset`: the \
             receiver ended the connection too early; `protocol`: what came is not HTTP; `http_status`: it answered \
             another status than 2xx; `outcome_unknown`: the worker was lost; `invalid_url`: the URL cannot be called. \
             Nothing was sent if a setting forbids it: `address_not_allowed`, `port_not_allowed`, `https_required`. \
             `null`: nothing went wrong.",
        ))
        .examples([json!("timeout")])
        .build()
}

/// What to do to a circuit by hand.
pub fn circuit_command() -> Object {
    ObjectBuilder::new()
        .schema_type(SchemaType::from_iter([Type::String, Type::Null]))
        .enum_values(Some([json!("open"), json!("closed"), Value::Null]))
        .description(Some(
            "`open`: deliveries wait until someone closes the circuit; `closed`: they are attempted. Must not be given \
             for a new config, whose circuit is closed.",
        ))
        .examples([json!("closed")])
        .build()
}

/// The state of a circuit.
pub fn circuit_state() -> Object {
    one_of(["closed", "open", "half_open"])
        .description(Some(
            "`closed`: deliveries are attempted; `open`: they wait; `half_open`: one of them is attempted, as a probe.",
        ))
        .build()
}

/// Query parameters by name.
pub fn url_params() -> Object {
    let scalar = SchemaType::from_iter([Type::String, Type::Number, Type::Boolean, Type::Null]);
    let value = ObjectBuilder::new().schema_type(scalar).pattern(Some(r"^[^\u0000]*$"));
    let name = ObjectBuilder::new()
        .schema_type(Type::String)
        .min_length(Some(1))
        .pattern(Some(r"^[^\u0000]*$"))
        .build();
    ObjectBuilder::new()
        .schema_type(Type::Object)
        .additional_properties(Some(AdditionalProperties::from(value)))
        .property_names(Some(Schema::Object(name)))
        .max_properties(Some(PARAMS_MAX))
        .description(Some(
            "Become the query, in this order: strings, numbers and booleans as they are written; `null` leaves a \
             parameter out. With them the URL must have at most 8,000 bytes.",
        ))
        .examples([json!({"user_id": "user_123", "transaction_id": "txn-42", "value": 100.10})])
        .build()
}

/// Request headers by name.
pub fn headers() -> Object {
    let value = ObjectBuilder::new()
        .schema_type(Type::String)
        .max_length(Some(HEADER_VALUE_BYTES_MAX))
        .pattern(Some(r"^[\t -~]*$"));
    let name = ObjectBuilder::new()
        .schema_type(Type::String)
        .min_length(Some(1))
        .max_length(Some(100))
        .pattern(Some(r"^[A-Za-z0-9!#$%&'*+\-.^_`|~]+$"))
        .build();
    ObjectBuilder::new()
        .schema_type(SchemaType::from_iter([Type::Object, Type::Null]))
        .additional_properties(Some(AdditionalProperties::from(value)))
        .property_names(Some(Schema::Object(name)))
        .max_properties(Some(HEADERS_MAX))
        .description(Some(
            "Added to each request; replaces all that were there. Not those that the sender sets itself, such as \
             `host`, `content-type` and `webhook-…`.",
        ))
        .examples([json!({"authorization": "Bearer your-token"})])
        .build()
}

fn one_of<const N: usize>(words: [&'static str; N]) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(words.map(Value::from)))
}
