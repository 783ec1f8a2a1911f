//! What the use cases need from the outside world. Each method of a store is one whole transaction.

#![warn(missing_docs)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};

use super::workers::ledger::Rooms;
use crate::domain::access::{Action, ApiKey, KeyId, NewKey, Operator, SecretDigest};
use crate::domain::attempt::AttemptOutcome;
use crate::domain::circuit::{Circuit, CircuitCommand};
use crate::domain::delivery::{
    Delivery, DeliveryStatus, FinishedAttempt, LeasedDelivery, NewDelivery, QueueId, WorkerId,
};
use crate::domain::endpoint::{Endpoint, EndpointId};
use crate::domain::endpoint_settings::EndpointSettings;
use crate::domain::error_kind::ErrorKind;
use crate::domain::event::EventType;
use crate::domain::held::Held;

/// Why the store did not do what it was asked to do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The store cannot be reached, or cannot do this now. Nothing was done.
    #[error("the database is unavailable")]
    Unavailable(#[source] Arc<anyhow::Error>),
    /// The store did not answer. It may have done what was asked, may still do it, or may never do it.
    #[error("the database did not answer")]
    InDoubt(#[source] Arc<anyhow::Error>),
    /// The store refused a value, and would refuse it again. Nothing was done.
    #[error("the database refused a value")]
    Refused(#[source] Arc<anyhow::Error>),
    /// Anything else; someone should look. Nothing was done.
    #[error("the database refused")]
    Unexpected(#[source] Arc<anyhow::Error>),
}

impl StoreError {
    /// The store's own error.
    pub fn cause(&self) -> &Arc<anyhow::Error> {
        match self {
            Self::Unavailable(cause)
            | Self::InDoubt(cause)
            | Self::Refused(cause)
            | Self::Unexpected(cause) => cause,
        }
    }

    /// The error with all of its causes, for a log line.
    pub fn report(&self) -> String {
        format!("{self}: {:#}", self.cause())
    }

    /// Whether the same call may succeed later.
    pub fn passes(&self) -> bool {
        match self {
            Self::Unavailable(_) | Self::InDoubt(_) => true,
            Self::Refused(_) | Self::Unexpected(_) => false,
        }
    }
}

/// A change by an operator. The store records it in the transaction that makes it.
#[derive(Debug, Clone)]
pub struct Change<'a> {
    /// Who asked for it.
    pub operator: &'a Operator,
    /// What is done.
    pub action: Action,
    /// What there was before, without secrets; `None` if there was nothing, or if it does not change.
    pub before: Option<serde_json::Value>,
    /// What there is after, without secrets.
    pub after: Option<serde_json::Value>,
}

impl<'a> Change<'a> {
    /// A change that needs no more words than its action.
    pub fn new(operator: &'a Operator, action: Action) -> Self {
        Self { operator, action, before: None, after: None }
    }

    /// Records what there was before.
    #[must_use]
    pub fn from(mut self, before: serde_json::Value) -> Self {
        self.before = Some(before);
        self
    }

    /// Records what there is after.
    #[must_use]
    pub fn to(mut self, after: serde_json::Value) -> Self {
        self.after = Some(after);
        self
    }
}

/// A delivery that the store should accept, perhaps under a lease.
#[derive(Debug, Clone, Copy)]
pub struct Incoming<'a> {
    /// The row to store.
    pub delivery: &'a NewDelivery,
    /// A lease that a worker wants to hold from the beginning. It is granted if the delivery is due, and its endpoint is
    /// enabled, has no limits, and has a closed circuit.
    pub lease: Option<WantedLease<'a>>,
}

/// A lease on a delivery that is about to be stored.
#[derive(Debug, Clone, Copy)]
pub struct WantedLease<'a> {
    /// The worker that will hold the lease.
    pub worker_id: &'a WorkerId,
    /// How long the lease lasts.
    pub term: Duration,
}

/// What became of a delivery that was to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// The delivery is stored and committed.
    New {
        /// When the wanted lease began, by the database's clock; `None` if no lease was granted.
        locked_at: Option<DateTime<Utc>>,
    },
    /// The same event was accepted before, as this delivery; nothing was stored.
    Duplicate {
        /// The delivery that the event made first.
        first: QueueId,
        /// Whether that delivery was cancelled: then the event will not be delivered.
        cancelled: bool,
    },
    /// The endpoint has changed since the delivery was made from it. Nothing was stored; read the endpoint again.
    EndpointChanged,
}

/// What became of the outcome of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// The outcome is committed.
    Written,
    /// The lease had passed to another worker, whose outcome counts. Nothing was written.
    LeaseLost,
}

