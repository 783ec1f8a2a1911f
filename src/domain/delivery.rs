//! Deliveries, from acceptance through leases to the end. A delivery is one event owed to one endpoint.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::access::Operator;
use super::attempt::{Attempt, AttemptOutcome};
use super::endpoint::{Endpoint, EndpointId};
use super::event::{Event, EventType};
use super::invalid::Invalid;
use super::postback_url;
use super::retry::Verdict;

/// The id of a delivery: a UUIDv7, so ids sort by the time of acceptance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueId(Uuid);

impl QueueId {
    /// An id from a UUIDv7, fresh or stored.
    pub fn new(uuid_v7: Uuid) -> Self {
        Self(uuid_v7)
    }

    /// The UUID for the database.
    pub fn get(self) -> Uuid {
        self.0
    }
}

impl fmt::Display for QueueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for QueueId {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        Uuid::try_parse(text).map(Self).map_err(|_| Invalid::field("queue_id", "must be a UUID"))
    }
}

/// Which deliveries go first: 0 (critical) to 3 (low).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub struct Priority(u8);

impl Priority {
    /// 3: what goes last.
    pub const LOW: Self = Self(3);

    /// Accepts 0 to 3.
    pub fn parse(field: &str, number: i64) -> Result<Self, Invalid> {
        match u8::try_from(number) {
            Ok(level) if level <= Self::LOW.0 => Ok(Self(level)),
            _ => Err(Invalid::field(field, "must be from 0 (critical) to 3 (low)")),
        }
    }

    /// The number for the database: 0 to 3.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Default for Priority {
    /// 2, normal.
    fn default() -> Self {
        Self(2)
    }
}

/// The status of a delivery. [`DeliveryState`] also holds what is known in each status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeliveryStatus {
    /// Waits for a worker, or for its time.
    Pending,
    /// Under the lease of a worker.
    Processing,
    /// Accepted by the receiver.
    Completed,
    /// A dead letter: no more attempts are made.
    Failed,
    /// Ended on request, or because its endpoint was deleted.
    Cancelled,
}

impl DeliveryStatus {
    /// All statuses, in the order of a delivery's life.
    pub const ALL: [Self; 5] =
        [Self::Pending, Self::Processing, Self::Completed, Self::Failed, Self::Cancelled];

    /// The text in the API and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Processing => "processing",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// What it means, for the readers of the API.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Pending => "it waits",
            Self::Processing => "it is being attempted",
            Self::Completed => "the receiver has it",
            Self::Failed => "it is a dead letter",
            Self::Cancelled => "it was ended on request",
        }
    }

    /// Whether nothing will attempt the delivery again.
    pub fn is_terminal(self) -> bool {
        match self {
            Self::Pending | Self::Processing => false,
            Self::Completed | Self::Failed | Self::Cancelled => true,
        }
    }
}

impl fmt::Display for DeliveryStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DeliveryStatus {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        Self::ALL.into_iter().find(|status| status.as_str() == text).ok_or_else(|| {
            Invalid::field("status", "must be pending, processing, completed, failed or cancelled")
        })
    }
}

/// A delivery that is about to be accepted.
#[derive(Debug, Clone)]
pub struct NewDelivery {
    /// Its id.
    pub queue_id: QueueId,
    /// What happened.
    pub event_type: EventType,
    /// The event's name: the caller's, or the queue id if the caller gave none.
    pub event_id: String,
    /// Whether duplicates are refused: the caller named the event, or this is a replay.
    pub named: bool,
    /// The id of the endpoint.
    pub config_id: EndpointId,
    /// The revision of the endpoint that the URL was built from.
    pub config_revision: DateTime<Utc>,
    /// The complete URL.
    pub webhook_url: String,
    /// The parameters as JSON, in the order given.
    pub url_params: String,
    /// Its place among waiting deliveries.
    pub priority: Priority,
    /// The most attempts after the first: 0 to 6.
    pub max_retries: u8,
    /// The time before which nothing is sent; `None` to send at once.
    pub scheduled_at: Option<DateTime<Utc>>,
    /// The caller's id for what led to the event.
    pub correlation_id: Option<String>,
    /// The W3C trace context that it belongs to.
    pub traceparent: Option<String>,
    /// The delivery that it repeats, if it is a replay.
    pub replay_of: Option<QueueId>,
    /// Who asked for the replay.
    pub replayed_by: Option<Arc<Operator>>,
    /// Whether it may be attempted as soon as it is stored, according to this revision of the endpoint.
    pub due_at_once: bool,
}

