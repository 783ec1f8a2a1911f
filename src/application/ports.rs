//! What the use cases need of the world outside. Each method is one whole transaction.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};

use super::workers::ledger::Rooms;
use crate::domain::attempt::AttemptOutcome;
use crate::domain::circuit::{Circuit, CircuitCommand};
use crate::domain::delivery::{
    Delivery, DeliveryStatus, FinishedAttempt, LeasedDelivery, NewDelivery, QueueId, WorkerId,
};
use crate::domain::endpoint::{Endpoint, EndpointId};
use crate::domain::endpoint_settings::EndpointSettings;
use crate::domain::event::EventType;
use crate::domain::statistics::Held;

/// The store could not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// It cannot be reached, or cannot do it for now. Nothing was done.
    #[error("the database is unavailable")]
    Unavailable(#[source] Arc<anyhow::Error>),
    /// It did not answer. What was asked may have been done, may still be done, or not.
    #[error("the database did not answer")]
    InDoubt(#[source] Arc<anyhow::Error>),
    /// It refused what it was given, and would refuse it again. Nothing was done.
    #[error("the database refused a value")]
    Refused(#[source] Arc<anyhow::Error>),
    /// Anything else; someone should look. Nothing was done.
    #[error("the database refused")]
    Unexpected(#[source] Arc<anyhow::Error>),
}

impl StoreError {
    /// What the store said.
    pub fn cause(&self) -> &Arc<anyhow::Error> {
        match self {
            Self::Unavailable(cause)
            | Self::InDoubt(cause)
            | Self::Refused(cause)
            | Self::Unexpected(cause) => cause,
        }
    }

    /// What went wrong, with all of its causes, for a log line.
    pub fn report(&self) -> String {
        format!("{self}: {:#}", self.cause())
    }

    /// Whether it passes by itself, so that the same may succeed later.
    pub fn passes(&self) -> bool {
        match self {
            Self::Unavailable(_) | Self::InDoubt(_) => true,
            Self::Refused(_) | Self::Unexpected(_) => false,
        }
    }
}

/// A delivery that is to be stored.
#[derive(Debug, Clone, Copy)]
pub struct Incoming<'a> {
    /// As it is to be stored.
    pub delivery: &'a NewDelivery,
    /// A lease that someone would like to hold on it from the beginning. It is granted if the delivery is due, and its endpoint
    /// is enabled, without limits, and has a closed circuit.
    pub lease: Option<WantedLease<'a>>,
}

/// A lease on a delivery that is about to be stored.
#[derive(Debug, Clone, Copy)]
pub struct WantedLease<'a> {
    /// Who would hold it.
    pub worker_id: &'a WorkerId,
    /// For how long.
    pub term: Duration,
}

/// What became of a delivery that was to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// It is stored and committed.
    New {
        /// Under the lease that was wanted for it, from this time on, by the database's clock.
        locked_at: Option<DateTime<Utc>>,
    },
    /// The same event was accepted before, as this delivery; nothing was stored.
    Duplicate {
        /// The delivery.
        first: QueueId,
        /// Whether it was cancelled, so that the event will not be delivered.
        cancelled: bool,
    },
    /// The endpoint is not the one that the delivery was made from: look again. Nothing was stored.
    EndpointChanged,
}

/// What became of the outcome of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// It is written.
    Written,
    /// The lease had passed to another worker, whose outcome counts; nothing was written.
    LeaseLost,
}

/// A lease that nobody uses.
#[derive(Debug, Clone)]
pub struct UnusedLease {
    /// The delivery.
    pub queue_id: QueueId,
    /// Who holds it.
    pub worker_id: WorkerId,
    /// When it was taken, by the database's clock; `None`: as the delivery was stored.
    pub locked_at: Option<DateTime<Utc>>,
}

/// Which leases workers want.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Who will hold them: one lease for each entry at most.
    pub worker_ids: Vec<WorkerId>,
    /// For how long.
    pub lease_term: Duration,
    /// The walk over the endpoints begins after this one.
    pub after: Option<EndpointId>,
    /// How much may be taken from single endpoints.
    pub rooms: Rooms,
}

/// What a claim took.
#[derive(Debug, Default)]
pub struct Claimed {
    /// The deliveries, each under a lease of the worker at the same place of [`Claim::worker_ids`].
    pub deliveries: Vec<LeasedDelivery>,
    /// The store looked at a part of what waits, and found less than it may give: claim the rest at once.
    pub look_again: bool,
}

/// What promotion found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promotion {
    /// How many deliveries became ready.
    pub promoted: usize,
    /// When the next one is due, if any is scheduled.
    pub next_due_in: Option<Duration>,
}

