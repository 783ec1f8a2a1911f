//! Parts of the OpenAPI document that say more than a Rust type: which words, texts and maps are accepted.

use serde_json::{Value, json};
use utoipa::openapi::schema::{
    AdditionalProperties, AllOfBuilder, AnyOfBuilder, ObjectBuilder, Schema, SchemaType, Type,
};
use utoipa::openapi::{Object, RefOr};
use utoipa::{PartialSchema, ToSchema};

use super::view::{CircuitBody, ConfigBody};
use crate::domain::delivery::DeliveryStatus;
use crate::domain::endpoint::{HEADER_VALUE_BYTES_MAX, HEADERS_MAX};
use crate::domain::event::EventType;
use crate::domain::url_params::PARAMS_MAX;

const EVENT_TYPES: [EventType; 2] = [EventType::Credit, EventType::Debit];
const STATUSES: [DeliveryStatus; 5] = [
    DeliveryStatus::Pending,
    DeliveryStatus::Processing,
    DeliveryStatus::Completed,
    DeliveryStatus::Failed,
    DeliveryStatus::Cancelled,
];

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
    one_of(STATUSES.map(DeliveryStatus::as_str)).description(Some("In this status.")).build()
}

/// The status of a delivery.
pub fn status() -> Object {
    one_of(STATUSES.map(DeliveryStatus::as_str))
        .description(Some(
            "`pending`: it waits; `processing`: it is being attempted; `completed`: the receiver has it; `failed`: it \
             is a dead letter; `cancelled`: it was ended on request.",
        ))
        .examples([json!("pending")])
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

/// The body that registers a config: what changes one, with a name, a URL, and no circuit that is opened by hand.
pub struct NewConfigBody;

impl ToSchema for NewConfigBody {
    fn name() -> std::borrow::Cow<'static, str> {
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