/// A lease that nobody uses.
#[derive(Debug, Clone)]
pub struct UnusedLease {
    /// The leased delivery.
    pub queue_id: QueueId,
    /// The worker that holds the lease.
    pub worker_id: WorkerId,
    /// When it was taken, by the database's clock; `None` if it was taken when the delivery was stored.
    pub locked_at: Option<DateTime<Utc>>,
}

/// The leases that the workers of a process want.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The workers that will hold the leases: at most one lease per entry.
    pub worker_ids: Vec<WorkerId>,
    /// How long the leases last.
    pub lease_term: Duration,
    /// The walk over the endpoints begins after this id.
    pub after: Option<EndpointId>,
    /// How many leases may be taken per endpoint.
    pub rooms: Rooms,
}

/// What a claim took.
#[derive(Debug, Default)]
pub struct Claimed {
    /// The deliveries. Each is leased by the worker at the same position of [`Claim::worker_ids`].
    pub deliveries: Vec<LeasedDelivery>,
    /// The store looked at only a part of the waiting deliveries and found fewer than were wanted: claim again at once.
    pub look_again: bool,
}

/// The result of [`DeliveryQueue::promote`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promotion {
    /// How many deliveries became ready.
    pub promoted: usize,
    /// When the next one is due, if any is scheduled.
    pub next_due_in: Option<Duration>,
}

/// The queue, as workers and enqueues use it.
#[async_trait]
pub trait DeliveryQueue: Send + Sync {
    /// Stores deliveries in one transaction. Returns one result per delivery, in order, after the commit.
    async fn enqueue(&self, deliveries: &[Incoming<'_>]) -> Result<Vec<Stored>, StoreError>;

    /// Gives back leases that nobody uses, so that their deliveries are ready again. Returns those that were found. If a lease
    /// was taken over from an expired one, the expired lease is restored.
    async fn release(&self, leases: &[UnusedLease]) -> Result<Vec<QueueId>, StoreError>;

    /// Gives back all leases of `workers`, names that are no longer in use, except for those on deliveries in `kept`. Returns
    /// the number. Reads all open deliveries.
    async fn release_lost_claims(&self, workers: &[WorkerId], kept: &[QueueId]) -> Result<u64, StoreError>;

    /// Takes leases on ready deliveries, fairly among endpoints, for the workers in their order. A delivery whose lease has
    /// expired counts as ready. Two claims never take the same delivery.
    async fn claim(&self, claim: &Claim) -> Result<Claimed, StoreError>;

    /// Takes over at most `limit` expired leases of held endpoints (disabled, or with a circuit that is not closed), so that
    /// the losses are recorded. Claims skip these endpoints.
    async fn take_over_held(
        &self,
        worker: &WorkerId,
        lease_term: Duration,
        limit: usize,
    ) -> Result<Vec<LeasedDelivery>, StoreError>;

    /// Writes attempts and moves their deliveries on, in one transaction. Returns one result per attempt, in order.
    /// An attempt whose lease was lost changes nothing, unless nobody has sent the delivery since.
    /// [`DeadLetterReason::EndpointGone`] also disables the endpoint, if the URL that answered is still one of its own.
    ///
    /// [`DeadLetterReason::EndpointGone`]: crate::domain::retry::DeadLetterReason::EndpointGone
    async fn settle(&self, attempts: &[&FinishedAttempt]) -> Result<Vec<Settled>, StoreError>;

    /// Fails while the outcome of an attempt cannot be written, because the store has no room or takes no writes. The answer may be
    /// a few seconds old.
    async fn can_settle(&self) -> Result<(), StoreError>;

    /// Returns which of these attempts are recorded exactly as given. Used after a settle that was not answered.
    async fn recorded(&self, attempts: &[&FinishedAttempt]) -> Result<Vec<QueueId>, StoreError>;

    /// Cancels the waiting delivery `delivery.replay_of` and stores `delivery` in its place, in one transaction. Returns
    /// `None` and does nothing if that delivery no longer waits.
    async fn reroute(&self, delivery: &NewDelivery, reason: &str) -> Result<Option<Stored>, StoreError>;

    /// Makes at most `limit` due deliveries ready.
    async fn promote(&self, limit: usize) -> Result<Promotion, StoreError>;
}

/// Which deliveries to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct DeliveryFilter {
    /// Only deliveries in this status.
    pub status: Option<DeliveryStatus>,
    /// Only deliveries to this endpoint.
    pub config_id: Option<EndpointId>,
    /// Only deliveries of events of this type.
    pub event_type: Option<EventType>,
    /// Only deliveries of the event with this id, as its sender named it.
    pub event_id: Option<String>,
    /// Accepted at this time or later.
    pub from: Option<DateTime<Utc>>,
    /// Accepted before this time.
    pub to: Option<DateTime<Utc>>,
    /// Accepted before this delivery: the last one of the previous page.
    pub before: Option<QueueId>,
}

/// Deliveries as people and other programs see them.
#[async_trait]
pub trait DeliveryRecords: Send + Sync {
    /// One delivery with its attempts and its newest failed probes. Reads only the archives around the time when it was
    /// accepted, unless it ended long after.
    async fn find(&self, queue_id: QueueId) -> Result<Option<Delivery>, StoreError>;

