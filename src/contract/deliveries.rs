//! Deliveries and their attempts, as they are shown.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::schemas;
use crate::domain::attempt::Attempt;
use crate::domain::delivery::{Delivery, QueueId};
use crate::domain::error_kind::ErrorKind;
use crate::domain::evidence::ResponseHeaders;

/// A delivery with its attempts.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeliveryView {
    /// Names the delivery.
    queue_id: Uuid,
    /// `+credit` or `-debit`.
    event_type: String,
    /// Names the event.
    event_id: String,
    /// The config that it is owed to.
    config_id: i64,
    /// What is requested, to the letter.
    webhook_url: String,
    /// The parameters as they were given.
    #[schema(value_type = Object)]
    pub url_params: Box<serde_json::value::RawValue>,
    /// Where it stands.
    #[schema(schema_with = schemas::status)]
    status: &'static str,
    /// Why it failed or was cancelled.
    status_reason: Option<String>,
    /// 0 (critical) to 3 (low).
    priority: i16,
    /// Number of the attempt that is next, under way, or was the last; the first attempt is number 0.
    retry_count: i16,
    /// Attempts after the first.
    max_retries: i16,
    /// When the next attempt is due.
    next_retry_at: Option<DateTime<Utc>>,
    /// Your id for what led to the event.
    correlation_id: Option<String>,
    /// W3C trace context of the enqueue.
    traceparent: Option<String>,
    /// The delivery that it repeats.
    replay_of: Option<Uuid>,
    /// When it was accepted.
    created_at: DateTime<Utc>,
    /// When it became terminal.
    completed_at: Option<DateTime<Utc>>,
    /// How many probes of it have failed, while its config's circuit was not closed. The newest 100 are kept for the audit.
    failed_probes: u32,
    /// Its attempts, in order. A look-up of one delivery shows the newest 20 of its failed probes among them, a list none.
    attempts: Vec<AttemptView>,
}

impl From<Delivery> for DeliveryView {
    fn from(delivery: Delivery) -> Self {
        Self {
            queue_id: delivery.queue_id.get(),
            event_type: delivery.event_type,
            event_id: delivery.event_id,
            config_id: delivery.config_id.get(),
            webhook_url: delivery.webhook_url,
            url_params: delivery.url_params,
            status: delivery.state.status().as_str(),
            status_reason: delivery.state.reason().map(str::to_owned),
            priority: delivery.priority.get().into(),
            retry_count: delivery.retry_count.into(),
            max_retries: delivery.max_retries.into(),
            next_retry_at: delivery.state.next_retry_at(),
            correlation_id: delivery.correlation_id,
            traceparent: delivery.traceparent,
            replay_of: delivery.replay_of.map(QueueId::get),
            created_at: delivery.created_at,
            completed_at: delivery.state.completed_at(),
            failed_probes: delivery.failed_probes,
            attempts: delivery.attempts.into_iter().map(AttemptView::from).collect(),
        }
    }
}

/// One request of a delivery.
#[derive(Debug, Serialize, ToSchema)]
pub struct AttemptView {
    /// 0 is the first, 1 to 6 are retries, so attempt 6 is the seventh request.
    #[schema(minimum = 0, maximum = 6)]
    attempt: u8,
    /// Whether it was a probe of an open circuit that failed: it used up no attempt, so another has this number too.
    probe: bool,
    /// When it began.
    started_at: DateTime<Utc>,
    /// When it ended.
    completed_at: Option<DateTime<Utc>>,
    /// From connect to the end of the body, in milliseconds; `null` if nobody can know.
    duration_ms: Option<i32>,
    /// The status of the answer, if one came.
    http_status: Option<i16>,
    /// The start of the answer's body.
    response_body: Option<String>,
    /// Why it failed; `null` if it succeeded.
    error: Option<String>,
    /// The same in a word to count by.
    #[schema(schema_with = schemas::error_kind)]
    error_kind: Option<&'static str>,
    /// The IP address and port that were called; `null` if none was, or several and none of them answered.
    #[schema(example = "93.184.216.34:443")]
    remote_address: Option<String>,
    /// From the start of the attempt until the head of the answer was there, in milliseconds; `null` if it did not come.
    first_byte_ms: Option<i32>,
    /// The answer's headers without cookies: at most 32, with at most 2048 bytes. `null` if no answer came.
    response_headers: Option<BTreeMap<String, String>>,
    /// Whether `response_body` is only the start of the body, or its end was not read; `null` if no answer came.
    body_cut: Option<bool>,
}

impl From<Attempt> for AttemptView {
    fn from(attempt: Attempt) -> Self {
        Self {
            attempt: attempt.number,
            probe: attempt.probe,
            started_at: attempt.started_at,
            completed_at: attempt.completed_at,
            duration_ms: attempt.duration_ms,
            http_status: attempt.http_status,
            response_body: attempt.response_body,
            error: attempt.error,
            error_kind: attempt.error_kind.map(ErrorKind::as_str),
            remote_address: attempt.evidence.address.map(|address| address.to_string()),
            first_byte_ms: attempt.evidence.first_byte_ms,
            response_headers: attempt.evidence.headers.map(ResponseHeaders::into_map),
            body_cut: attempt.evidence.body_cut,
        }
    }
}
