//! Events as they come in, and the receipts that answer them.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::json::{Unreadable, parse_object};
use super::schemas;
use crate::domain::delivery::{Delivery, DeliveryStatus, NewDelivery};
use crate::domain::event::{Event, EventParts};
use crate::domain::invalid::Invalid;
use crate::domain::url_params::UrlParams;

/// An event to deliver.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EventBody {
    #[schema(schema_with = schemas::event_type)]
    event_type: String,
    /// Your name for the event. The same `config_id`, `event_type` and `event_id` are accepted once; a repetition is
    /// answered with the first delivery. **Without an `event_id` a repetition cannot be told from a new event: sent
    /// again after a timeout, say, it is a second delivery, and so a second payment.**
    #[schema(
        example = "txn-42",
        min_length = 1,
        max_length = 255,
        pattern = r"^[^\u0000-\u001f\u007f-\u009f]*$"
    )]
    event_id: Option<String>,
    /// The config that the event is owed to.
    #[schema(example = 1, minimum = 1)]
    config_id: i64,
    #[serde(default)]
    #[schema(schema_with = schemas::url_params)]
    url_params: UrlParams,
    /// 0 (critical) to 3 (low); if it is not given, the config's.
    #[schema(example = 2, minimum = 0, maximum = 3)]
    priority: Option<i64>,
    /// Do not deliver before this time (RFC 3339), which is at most a year ahead.
    #[schema(format = DateTime)]
    scheduled_at: Option<String>,
    /// Your id for what led to the event; kept with the delivery.
    #[schema(
        example = "order-7",
        min_length = 1,
        max_length = 255,
        pattern = r"^[^\u0000-\u001f\u007f-\u009f]*$"
    )]
    correlation_id: Option<String>,
}

impl EventBody {
    /// Reads an event from JSON; the error is in words.
    pub fn from_json(json: &[u8]) -> Result<Self, Unreadable> {
        parse_object(json)
    }

    /// Checks the event; `traceparent` comes from the request's header.
    pub fn into_event(self, traceparent: Option<String>) -> Result<Event, Invalid> {
        Event::parse(EventParts {
            event_type: self.event_type,
            event_id: self.event_id,
            config_id: self.config_id,
            url_params: self.url_params,
            priority: self.priority,
            scheduled_at: self.scheduled_at,
            correlation_id: self.correlation_id,
            traceparent,
        })
    }
}

/// An accepted event.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReceiptView {
    /// Names the delivery.
    queue_id: Uuid,
    /// `pending`, even if it is being attempted already; for a duplicate, what has become of the delivery since.
    #[schema(schema_with = schemas::status)]
    status: &'static str,
    /// Whether the same event was accepted before, as this delivery.
    duplicate: bool,
    /// The type of the event.
    event_type: String,
    /// Names the event: your name for it, or the `queue_id`.
    event_id: String,
    /// The config that it is owed to.
    config_id: i64,
    /// What will be requested, to the letter.
    webhook_url: String,
    /// 0 (critical) to 3 (low).
    priority: i16,
    /// Attempts after the first.
    max_retries: i16,
    /// Not delivered before this time.
    scheduled_at: Option<DateTime<Utc>>,
    /// Your id for what led to the event.
    correlation_id: Option<String>,
}

impl From<NewDelivery> for ReceiptView {
    fn from(delivery: NewDelivery) -> Self {
        Self {
            queue_id: delivery.queue_id.get(),
            status: DeliveryStatus::Pending.as_str(),
            duplicate: false,
            event_type: delivery.event_type.to_string(),
            event_id: delivery.event_id,
            config_id: delivery.config_id.get(),
            webhook_url: delivery.webhook_url,
            priority: delivery.priority.get().into(),
            max_retries: delivery.max_retries.into(),
            scheduled_at: delivery.scheduled_at,
            correlation_id: delivery.correlation_id,
        }
    }
}

impl ReceiptView {
    /// The receipt of an event that was accepted before, as `first`.
    pub fn duplicate_of(first: Delivery) -> Self {
        Self {
            queue_id: first.queue_id.get(),
            status: first.state.status().as_str(),
            duplicate: true,
            event_type: first.event_type,
            event_id: first.event_id,
            config_id: first.config_id.get(),
            webhook_url: first.webhook_url,
            priority: first.priority.get().into(),
            max_retries: first.max_retries.into(),
            scheduled_at: first.state.next_retry_at().filter(|_| first.attempts.is_empty()),
            correlation_id: first.correlation_id,
        }
    }
}