impl NewDelivery {
    /// The delivery of `event` to `endpoint`. Fails if the endpoint lacks the URL that the event needs.
    pub fn new(queue_id: QueueId, event: &Event, endpoint: &Endpoint) -> Result<Self, Invalid> {
        let base = endpoint.url_for(event.event_type())?;
        Ok(Self {
            queue_id,
            event_type: event.event_type(),
            event_id: event.event_id().map_or_else(|| queue_id.to_string(), str::to_owned),
            named: event.event_id().is_some(),
            config_id: endpoint.id,
            config_revision: endpoint.updated_at,
            webhook_url: postback_url::build(base, event.url_params())?,
            url_params: serde_json::to_string(event.url_params())
                .expect("names are strings and values are JSON"),
            priority: event.priority().unwrap_or(endpoint.settings.priority),
            max_retries: endpoint.settings.retry.max_retries(),
            scheduled_at: event.scheduled_at(),
            correlation_id: event.correlation_id().map(str::to_owned),
            traceparent: event.traceparent().map(str::to_owned),
            replay_of: None,
            replayed_by: None,
            due_at_once: event.scheduled_at().is_none() && endpoint.is_unhindered(),
        })
    }

    /// This delivery under the `lease` that an enqueue stored it with. The enqueue began at `begun`.
    pub fn leased(&self, lease: Lease, begun: Instant) -> LeasedDelivery {
        LeasedDelivery {
            queue_id: self.queue_id,
            config_id: self.config_id,
            config_revision: self.config_revision,
            event_id: self.event_id.clone(),
            webhook_url: self.webhook_url.clone(),
            traceparent: self.traceparent.clone(),
            attempt: 0,
            max_retries: self.max_retries,
            priority: self.priority,
            probe: false,
            in_flight_limited: false,
            claimed_at: begun,
            work: Work::Attempt { waited: Duration::ZERO, starts_at: None },
            lease,
        }
    }

    /// The approximate memory of this delivery, in bytes.
    pub fn weight(&self) -> usize {
        size_of::<Self>() + self.webhook_url.len() + self.url_params.len() + self.event_id.len()
    }
}

/// A worker's time-limited right to attempt a delivery. A settle must name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The worker that holds it.
    pub worker_id: WorkerId,
    /// When it was taken, by the database's clock.
    pub locked_at: DateTime<Utc>,
}

/// The name of a worker: `host:pid:random:n`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WorkerId(std::sync::Arc<str>);

impl WorkerId {
    /// A name that no other worker has.
    pub fn new(host: &str, pid: u32, random: u32, number: usize) -> Self {
        Self(format!("{host}:{pid}:{random:08x}:{number}").into())
    }

    /// A name that comes from the store.
    pub fn from_stored(name: &str) -> Self {
        Self(name.into())
    }

    /// The text for the database.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A delivery under a lease.
#[derive(Debug, Clone)]
pub struct LeasedDelivery {
    /// Its id.
    pub queue_id: QueueId,
    /// The right to attempt it.
    pub lease: Lease,
    /// The id of the endpoint.
    pub config_id: EndpointId,
    /// The endpoint's revision when the lease was taken.
    pub config_revision: DateTime<Utc>,
    /// The event's name.
    pub event_id: String,
    /// The complete URL to request.
    pub webhook_url: String,
    /// The W3C trace context that it belongs to.
    pub traceparent: Option<String>,
    /// The number of this attempt; 0 is the first.
    pub attempt: u8,
    /// The most attempts after the first: 0 to 6.
    pub max_retries: u8,
    /// Its place among waiting deliveries.
    pub priority: Priority,
    /// Whether this attempt is a probe, which shows if the receiver is back.
    pub probe: bool,
    /// Whether the endpoint limits attempts in flight. If so, more can be claimed from it when this attempt has ended.
    pub in_flight_limited: bool,
    /// When the lease was taken, or slightly before, by this process's monotonic clock.
    pub claimed_at: Instant,
    /// What the lease is for.
    pub work: Work,
}

/// The work under a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Make the attempt.
    Attempt {
        /// How long it had been due when the lease was taken.
        waited: Duration,
        /// When it may begin, by this process's monotonic clock; `None` if the endpoint's rate is not limited.
        starts_at: Option<Instant>,
    },
    /// Record that nobody knows how this attempt ended: the previous lease expired and its worker never reported an outcome.
    RecordLoss {
        /// How long ago the previous lease was taken.
        leased_for: Duration,
    },
}

