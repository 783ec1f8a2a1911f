//! Accepts events: each becomes a delivery, stored before anyone is told that it was accepted.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::batching::{BatchError, Batcher, ProcessBatch, kib};
use super::directory::EndpointDirectory;
use super::ports::{DeliveryQueue, StoreError, Stored};
use super::wakeup::Wakeup;
use crate::domain::delivery::{NewDelivery, QueueId};
use crate::domain::endpoint::EndpointId;
use crate::domain::event::Event;
use crate::domain::invalid::Invalid;

/// The most deliveries that one transaction stores.
const BATCH_MAX: usize = 500;
/// The most memory that waiting deliveries may take.
const BUFFER_KIB_MAX: usize = 6 * 1024;
/// The most memory, in text, that the events of bulk callers may take which are on their way. It is less than the buffer,
/// so that they never fill it, and enough for one batch that is being stored and the next.
const BULK_KIB_MAX: u32 = 2 * 1024;
/// An endpoint that changes as often as this during one enqueue is not waited for.
const LOOKS_MAX: usize = 4;

/// What a caller learns of an accepted event.
#[derive(Debug, Clone)]
pub struct Receipt {
    /// Names the delivery.
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
    /// The event cannot be delivered to it.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// More is waiting to be stored than fits.
    #[error("too many events are waiting to be stored")]
    Overloaded,
    /// It could not be stored in time; it may be stored later all the same.
    #[error("the event could not be stored in time")]
    TimedOut,
    /// It could not be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Accepts events.
pub struct Enqueue {
    directory: Arc<EndpointDirectory>,
    deliveries: Batcher<Arc<NewDelivery>, Stored>,
    bulk_room: Semaphore,
    patience: Duration,
}

impl Enqueue {
    /// Starts the writer behind it. An enqueue is given up after `patience`.
    pub fn start(
        directory: Arc<EndpointDirectory>,
        queue: Arc<dyn DeliveryQueue>,
        wakeup: Arc<Wakeup>,
        patience: Duration,
    ) -> Self {
        let deliveries = Batcher::start(StoreAndWake { queue, wakeup }, BATCH_MAX, BUFFER_KIB_MAX);
        Self { directory, deliveries, bulk_room: Semaphore::new(BULK_KIB_MAX as usize), patience }
    }

    /// Accepts one event; refuses it at once if too many are waiting.
    pub async fn accept(&self, event: &Event) -> Result<Receipt, EnqueueError> {
        let deadline = Instant::now() + self.patience;
        timeout_at(deadline, self.store(event, false)).await.unwrap_or(Err(EnqueueError::TimedOut))
    }

    /// Waits until there is room for an event of so many bytes of text, one of many of the same caller. Hold it until the
    /// event is accepted.
    pub async fn bulk_room(&self, bytes: usize) -> SemaphorePermit<'_> {
        let kib = kib(bytes).clamp(1, BULK_KIB_MAX);
        self.bulk_room.acquire_many(kib).await.expect("the semaphore is never closed")
    }

    /// Accepts one of many events of the same caller, who waits while too many are waiting.
    pub async fn accept_of_many(&self, event: &Event) -> Result<Receipt, EnqueueError> {
        self.store(event, true).await
    }

    /// Stores a delivery that was made from `delivery.config_revision` of its endpoint: a replay.
    pub async fn accept_replay(&self, delivery: NewDelivery) -> Result<Stored, EnqueueError> {
        let deadline = Instant::now() + self.patience;
        let weight = delivery.weight();
        let written = timeout_at(deadline, self.deliveries.process(Arc::new(delivery), weight)).await;
        Ok(written.map_err(|_| EnqueueError::TimedOut)??)
    }

    async fn store(&self, event: &Event, wait_for_room: bool) -> Result<Receipt, EnqueueError> {
        let id = event.config_id();
        let mut endpoint = self.directory.recent(id).await?;
        for _ in 0..LOOKS_MAX {
            let known =
                endpoint.filter(|e| e.deleted_at.is_none()).ok_or(EnqueueError::UnknownEndpoint(id))?;
            let delivery = match NewDelivery::new(QueueId::new(Uuid::now_v7()), event, &known) {
                Ok(delivery) => Arc::new(delivery),
                Err(invalid) => {
                    // what is remembered may be older than the URL that is missing
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
                Stored::New => return Ok(Receipt { queue_id, stored: Some(delivery) }),
                Stored::Duplicate(first) => {
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

/// Stores a batch, then wakes a worker.
struct StoreAndWake {
    queue: Arc<dyn DeliveryQueue>,
    wakeup: Arc<Wakeup>,
}

#[async_trait]
impl ProcessBatch<Arc<NewDelivery>, Stored> for StoreAndWake {
    async fn process(&self, deliveries: &[Arc<NewDelivery>]) -> Result<Vec<Stored>, StoreError> {
        let stored = self.queue.enqueue(deliveries).await?;
        let new = stored.iter().filter(|stored| **stored == Stored::New).count();
        metrics::counter!("webhook_enqueued_total").increment(new as u64);
        metrics::counter!("webhook_duplicates_total")
            .increment(stored.iter().filter(|stored| matches!(stored, Stored::Duplicate(_))).count() as u64);
        if new > 0 {
            self.wakeup.announce();
        }
        Ok(stored)
    }
}
