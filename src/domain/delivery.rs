//! Deliveries: one event owed to one endpoint each, the leases on them, and what may become of them.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::attempt::{Attempt, AttemptOutcome};
use super::endpoint::{Endpoint, EndpointId};
use super::event::{Event, EventType};
use super::invalid::Invalid;
use super::postback_url;
use super::retry::Verdict;

/// Names a delivery: a UUIDv7, so ids sort by the time of acceptance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueId(Uuid);

impl QueueId {
    /// A fresh one.
    pub fn new(uuid_v7: Uuid) -> Self {
        Self(uuid_v7)
    }

    /// As it is stored.
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
    /// The lowest.
    pub const LOW: Self = Self(3);

    /// Accepts 0 to 3.
    pub fn parse(field: &str, number: i64) -> Result<Self, Invalid> {
        match u8::try_from(number) {
            Ok(level) if level <= Self::LOW.0 => Ok(Self(level)),
            _ => Err(Invalid::field(field, "must be from 0 (critical) to 3 (low)")),
        }
    }

    /// As it is stored.
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

/// Where a delivery is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryStatus {
    /// It waits for a worker, or for its time.
    Pending,
    /// A worker holds a lease on it.
    Processing,
    /// The receiver has it.
    Completed,
    /// A dead letter.
    Failed,
    /// Ended on request.
    Cancelled,
}

impl DeliveryStatus {
    /// All, in the order of a delivery's life.
    pub const ALL: [Self; 5] =
        [Self::Pending, Self::Processing, Self::Completed, Self::Failed, Self::Cancelled];

    /// As it is spelled in the API and stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Processing => "processing",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
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
    /// Names it.
    pub queue_id: QueueId,
    /// What happened.
    pub event_type: EventType,
    /// The event's name: the caller's, or the queue id.
    pub event_id: String,
    /// Whether it is accepted once: the caller named the event, or it is a replay.
    pub named: bool,
    /// The endpoint.
    pub config_id: EndpointId,
    /// The revision of the endpoint that the URL was built from.
    pub config_revision: DateTime<Utc>,
    /// The complete URL.
    pub webhook_url: String,
    /// The parameters as JSON, in the order given.
    pub url_params: String,
    /// Which go first.
    pub priority: Priority,
    /// Attempts after the first.
    pub max_retries: u8,
    /// Not before this time.
    pub scheduled_at: Option<DateTime<Utc>>,
    /// The caller's id for what led to it.
    pub correlation_id: Option<String>,
    /// The trace that it belongs to.
    pub traceparent: Option<String>,
    /// The terminal delivery that it repeats.
    pub replay_of: Option<QueueId>,
    /// Whether it may be attempted as soon as it is stored, as far as its endpoint's revision tells.
    pub due_at_once: bool,
}

impl NewDelivery {
    /// What `event` owes to `endpoint`. Fails if the endpoint lacks the URL that the event needs.
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
            due_at_once: event.scheduled_at().is_none() && endpoint.is_unhindered(),
        })
    }

    /// The delivery as it was stored under a lease, by an enqueue that began at `begun`.
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

    /// About how much memory it takes, in bytes.
    pub fn weight(&self) -> usize {
        size_of::<Self>() + self.webhook_url.len() + self.url_params.len() + self.event_id.len()
    }
}

/// A worker's time-limited right to attempt a delivery. Whoever settles must name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Who holds it.
    pub worker_id: WorkerId,
    /// When it was taken, by the database's clock.
    pub locked_at: DateTime<Utc>,
}

/// Names a worker: `host:pid:random:n`.
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

    /// As it is stored.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A delivery under a lease.
#[derive(Debug, Clone)]
pub struct LeasedDelivery {
    /// Names it.
    pub queue_id: QueueId,
    /// The right to attempt it.
    pub lease: Lease,
    /// The endpoint.
    pub config_id: EndpointId,
    /// The endpoint's revision when the lease was taken.
    pub config_revision: DateTime<Utc>,
    /// The event's name.
    pub event_id: String,
    /// What to request.
    pub webhook_url: String,
    /// The trace that it belongs to.
    pub traceparent: Option<String>,
    /// The number of this attempt; 0 is the first.
    pub attempt: u8,
    /// Attempts after the first.
    pub max_retries: u8,
    /// Which go first.
    pub priority: Priority,
    /// Whether it is sent to see if the receiver is back.
    pub probe: bool,
    /// Whether the endpoint limits what is in flight: then more may be claimed from it once this attempt has ended.
    pub in_flight_limited: bool,
    /// When the lease was taken, or a little earlier, by this process's monotonic clock.
    pub claimed_at: Instant,
    /// What the lease is for.
    pub work: Work,
}

/// What is to be done under a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// To make the attempt.
    Attempt {
        /// How long it had been due when the lease was taken.
        waited: Duration,
        /// When it may begin, if the endpoint's rate is limited, by this process's monotonic clock.
        starts_at: Option<Instant>,
    },
    /// To record that nobody knows how this very attempt ended: the lease before expired, and its worker never reported.
    RecordLoss {
        /// How long ago that lease was taken.
        leased_for: Duration,
    },
}