/// The queue's hot path.
#[async_trait]
pub trait DeliveryQueue: Send + Sync {
    /// Stores deliveries in one transaction and answers for each, in order, after the commit.
    async fn enqueue(&self, deliveries: &[Incoming<'_>]) -> Result<Vec<Stored>, StoreError>;

    /// Gives back leases that nobody uses, so that their deliveries are ready again. Answers which of them there were. A
    /// lease that was taken over from another is that other one again.
    async fn release(&self, leases: &[UnusedLease]) -> Result<Vec<QueueId>, StoreError>;

    /// Gives back all leases of `workers`, who are no more, but for those on the deliveries in `kept`. Answers how many.
    /// Reads all that is open.
    async fn release_lost_claims(&self, workers: &[WorkerId], kept: &[QueueId]) -> Result<u64, StoreError>;

    /// Takes leases on ready deliveries, fairly among endpoints, for the workers in their order. An expired lease counts
    /// as ready.
    /// Two claims never take the same delivery.
    async fn claim(&self, claim: &Claim) -> Result<Claimed, StoreError>;

    /// Takes over at most `limit` expired leases of endpoints that are held (disabled, or with a circuit that is not closed),
    /// so that the losses are recorded: no claim comes there.
    async fn take_over_held(
        &self,
        worker: &WorkerId,
        lease_term: Duration,
        limit: usize,
    ) -> Result<Vec<LeasedDelivery>, StoreError>;

    /// Writes attempts and moves their deliveries on, in one transaction; answers for each, in order.
    /// An attempt whose lease was lost changes nothing, unless nobody has sent the delivery since.
    /// [`DeadLetterReason::EndpointGone`] also disables the endpoint, if the URL that answered is still one of its own.
    ///
    /// [`DeadLetterReason::EndpointGone`]: crate::domain::retry::DeadLetterReason::EndpointGone
    async fn settle(&self, attempts: &[&FinishedAttempt]) -> Result<Vec<Settled>, StoreError>;

    /// Which of these attempts are recorded as they are here: settles that were in doubt.
    async fn recorded(&self, attempts: &[&FinishedAttempt]) -> Result<Vec<QueueId>, StoreError>;

    /// Cancels `delivery.replay_of`, if it waits, and stores `delivery` in its place, in one transaction. `None` if it does
    /// not wait any more; nothing is done then.
    async fn reroute(&self, delivery: &NewDelivery, reason: &str) -> Result<Option<Stored>, StoreError>;

    /// Makes at most `limit` deliveries ready whose time has come.
    async fn promote(&self, limit: usize) -> Result<Promotion, StoreError>;
}

/// Which deliveries to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct DeliveryFilter {
    /// In this status.
    pub status: Option<DeliveryStatus>,
    /// To this endpoint.
    pub config_id: Option<EndpointId>,
    /// Of this type.
    pub event_type: Option<EventType>,
    /// Of this event.
    pub event_id: Option<String>,
    /// Accepted at this time or later.
    pub from: Option<DateTime<Utc>>,
    /// Accepted before this time.
    pub to: Option<DateTime<Utc>>,
    /// Accepted before this delivery.
    pub before: Option<QueueId>,
}

/// Deliveries as people and other programs see them.
#[async_trait]
pub trait DeliveryRecords: Send + Sync {
    /// One delivery with its attempts and its newest failed probes. Touches no archives but those near to the time when it
    /// was accepted, unless it ended long after.
    async fn find(&self, queue_id: QueueId) -> Result<Option<Delivery>, StoreError>;

    /// At most `limit` deliveries with their attempts, newest first. Failed probes are counted, but not among them.
    async fn list(&self, filter: &DeliveryFilter, limit: usize) -> Result<Vec<Delivery>, StoreError>;

    /// Those of the deliveries that were replayed, as long as that is remembered, each with its replay.
    async fn replays_of(&self, queue_ids: &[QueueId]) -> Result<Vec<(QueueId, QueueId)>, StoreError>;

    /// Makes a pending delivery that waits for a later time ready now. Answers whether it was one.
    async fn make_ready(&self, queue_id: QueueId) -> Result<bool, StoreError>;

    /// Cancels a pending delivery. Answers whether it was one.
    async fn cancel(&self, queue_id: QueueId, reason: &str) -> Result<bool, StoreError>;

    /// Counts deliveries and attempts: exactly, and without reading the history.
    async fn statistics(&self, scope: &StatisticsScope) -> Result<Statistics, StoreError>;

    /// How much is open. Reads all of it.
    async fn backlog(&self) -> Result<Backlog, StoreError>;

    /// How long the oldest delivery has waited that could be claimed now.
    async fn oldest_ready_age(&self) -> Result<Option<Duration>, StoreError>;
}

/// What statistics are asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct StatisticsScope {
    /// Terminal deliveries of this long; all that are kept, if `None`. Open deliveries are counted as they are now.
    pub window: Option<Duration>,
    /// Of this endpoint; of all, if `None`.
    pub config_id: Option<EndpointId>,
}