/// An attempt that ended, with its verdict. A settle writes it.
#[derive(Debug, Clone)]
pub struct FinishedAttempt {
    /// The id of the delivery.
    pub queue_id: QueueId,
    /// The lease that it was made under.
    pub lease: Lease,
    /// The id of the endpoint.
    pub config_id: EndpointId,
    /// The URL that was requested.
    pub webhook_url: String,
    /// 0 for the first attempt.
    pub number: u8,
    /// When it began and ended.
    pub times: AttemptTimes,
    /// How it ended.
    pub outcome: AttemptOutcome,
    /// What the outcome means for the delivery.
    pub verdict: Verdict,
}

/// When an attempt was made, by this process's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub enum AttemptTimes {
    /// This process made the attempt.
    Measured {
        /// Before connect.
        started: Instant,
        /// After the end of the body.
        ended: Instant,
    },
    /// A worker that was lost may have made the attempt.
    Lost {
        /// When the loss was found.
        found: Instant,
        /// How long before that the lease was taken.
        leased_for: Duration,
    },
}

impl AttemptTimes {
    /// How long before `now` the attempt began.
    pub fn age(&self, now: Instant) -> Duration {
        match *self {
            Self::Measured { started, .. } => now - started,
            Self::Lost { found, leased_for } => (now - found) + leased_for,
        }
    }

    /// The time from the beginning of the attempt to its end; for a lost one, from its lease to the finding of the loss.
    pub fn length(&self) -> Duration {
        match *self {
            Self::Measured { started, ended } => ended - started,
            Self::Lost { leased_for, .. } => leased_for,
        }
    }

    /// How long the request took; `None` if the worker was lost.
    pub fn duration(&self) -> Option<Duration> {
        match self {
            Self::Measured { .. } => Some(self.length()),
            Self::Lost { .. } => None,
        }
    }
}

/// The state of a delivery, with what is known in each status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeliveryState {
    /// Waits for a worker, or for its time.
    Pending {
        /// When the next attempt is due.
        next_retry_at: DateTime<Utc>,
    },
    /// Under the lease of a worker.
    Processing {
        /// When the attempt was due.
        next_retry_at: DateTime<Utc>,
    },
    /// Accepted by the receiver.
    Completed {
        /// When the receiver accepted it.
        at: DateTime<Utc>,
    },
    /// A dead letter: no more attempts are made.
    Failed {
        /// When it failed for good.
        at: DateTime<Utc>,
        /// Why it failed, in words.
        reason: String,
    },
    /// Ended on request, or because its endpoint was deleted.
    Cancelled {
        /// When it was cancelled.
        at: DateTime<Utc>,
        /// Why it was cancelled, in words.
        reason: String,
    },
}