    /// At most `limit` deliveries with their attempts, newest first. Failed probes are counted but not listed.
    async fn list(&self, filter: &DeliveryFilter, limit: usize) -> Result<Vec<Delivery>, StoreError>;

    /// Pairs of a delivery in `queue_ids` and its replay. A replay is found as long as its deduplication key is kept.
    async fn replays_of(&self, queue_ids: &[QueueId]) -> Result<Vec<(QueueId, QueueId)>, StoreError>;

    /// Makes a pending delivery ready that waits for a later time. Returns whether it was one.
    async fn make_ready(&self, queue_id: QueueId, change: &Change<'_>) -> Result<bool, StoreError>;

    /// Cancels a pending delivery. Returns whether it was pending.
    async fn cancel(&self, queue_id: QueueId, reason: &str, change: &Change<'_>) -> Result<bool, StoreError>;

    /// Counts deliveries and attempts. The counts are exact; the history is not read.
    async fn statistics(&self, scope: &StatisticsScope) -> Result<Statistics, StoreError>;

    /// Counts the open deliveries. Reads all of them.
    async fn backlog(&self) -> Result<Backlog, StoreError>;

    /// How long the oldest claimable delivery has waited.
    async fn oldest_ready_age(&self) -> Result<Option<Duration>, StoreError>;
}

/// Which deliveries statistics count.
#[derive(Debug, Clone, Copy, Default)]
pub struct StatisticsScope {
    /// Count terminal deliveries of this long before now; `None` counts all that are kept. Open deliveries are counted as they
    /// are now.
    pub window: Option<Duration>,
    /// Count the deliveries of this endpoint; `None` counts those of all endpoints.
    pub config_id: Option<EndpointId>,
}

/// Deliveries and attempts, counted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Statistics {
    /// Terminal deliveries are counted from this time on; `None` if all that are kept are counted.
    pub from: Option<DateTime<Utc>>,
    /// Deliveries that wait for an attempt.
    pub pending: u64,
    /// Deliveries under a lease.
    pub processing: u64,
    /// Terminal deliveries by their status.
    pub ended: HashMap<DeliveryStatus, u64>,
    /// All attempts.
    pub attempts: u64,
    /// Attempts after the first.
    pub retries: u64,
    /// Attempts by the kind of their error.
    pub errors: BTreeMap<ErrorKind, u64>,
    /// How long attempts took; `None` if there were none.
    pub duration_ms: Option<Durations>,
    /// How long the oldest claimable delivery has waited; `None` if there is none.
    pub oldest_ready_age: Option<Duration>,
    /// Pending deliveries that are due but may not be claimed.
    pub held: Held,
}

/// Durations of attempts, in milliseconds. Percentiles of 1 s and more have three significant digits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Durations {
    /// The mean.
    pub avg: f64,
    /// The median.
    pub p50: u64,
    /// The 95th percentile.
    pub p95: u64,
    /// The 99th percentile.
    pub p99: u64,
}

/// Open deliveries, counted by what they wait for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Ready to be claimed.
    pub ready: u64,
    /// Due, but may not be claimed.
    pub held: Held,
    /// Waiting for a later time.
    pub scheduled: u64,
    /// Under a lease.
    pub processing: u64,
}

/// The stored endpoints, including deleted ones.
#[async_trait]
pub trait EndpointStore: Send + Sync {
    /// Stores a new endpoint.
    async fn register(
        &self,
        settings: &EndpointSettings,
        change: &Change<'_>,
    ) -> Result<Endpoint, StoreError>;

    /// Reads one endpoint, even if it was deleted.
    async fn find(&self, id: EndpointId) -> Result<Option<Endpoint>, StoreError> {
        Ok(self.find_all(&[id]).await?.pop())
    }

    /// Reads endpoints, even if they were deleted. Ids that do not exist are left out; repeated ids are returned once.
    async fn find_all(&self, ids: &[EndpointId]) -> Result<Vec<Endpoint>, StoreError>;

