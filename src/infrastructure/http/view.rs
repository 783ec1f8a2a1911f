//! What goes out and comes in as JSON: the shapes of the contract, made from domain values and turned into them.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::schemas;
use crate::application::ports::Statistics;
use crate::domain::attempt::Attempt;
use crate::domain::circuit::CircuitParts;
use crate::domain::delivery::{Delivery, DeliveryStatus, NewDelivery};
use crate::domain::endpoint::{Endpoint, EndpointParts, EndpointUrl};
use crate::domain::event::{Event, EventParts};
use crate::domain::invalid::Invalid;
use crate::domain::millis;
use crate::domain::statistics::Held;
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
    pub fn from_json(json: &str) -> anyhow::Result<Self> {
        super::extract::parse_object(json.as_bytes())
            .map_err(|error| anyhow::Error::msg(error.detail().to_owned()))
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
            replay_of: delivery.replay_of.map(crate::domain::delivery::QueueId::get),
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
        }
    }
}

/// A page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Hand this in as `cursor` for the next page; `null`: this was the last.
    pub next_cursor: Option<String>,
}

impl<T> Page<T> {
    /// A page of at most `limit` items; if it is full, the last of them names the next one.
    pub fn new<Item: Into<T>>(items: Vec<Item>, limit: usize, cursor: impl FnOnce(&Item) -> String) -> Self {
        let next_cursor = items.get(limit - 1).map(cursor);
        Self { items: items.into_iter().map(Into::into).collect(), next_cursor }
    }
}

/// Deliveries and attempts, counted.
#[derive(Debug, Serialize, ToSchema)]
pub struct StatisticsView {
    /// The time from which terminal deliveries are counted; `null`: all that are kept.
    from: Option<DateTime<Utc>>,
    /// All deliveries.
    total: u64,
    /// Those that wait: for a worker, for a later time, or because they are held.
    pending: u64,
    /// Those under a lease.
    processing: u64,
    /// Those that the receiver has.
    completed: u64,
    /// Dead letters.
    failed: u64,
    /// Those ended on request.
    cancelled: u64,
    /// Requests made.
    attempts: u64,
    /// Requests after the first of each delivery.
    retries: u64,
    /// Completed ones among the completed and failed, from 0 to 1; `null` if there are none.
    success_rate: Option<f64>,
    /// Attempts that succeeded among all attempts, from 0 to 1; `null` if there are none. Unlike `success_rate` it falls
    /// with each failure, also while a delivery is still retried. Failed probes are no attempts.
    attempt_success_rate: Option<f64>,
    /// What attempts took; `null` if there were none.
    duration_ms: Option<DurationsView>,
    /// How long the oldest delivery has waited that could be claimed now; `null` if there is none.
    oldest_ready_age_ms: Option<u64>,
    /// Those of the pending that are due but may not be attempted.
    held: HeldView,
}

/// Deliveries that are due but may not be attempted, by what holds them; each is counted once.
#[derive(Debug, Serialize, ToSchema)]
pub struct HeldView {
    /// All of them.
    total: u64,
    /// By a config that is disabled.
    paused: u64,
    /// By a circuit that is open or half open.
    circuit_open: u64,
    /// By `max_in_flight` or `rate_limit_per_second`.
    limited: u64,
    /// For how long the oldest of them has been due; `null` if there is none.
    oldest_age_ms: Option<u64>,
}

impl From<Held> for HeldView {
    fn from(held: Held) -> Self {
        Self {
            total: held.total(),
            paused: held.paused,
            circuit_open: held.circuit_open,
            limited: held.limited,
            oldest_age_ms: held.oldest_age.map(millis),
        }
    }
}

/// Durations in milliseconds; percentiles are exact below 1 s, and have three significant digits from there on.
#[derive(Debug, Serialize, ToSchema)]
pub struct DurationsView {
    /// The mean.
    avg: f64,
    /// The median.
    p50: u64,
    /// The 95th percentile.
    p95: u64,
    /// The 99th percentile.
    p99: u64,
}

impl From<Statistics> for StatisticsView {
    #[expect(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
    fn from(statistics: Statistics) -> Self {
        let Statistics { from, pending, processing, completed, failed, cancelled, attempts, retries, .. } =
            statistics;
        let ended = completed + failed;
        Self {
            from,
            total: pending + processing + completed + failed + cancelled,
            pending,
            processing,
            completed,
            failed,
            cancelled,
            attempts,
            retries,
            success_rate: (ended > 0).then(|| completed as f64 / ended as f64),
            // the last attempt of a completed delivery has succeeded, and no other
            attempt_success_rate: (attempts > 0).then(|| completed as f64 / attempts as f64),
            duration_ms: statistics.duration_ms.map(|d| DurationsView {
                avg: d.avg,
                p50: d.p50,
                p95: d.p95,
                p99: d.p99,
            }),
            oldest_ready_age_ms: statistics.oldest_ready_age.map(millis),
            held: statistics.held.into(),
        }
    }
}

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
    pub fn new(endpoint: Endpoint, timeout_max: std::time::Duration) -> Self {
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
