//! What the use cases need of the world outside. Each method is one whole transaction.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};

use super::floors::Floor;
use super::shares::Rooms;
use crate::domain::attempt::AttemptOutcome;
use crate::domain::circuit::{Circuit, CircuitCommand};
use crate::domain::delivery::{
    Delivery, DeliveryStatus, FinishedAttempt, LeasedDelivery, NewDelivery, QueueId, WorkerId,
};
use crate::domain::endpoint::{Endpoint, EndpointId, EndpointSettings};
use crate::domain::event::EventType;

/// The store could not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// It cannot be reached, or did not answer in time. What was asked may or may not have been done.
    #[error("the database is unavailable")]
    Unavailable(#[source] Arc<anyhow::Error>),
    /// Anything else; someone should look.
    #[error("the database refused")]
    Unexpected(#[source] Arc<anyhow::Error>),
}

/// A delivery that is to be stored.
#[derive(Debug, Clone, Copy)]
pub struct Incoming<'a> {
    /// As it is to be stored.
    pub delivery: &'a NewDelivery,
    /// Who would like to hold a lease on it from the beginning, and for how long. It is granted where the delivery is due,
    /// and its endpoint is enabled, without limits, and has a closed circuit.
    pub lease: Option<(&'a WorkerId, Duration)>,
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
    Duplicate(QueueId),
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

/// Which leases workers want.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Who will hold them: one lease for each entry at most.
    pub worker_ids: Vec<WorkerId>,
    /// For how long.
    pub lease: Duration,
    /// The walk over the endpoints begins after this one.
    pub after: Option<EndpointId>,
    /// How much may be taken from single endpoints.
    pub rooms: Rooms,
    /// From where on to look.
    pub floors: Vec<Floor>,
    /// Take instead the expired leases of endpoints that are disabled, or whose circuit is not closed, so that their
    /// loss is recorded.
    pub held: bool,
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

    /// Makes deliveries ready again that may have been stored under leases which nobody uses. Answers which of them were.
    async fn release(&self, leases: &[(QueueId, WorkerId)]) -> Result<Vec<QueueId>, StoreError>;

    /// Takes leases on ready deliveries, fairly among endpoints, for the workers in their order. An expired lease counts
    /// as ready.
    /// Two claims never take the same delivery.
    async fn claim(&self, claim: &Claim) -> Result<Vec<LeasedDelivery>, StoreError>;

    /// Writes attempts and moves their deliveries on, in one transaction; answers for each, in order.
    /// An attempt whose lease was lost changes nothing. [`DeadLetterReason::EndpointGone`] also disables the endpoint.
    ///
    /// [`DeadLetterReason::EndpointGone`]: crate::domain::retry::DeadLetterReason::EndpointGone
    async fn settle(&self, attempts: &[FinishedAttempt]) -> Result<Vec<Settled>, StoreError>;

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
    /// One delivery with its attempts.
    async fn find(&self, queue_id: QueueId) -> Result<Option<Delivery>, StoreError>;

    /// At most `limit` deliveries with their attempts, newest first.
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
    /// How long the oldest delivery has waited that could be claimed now, in milliseconds.
    pub oldest_ready_age_ms: Option<u64>,
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
    /// Ready to be claimed, or held by a disabled endpoint.
    pub ready: u64,
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

/// The circuits of endpoints, which all processes share. Claims turn open ones into half-open ones.
#[async_trait]
pub trait CircuitStore: Send + Sync {
    /// Opens a closed circuit. Answers when the first probe is due; `None` if it was not closed.
    async fn open(&self, id: EndpointId, reason: &str) -> Result<Option<Duration>, StoreError>;

    /// Opens a half-open circuit again, since its probe failed. Answers when the next one is due; `None` if it was not
    /// half open.
    async fn reopen(&self, id: EndpointId, reason: &str) -> Result<Option<Duration>, StoreError>;

    /// Closes a half-open circuit, since its probe succeeded. Answers whether it was half open.
    async fn close(&self, id: EndpointId) -> Result<bool, StoreError>;

    /// At most `limit` circuits that are not closed, of endpoints that are not deleted, by id.
    async fn held(&self, limit: usize) -> Result<Vec<HeldCircuit>, StoreError>;
}

/// What must be done from time to time, by any process.
#[async_trait]
pub trait Upkeep: Send + Sync {
    /// Makes sure that there are archives for today and the days ahead. Answers how many were made.
    async fn ensure_archives(&self) -> Result<u64, StoreError>;

    /// Indexes the archives whose day is over. Answers how many.
    async fn index_closed_archives(&self) -> Result<u64, StoreError>;

    /// Drops what is older than `retention`. Answers how many archives.
    async fn drop_archives(&self, retention: Duration) -> Result<u64, StoreError>;

    /// Forgets the statistics of archives that were dropped. Answers how many rows.
    async fn forget_statistics(&self) -> Result<u64, StoreError>;

    /// Forgets events that were accepted longer than `retention` ago. Answers how many.
    async fn forget_events(&self, retention: Duration) -> Result<u64, StoreError>;

    /// Forgets failed probes that ended longer than `retention` ago. Answers how many.
    async fn forget_probes(&self, retention: Duration) -> Result<u64, StoreError>;

    /// Counts what was settled since the last time, unless another process does, or has counted what was settled within
    /// `recent`. Answers how many deliveries.
    async fn count_statistics(&self, recent: Duration) -> Result<u64, StoreError>;

    /// Merges old statistics into longer periods.
    async fn coarsen_statistics(&self) -> Result<u64, StoreError>;

    /// Cancels a bounded number of open deliveries of deleted endpoints. Answers how many.
    async fn cancel_orphans(&self) -> Result<u64, StoreError>;
}

/// Sends requests to receivers.
#[async_trait]
pub trait Sender: Send + Sync {
    /// Makes one attempt and tells how it ended, within the endpoint's time limit. Never fails.
    async fn send(&self, delivery: &LeasedDelivery, endpoint: &Endpoint) -> AttemptOutcome;
}