    /// At most `limit` endpoints that are not deleted, in the order of their ids, after `after`.
    async fn list(&self, after: Option<EndpointId>, limit: usize) -> Result<Vec<Endpoint>, StoreError>;

    /// Replaces the settings and applies `command` to the circuit. Returns `None` and does nothing if the endpoint is no
    /// longer at `revision`, or was deleted.
    async fn change(
        &self,
        id: EndpointId,
        revision: DateTime<Utc>,
        settings: &EndpointSettings,
        command: Option<CircuitCommand>,
        change: &Change<'_>,
    ) -> Result<Option<Endpoint>, StoreError>;

    /// Marks the endpoint as deleted: from then on nothing is accepted for it. Returns false if it was deleted before.
    async fn delete(&self, id: EndpointId, change: &Change<'_>) -> Result<bool, StoreError>;
}

/// The API keys.
#[async_trait]
pub trait KeyStore: Send + Sync {
    /// Stores a new key.
    async fn create(
        &self,
        key: &NewKey,
        digest: &SecretDigest,
        change: &Change<'_>,
    ) -> Result<ApiKey, StoreError>;

    /// All keys, including revoked ones, in the order of their ids.
    async fn all(&self) -> Result<Vec<ApiKey>, StoreError>;

    /// The keys that are not revoked.
    async fn valid(&self) -> Result<Vec<ApiKey>, StoreError>;

    /// Revokes a key. Returns false if it was revoked before, or if there is none.
    async fn revoke(&self, id: KeyId, change: &Change<'_>) -> Result<bool, StoreError>;

    /// Notes that a key was used.
    async fn note_use(&self, id: KeyId) -> Result<(), StoreError>;
}

/// A circuit that is not closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldCircuit {
    /// The endpoint that the circuit belongs to.
    pub config_id: EndpointId,
    /// The state of the circuit, with its reason.
    pub circuit: Circuit,
}

/// The lease that a probe was sent under. A circuit counts its probe as lost when this ends, and then another may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeLease {
    /// When it was taken, by the database's clock.
    pub began: DateTime<Utc>,
    /// How long it lasts.
    pub term: Duration,
}

/// A probe that did not close its circuit.
#[derive(Debug, Clone)]
pub struct UnsuccessfulProbe {
    /// The failure in words, as the API shows it.
    pub error: String,
    /// Whether the receiver is failing. If so, the cool-down before the next probe doubles; if not, it is the first one again.
    pub receiver_fails: bool,
    /// How long the receiver asked to be left alone; zero if it did not ask.
    pub retry_after: Duration,
}

/// The circuits of endpoints, shared by all processes. Claims turn open circuits into half-open ones.
#[async_trait]
pub trait CircuitStore: Send + Sync {
    /// Opens a closed circuit, because of attempts at `url`. Returns the time until the first probe. Returns `None` and does
    /// nothing if the circuit was not closed, if it closed less than `counted_for` ago (failures from before it closed no
    /// longer count), or if `url` is no longer a URL of the endpoint.
    async fn open(
        &self,
        id: EndpointId,
        url: &str,
        reason: &str,
        counted_for: Duration,
    ) -> Result<Option<Duration>, StoreError>;

    /// Reopens a half-open circuit after a probe that failed. Returns the time until the next probe. Returns `None` and does
    /// nothing if the circuit was not half open, or if another probe was sent since.
    async fn reopen(
        &self,
        id: EndpointId,
        lease: ProbeLease,
        probe: &UnsuccessfulProbe,
    ) -> Result<Option<Duration>, StoreError>;

    /// Reopens a half-open circuit after a probe that found out nothing. The next probe is due at once. Does nothing if another
    /// probe was sent since.
    async fn probe_another(&self, id: EndpointId, lease: ProbeLease) -> Result<(), StoreError>;

    /// Makes the probe of an open circuit due now. Returns whether the circuit was open because of failures.
    async fn probe_now(&self, id: EndpointId, change: &Change<'_>) -> Result<bool, StoreError>;

    /// Closes a half-open circuit after a probe that succeeded. Returns whether it was half open.
    async fn close(&self, id: EndpointId) -> Result<bool, StoreError>;

    /// At most `limit` circuits that are not closed, in the order of their endpoints' ids, without deleted endpoints.
    async fn held(&self, limit: usize) -> Result<Vec<HeldCircuit>, StoreError>;
}

/// Sends requests to receivers.
#[async_trait]
pub trait Sender: Send + Sync {
    /// Makes one attempt within the endpoint's time limit and returns how it ended. `None` means that nothing was sent,
    /// because this process stood still until it was too late to begin.
    async fn send(&self, delivery: &LeasedDelivery, endpoint: &Endpoint) -> Option<AttemptOutcome>;
}
