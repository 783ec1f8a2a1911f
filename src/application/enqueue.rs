//! Accepts events. Each becomes a delivery, which is stored before its caller gets an answer.

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::batching::{BatchError, Batcher, kib};
use super::directory::EndpointDirectory;
use super::ports::{DeliveryQueue, StoreError, Stored};
use super::storing::Store;
use super::wakeup::Wakeup;
use super::workers::WorkerPool;
use crate::domain::delivery::{NewDelivery, QueueId};
use crate::domain::endpoint::EndpointId;
use crate::domain::event::Event;
use crate::domain::invalid::Invalid;

/// The most deliveries that one transaction stores.
const BATCH_MAX: usize = 500;
/// Upper bound, in KiB, for the deliveries that wait to be stored.
const BUFFER_KIB_MAX: usize = 6 * 1024;
/// Upper bound, in KiB of request text, for events of bulk callers that are in flight. It is less than the buffer, so that
/// bulk callers never fill it. It is enough for one batch that is being stored and the next one.
const BULK_KIB_MAX: u32 = 2 * 1024;
/// An enqueue is given up after its endpoint has changed this many times meanwhile.
const LOOKS_MAX: usize = 4;

/// What a caller learns of an accepted event.
#[derive(Debug, Clone)]
pub struct Receipt {
    pub queue_id: QueueId,
    /// The delivery as it was stored; `None` if the same event had been accepted before.
    pub stored: Option<Arc<NewDelivery>>,
}

impl Receipt {
    /// Whether the same event had been accepted before, as this delivery.
    pub fn is_duplicate(&self) -> bool {
        self.stored.is_none()
    }
}

/// Why an event was not accepted.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EnqueueError {
    /// There is no such endpoint, or it was deleted.
    #[error("there is no config {0}")]
    UnknownEndpoint(EndpointId),
    /// The same event was accepted before and its delivery was cancelled since: it will not be delivered.
    #[error(
        "the same event was accepted before, and its delivery {0} was cancelled; replay that one to send it"
    )]
    Cancelled(QueueId),
    /// The event cannot be delivered to this endpoint.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("too many events are waiting to be stored")]
    Overloaded,
    /// The event could not be stored in time. It may still be stored later.
    #[error("the event could not be stored in time")]
    TimedOut,
    #[error(transparent)]
    Store(#[from] StoreError),
}

pub struct Enqueue {
    directory: Arc<EndpointDirectory>,
    deliveries: Batcher<Arc<NewDelivery>, Stored>,
    bulk_room: Semaphore,
    patience: Duration,
}

impl Enqueue {
    /// Starts the batcher that stores deliveries. If there are `workers`, they attempt at once what they have slots for. An
    /// enqueue is given up after `patience`.
    pub fn start(
        directory: Arc<EndpointDirectory>,
        queue: Arc<dyn DeliveryQueue>,
        wakeup: Arc<Wakeup>,
        workers: Option<Arc<WorkerPool>>,
        patience: Duration,
    ) -> Self {
        let deliveries = Batcher::start(Store::new(queue, wakeup, workers), BATCH_MAX, BUFFER_KIB_MAX);
        Self { directory, deliveries, bulk_room: Semaphore::new(BULK_KIB_MAX as usize), patience }
    }

    /// Accepts one event. Refuses it at once if too many are waiting.
    pub async fn accept(&self, event: &Event) -> Result<Receipt, EnqueueError> {
        let deadline = Instant::now() + self.patience;
        timeout_at(deadline, self.store(event, false)).await.unwrap_or(Err(EnqueueError::TimedOut))
    }

    /// Waits until there is room for one event of a bulk caller, `bytes` of text long. Hold the permit until the event is
    /// accepted.
    pub async fn bulk_room(&self, bytes: usize) -> SemaphorePermit<'_> {
        let kib = kib(bytes).clamp(1, BULK_KIB_MAX);
        self.bulk_room.acquire_many(kib).await.expect("the semaphore is never closed")
    }

    /// Accepts one event of a bulk caller, who waits if too many are waiting.
    pub async fn accept_of_many(&self, event: &Event) -> Result<Receipt, EnqueueError> {
        self.store(event, true).await
    }

    /// Stores a replay, which was made from `delivery.config_revision` of its endpoint.
    pub async fn accept_replay(&self, delivery: NewDelivery) -> Result<Stored, EnqueueError> {
        let deadline = Instant::now() + self.patience;
        let weight = delivery.weight();
        let written = timeout_at(deadline, self.deliveries.process(Arc::new(delivery), weight)).await;
        Ok(written.map_err(|_| EnqueueError::TimedOut)??)
    }

    async fn store(&self, event: &Event, wait_for_room: bool) -> Result<Receipt, EnqueueError> {
        event.check_schedule(Utc::now())?;
        let id = event.config_id();
        let mut endpoint = self.directory.recent(id).await?;
        for _ in 0..LOOKS_MAX {
            let known =
                endpoint.filter(|e| e.deleted_at.is_none()).ok_or(EnqueueError::UnknownEndpoint(id))?;
            let delivery = match NewDelivery::new(QueueId::new(Uuid::now_v7()), event, &known) {
                Ok(delivery) => Arc::new(delivery),
                Err(invalid) => {
                    // the remembered endpoint may be older than the URL that it lacks
                    endpoint = self.directory.other_than(id, known.updated_at).await?;
                    match &endpoint {
                        Some(current) if current.updated_at != known.updated_at => continue,
                        Some(_) | None => return Err(invalid.into()),
                    }
                }
            };
            let (queue_id, weight) = (delivery.queue_id, delivery.weight());
            let written = if wait_for_room {
                self.deliveries.process_when_room(delivery.clone(), weight).await?
            } else {
                self.deliveries.process(delivery.clone(), weight).await?
            };
            match written {
                Stored::New { .. } => return Ok(Receipt { queue_id, stored: Some(delivery) }),
                Stored::Duplicate { first, cancelled: true } => return Err(EnqueueError::Cancelled(first)),
                Stored::Duplicate { first, cancelled: false } => {
                    return Ok(Receipt { queue_id: first, stored: None });
                }
                Stored::EndpointChanged => {
                    endpoint = self.directory.other_than(id, known.updated_at).await?;
                }
            }
        }
        Err(EnqueueError::Overloaded)
    }
}

impl From<BatchError> for EnqueueError {
    fn from(error: BatchError) -> Self {
        match error {
            BatchError::Full | BatchError::Stopped => Self::Overloaded,
            BatchError::Store(error) => Self::Store(error),
        }
    }
}
