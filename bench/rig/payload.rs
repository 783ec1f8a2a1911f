//! The one payload of all runs: as a delivery, or as a request that enqueues it.

use serde_json::{Value, json};
use uuid::Uuid;
use webhook_processor::domain::delivery::{NewDelivery, QueueId};
use webhook_processor::domain::endpoint::Endpoint;
use webhook_processor::domain::event::{Event, EventParts};

/// The parameters of every event.
const PARAMETERS: [(&str, &str); 4] =
    [("user_id", "user_123"), ("value", "100"), ("token", "abc123"), ("signature", "xyz789")];

/// A delivery of the one payload.
pub fn new_delivery(endpoint: &Endpoint) -> NewDelivery {
    let event = Event::parse(EventParts {
        event_type: "+credit".into(),
        config_id: endpoint.id.get(),
        url_params: PARAMETERS.into_iter().collect(),
        ..EventParts::default()
    });
    let event = event.expect("the event is well-formed");
    NewDelivery::new(QueueId::new(Uuid::now_v7()), &event, endpoint).expect("the endpoint has the URL")
}

/// An event of the one payload, with more parameters.
fn event(endpoint: &Endpoint, more: &[(&str, String)]) -> Value {
    let mut parameters: serde_json::Map<_, _> =
        PARAMETERS.map(|(name, value)| (name.to_owned(), value.into())).into_iter().collect();
    parameters.extend(more.iter().map(|(name, value)| ((*name).to_owned(), value.as_str().into())));
    json!({"event_type": "+credit", "config_id": endpoint.id.get(), "url_params": parameters})
}

/// A `POST` as it goes over the wire.
fn post(path: &str, content_type: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// An enqueue of one event.
pub fn post_event(endpoint: &Endpoint, more: &[(&str, String)]) -> Vec<u8> {
    post("/webhooks", "application/json", &event(endpoint, more).to_string())
}

/// An enqueue of many, as a stream.
pub fn post_events(endpoint: &Endpoint, count: usize, more: &[(&str, String)]) -> Vec<u8> {
    let line = event(endpoint, more).to_string() + "\n";
    post("/webhooks/batch", "application/x-ndjson", &line.repeat(count))
}