/// An attempt that ended, with its verdict: what a settle writes.
#[derive(Debug, Clone)]
pub struct FinishedAttempt {
    /// The delivery.
    pub queue_id: QueueId,
    /// The lease that it was made under.
    pub lease: Lease,
    /// The endpoint.
    pub config_id: EndpointId,
    /// What was requested.
    pub webhook_url: String,
    /// 0 is the first.
    pub number: u8,
    /// When it began and ended.
    pub times: AttemptTimes,
    /// How it ended.
    pub outcome: AttemptOutcome,
    /// What that means.
    pub verdict: Verdict,
}

/// When an attempt was made, by this process's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub enum AttemptTimes {
    /// It was made here.
    Measured {
        /// Before connect.
        started: Instant,
        /// After the end of the body.
        ended: Instant,
    },
    /// It was made, or not, by a worker that was lost.
    Lost {
        /// When the loss was found.
        found: Instant,
        /// How long before that the lease was taken.
        leased_for: Duration,
    },
}

impl AttemptTimes {
    /// How long before `now` it began.
    pub fn age(&self, now: Instant) -> Duration {
        match *self {
            Self::Measured { started, .. } => now - started,
            Self::Lost { found, leased_for } => (now - found) + leased_for,
        }
    }

    /// From its beginning to its end.
    pub fn length(&self) -> Duration {
        match *self {
            Self::Measured { started, ended } => ended - started,
            Self::Lost { leased_for, .. } => leased_for,
        }
    }

    /// What the request took; unknown where the worker was lost.
    pub fn duration(&self) -> Option<Duration> {
        match self {
            Self::Measured { .. } => Some(self.length()),
            Self::Lost { .. } => None,
        }
    }
}

/// Where a delivery is in its life, with what is known of it there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeliveryState {
    /// It waits for a worker, or for its time.
    Pending {
        /// When the next attempt is due.
        next_retry_at: DateTime<Utc>,
    },
    /// A worker holds a lease on it.
    Processing {
        /// When the attempt was due.
        next_retry_at: DateTime<Utc>,
    },
    /// The receiver has it.
    Completed {
        /// Since when.
        at: DateTime<Utc>,
    },
    /// A dead letter.
    Failed {
        /// Since when.
        at: DateTime<Utc>,
        /// Why.
        reason: String,
    },
    /// Ended on request.
    Cancelled {
        /// Since when.
        at: DateTime<Utc>,
        /// By whom or why.
        reason: String,
    },
}

impl DeliveryState {
    /// The status alone.
    pub fn status(&self) -> DeliveryStatus {
        match self {
            Self::Pending { .. } => DeliveryStatus::Pending,
            Self::Processing { .. } => DeliveryStatus::Processing,
            Self::Completed { .. } => DeliveryStatus::Completed,
            Self::Failed { .. } => DeliveryStatus::Failed,
            Self::Cancelled { .. } => DeliveryStatus::Cancelled,
        }
    }

    /// When the next attempt is due, or was, if one may still be made.
    pub fn next_retry_at(&self) -> Option<DateTime<Utc>> {
        match *self {
            Self::Pending { next_retry_at } | Self::Processing { next_retry_at } => Some(next_retry_at),
            Self::Completed { .. } | Self::Failed { .. } | Self::Cancelled { .. } => None,
        }
    }

    /// When the delivery became terminal, if it did.
    pub fn completed_at(&self) -> Option<DateTime<Utc>> {
        match *self {
            Self::Pending { .. } | Self::Processing { .. } => None,
            Self::Completed { at } | Self::Failed { at, .. } | Self::Cancelled { at, .. } => Some(at),
        }
    }

    /// Why it failed or was cancelled, if so.
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
    /// Names it.
    pub queue_id: QueueId,
    /// What happened.
    pub event_type: String,
    /// The event's name.
    pub event_id: String,
    /// The endpoint.
    pub config_id: EndpointId,
    /// The complete URL.
    pub webhook_url: String,
    /// The parameters as they were given.
    pub url_params: Box<serde_json::value::RawValue>,
    /// Where it is in its life.
    pub state: DeliveryState,
    /// Which go first.
    pub priority: Priority,
    /// Number of the attempt that is next, under way, or was the last.
    pub retry_count: u8,
    /// Attempts after the first.
    pub max_retries: u8,
    /// The caller's id for what led to it.
    pub correlation_id: Option<String>,
    /// The trace that it belongs to.
    pub traceparent: Option<String>,
    /// The terminal delivery that it repeats.
    pub replay_of: Option<QueueId>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// How many probes of it have failed, those that are no longer kept included.
    pub failed_probes: u32,
    /// Its attempts, in order; if it was looked up by itself, the newest failed probes are among them.
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