/// Deliveries and attempts, counted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Statistics {
    /// The time from which terminal deliveries are counted; `None`: all that are kept.
    pub from: Option<DateTime<Utc>>,
    /// Deliveries that wait.
    pub pending: u64,
    /// Deliveries under a lease.
    pub processing: u64,
    /// Deliveries that the receiver has.
    pub completed: u64,
    /// Dead letters.
    pub failed: u64,
    /// Deliveries ended on request.
    pub cancelled: u64,
    /// All attempts.
    pub attempts: u64,
    /// Attempts after the first.
    pub retries: u64,
    /// What attempts took.
    pub duration_ms: Option<Durations>,
    /// How long the oldest delivery has waited that could be claimed now.
    pub oldest_ready_age: Option<Duration>,
    /// Those of the pending that are due but may not be claimed.
    pub held: Held,
}

/// Durations of attempts, in milliseconds; percentiles from 1 s on to three significant digits.
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

/// How much is open.
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

/// Endpoints, as they are kept. Deleted ones are kept too.
#[async_trait]
pub trait EndpointStore: Send + Sync {
    /// Stores a new endpoint.
    async fn register(&self, settings: &EndpointSettings) -> Result<Endpoint, StoreError>;

    /// The endpoint as it is now, deleted or not.
    async fn find(&self, id: EndpointId) -> Result<Option<Endpoint>, StoreError> {
        Ok(self.find_all(&[id]).await?.pop())
    }

    /// Those of the endpoints that there are, each once, as they are now, deleted or not.
    async fn find_all(&self, ids: &[EndpointId]) -> Result<Vec<Endpoint>, StoreError>;

    /// At most `limit` endpoints that are not deleted, by id, after `after`.
    async fn list(&self, after: Option<EndpointId>, limit: usize) -> Result<Vec<Endpoint>, StoreError>;

    /// Replaces the settings, and does `command` to the circuit, if the endpoint is still at `revision` and not deleted;
    /// `None` if not.
    async fn change(
        &self,
        id: EndpointId,
        revision: DateTime<Utc>,
        settings: &EndpointSettings,
        command: Option<CircuitCommand>,
    ) -> Result<Option<Endpoint>, StoreError>;

    /// Marks the endpoint as deleted: from then on nothing is accepted for it. Answers whether it was not yet.
    async fn delete(&self, id: EndpointId) -> Result<bool, StoreError>;
}

/// A circuit that is not closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldCircuit {
    /// Whose it is.
    pub config_id: EndpointId,
    /// As it is, and why.
    pub circuit: Circuit,
}

/// A probe that did not close its circuit.
#[derive(Debug, Clone)]
pub struct UnsuccessfulProbe {
    /// How it failed, in words.
    pub error: String,
    /// Whether the receiver is failing: then the next probe comes after twice the time. If not, after the first cool-down.
    pub receiver_fails: bool,
    /// How long the receiver asks to be left alone.
    pub retry_after: Duration,
}

/// The circuits of endpoints, which all processes share. Claims turn open ones into half-open ones.
#[async_trait]
pub trait CircuitStore: Send + Sync {
    /// Opens a closed circuit, because of attempts at `url`. Answers when the first probe is due; `None` if it was not
    /// closed, has closed less than `counted_for` ago (what was counted until then counts no more), or if the endpoint is at
    /// `url` no longer.
    async fn open(
        &self,
        id: EndpointId,
        url: &str,
        reason: &str,
        counted_for: Duration,
    ) -> Result<Option<Duration>, StoreError>;

    /// Opens a half-open circuit again, after a probe. Answers when the next one is due; `None` if it was not half open.
    async fn reopen(&self, id: EndpointId, probe: &UnsuccessfulProbe)
    -> Result<Option<Duration>, StoreError>;

    /// Opens a half-open circuit again, after a probe that found out nothing: the next one is due at once.
    async fn probe_another(&self, id: EndpointId) -> Result<(), StoreError>;

    /// Makes the probe of an open circuit due now. Answers whether it was open, by failures.
    async fn probe_now(&self, id: EndpointId) -> Result<bool, StoreError>;

    /// Closes a half-open circuit, since its probe succeeded. Answers whether it was half open.
    async fn close(&self, id: EndpointId) -> Result<bool, StoreError>;

    /// At most `limit` circuits that are not closed, of endpoints that are not deleted, by id.
    async fn held(&self, limit: usize) -> Result<Vec<HeldCircuit>, StoreError>;
}

/// Sends requests to receivers.
#[async_trait]
pub trait Sender: Send + Sync {
    /// Makes one attempt and answers how it ended, within the endpoint's time limit. `None`: nothing was sent, because this
    /// process stood still until it was too late to begin.
    async fn send(&self, delivery: &LeasedDelivery, endpoint: &Endpoint) -> Option<AttemptOutcome>;
}