/// A delivery lacks something that is known in its status.
#[derive(Debug, thiserror::Error)]
#[error("a delivery that is {0} lacks {1}")]
pub struct IncompleteState(DeliveryStatus, &'static str);

impl DeliveryState {
    /// The state from the status and from what is kept of it: when the next attempt is or was due, and the end with its reason.
    pub fn of(
        status: DeliveryStatus,
        due: Option<DateTime<Utc>>,
        ended: Option<DateTime<Utc>>,
        reason: Option<String>,
    ) -> Result<Self, IncompleteState> {
        let due = || due.ok_or(IncompleteState(status, "the time of its next attempt"));
        let at = || ended.ok_or(IncompleteState(status, "the time of its end"));
        let reason = || reason.ok_or(IncompleteState(status, "the reason of its end"));
        Ok(match status {
            DeliveryStatus::Pending => Self::Pending { next_retry_at: due()? },
            DeliveryStatus::Processing => Self::Processing { next_retry_at: due()? },
            DeliveryStatus::Completed => Self::Completed { at: at()? },
            DeliveryStatus::Failed => Self::Failed { at: at()?, reason: reason()? },
            DeliveryStatus::Cancelled => Self::Cancelled { at: at()?, reason: reason()? },
        })
    }
}

impl DeliveryState {
    /// The status without its details.
    pub fn status(&self) -> DeliveryStatus {
        match self {
            Self::Pending { .. } => DeliveryStatus::Pending,
            Self::Processing { .. } => DeliveryStatus::Processing,
            Self::Completed { .. } => DeliveryStatus::Completed,
            Self::Failed { .. } => DeliveryStatus::Failed,
            Self::Cancelled { .. } => DeliveryStatus::Cancelled,
        }
    }

    /// When the next attempt is or was due; `None` if no attempt will be made.
    pub fn next_retry_at(&self) -> Option<DateTime<Utc>> {
        match *self {
            Self::Pending { next_retry_at } | Self::Processing { next_retry_at } => Some(next_retry_at),
            Self::Completed { .. } | Self::Failed { .. } | Self::Cancelled { .. } => None,
        }
    }

    /// When the delivery became terminal; `None` if it is open.
    pub fn completed_at(&self) -> Option<DateTime<Utc>> {
        match *self {
            Self::Pending { .. } | Self::Processing { .. } => None,
            Self::Completed { at } | Self::Failed { at, .. } | Self::Cancelled { at, .. } => Some(at),
        }
    }

    /// Why the delivery failed or was cancelled; `None` if it did neither.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Pending { .. } | Self::Processing { .. } | Self::Completed { .. } => None,
            Self::Failed { reason, .. } | Self::Cancelled { reason, .. } => Some(reason),
        }
    }
}

/// A delivery as the audit shows it.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Its id.
    pub queue_id: QueueId,
    /// What happened.
    pub event_type: String,
    /// The event's name.
    pub event_id: String,
    /// The id of the endpoint.
    pub config_id: EndpointId,
    /// The complete URL.
    pub webhook_url: String,
    /// The parameters as they were given.
    pub url_params: Box<serde_json::value::RawValue>,
    /// The status, with its details.
    pub state: DeliveryState,
    /// Its place among waiting deliveries.
    pub priority: Priority,
    /// The number of the attempt that is next or under way; of the last one, if the delivery is terminal.
    pub retry_count: u8,
    /// The most attempts after the first: 0 to 6.
    pub max_retries: u8,
    /// The caller's id for what led to the event.
    pub correlation_id: Option<String>,
    /// The W3C trace context that it belongs to.
    pub traceparent: Option<String>,
    /// The delivery that it repeats, if it is a replay.
    pub replay_of: Option<QueueId>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// How many probes with it have failed, including those that are no longer kept.
    pub failed_probes: u32,
    /// Its attempts, in order. The newest failed probes are included only if the delivery was looked up alone.
    pub attempts: Vec<Attempt>,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A delivery as a worker holds it.
    pub(crate) fn leased() -> LeasedDelivery {
        LeasedDelivery {
            queue_id: QueueId::new(Uuid::now_v7()),
            lease: Lease { worker_id: WorkerId::new("test", 0, 0, 0), locked_at: DateTime::UNIX_EPOCH },
            config_id: EndpointId::from_stored(1),
            config_revision: DateTime::UNIX_EPOCH,
            event_id: String::new(),
            webhook_url: String::new(),
            traceparent: None,
            attempt: 0,
            max_retries: 6,
            priority: Priority::default(),
            probe: false,
            in_flight_limited: false,
            claimed_at: Instant::now(),
            work: Work::Attempt { waited: Duration::ZERO, starts_at: None },
        }
    }

    #[test]
    fn statuses_are_read_as_they_are_written() {
        for status in DeliveryStatus::ALL {
            assert_eq!(status.as_str().parse(), Ok(status));
        }
        assert!("done".parse::<DeliveryStatus>().is_err());
    }
}
