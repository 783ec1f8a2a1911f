//! What people can ask of deliveries: show, count, retry now, cancel, replay.

use std::collections::HashMap;
use std::sync::Arc;

use uuid::Uuid;

use super::directory::EndpointDirectory;
use super::enqueue::{Enqueue, EnqueueError};
use super::ports::{
    Change, DeliveryFilter, DeliveryQueue, DeliveryRecords, Statistics, StatisticsScope, StoreError, Stored,
};
use super::wakeup::Wakeup;
use crate::domain::access::{Action, Operator};
use crate::domain::delivery::{Delivery, DeliveryStatus, NewDelivery, QueueId};
use crate::domain::replay::ReplayTarget;

const CANCELLED_BY_REQUEST: &str = "cancelled by request";

/// A replay is given up after losing this many races against changes of its endpoint.
const LOOKS_MAX: usize = 4;

/// How many deliveries one query looks up the replays of.
const REPLAYS_AT_ONCE: usize = 5_000;

/// Why a delivery could not be shown or acted on.
#[derive(Debug, thiserror::Error)]
pub enum DeliveryError {
    /// There is no such delivery, or its archive was dropped.
    #[error("there is no delivery {0}")]
    Unknown(QueueId),
    /// The delivery's state does not allow it.
    #[error("{0}")]
    Conflict(String),
    #[error(transparent)]
    Enqueue(#[from] EnqueueError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

pub struct ManageDeliveries {
    records: Arc<dyn DeliveryRecords>,
    queue: Arc<dyn DeliveryQueue>,
    directory: Arc<EndpointDirectory>,
    enqueue: Arc<Enqueue>,
    wakeup: Arc<Wakeup>,
}

impl ManageDeliveries {
    pub fn new(
        records: Arc<dyn DeliveryRecords>,
        queue: Arc<dyn DeliveryQueue>,
        directory: Arc<EndpointDirectory>,
        enqueue: Arc<Enqueue>,
        wakeup: Arc<Wakeup>,
    ) -> Self {
        Self { records, queue, directory, enqueue, wakeup }
    }

    /// One delivery with its attempts.
    pub async fn show(&self, queue_id: QueueId) -> Result<Delivery, DeliveryError> {
        self.records.find(queue_id).await?.ok_or(DeliveryError::Unknown(queue_id))
    }

    /// The delivery that the same event, or the same replay, made before. If it cannot be found, its archive has just been
    /// removed and its deduplication key is about to go; the caller should try again.
    pub async fn show_first(&self, queue_id: QueueId) -> Result<Delivery, DeliveryError> {
        let first = self.records.find(queue_id).await?;
        Ok(first.ok_or_else(|| {
            let cause = anyhow::anyhow!("delivery {queue_id} is past its retention and being forgotten");
            StoreError::Unavailable(Arc::new(cause))
        })?)
    }

    /// At most `limit` deliveries, newest first.
    pub async fn list(&self, filter: &DeliveryFilter, limit: usize) -> Result<Vec<Delivery>, DeliveryError> {
        Ok(self.records.list(filter, limit).await?)
    }

    pub async fn statistics(&self, scope: &StatisticsScope) -> Result<Statistics, DeliveryError> {
        Ok(self.records.statistics(scope).await?)
    }

    /// Makes the next attempt of a waiting delivery due now.
    pub async fn retry_now(&self, queue_id: QueueId, by: &Operator) -> Result<Delivery, DeliveryError> {
        let change = Change::new(by, Action::RetryDelivery);
        let made_ready = self.records.make_ready(queue_id, &change).await?;
        let delivery = self.show(queue_id).await?;
        if made_ready {
            self.wakeup.announce();
            return Ok(delivery);
        }
        Err(DeliveryError::Conflict(match delivery.state.status() {
            DeliveryStatus::Pending => "the delivery is due already".into(),
            DeliveryStatus::Processing => "the delivery is being attempted".into(),
            status => format!("the delivery is {status}; replay it to send it again"),
        }))
    }

    /// Ends a delivery that is not being attempted.
    pub async fn cancel(&self, queue_id: QueueId, by: &Operator) -> Result<Delivery, DeliveryError> {
        let change = Change::new(by, Action::CancelDelivery);
        let cancelled = self.records.cancel(queue_id, CANCELLED_BY_REQUEST, &change).await?;
        let delivery = self.show(queue_id).await?;
        if cancelled {
            return Ok(delivery);
        }
        Err(DeliveryError::Conflict(match delivery.state.status() {
            DeliveryStatus::Pending | DeliveryStatus::Processing => {
                "the delivery is being attempted; it can be cancelled once that has failed".into()
            }
            status => format!("the delivery is {status} already"),
        }))
    }

    /// The replay of each delivery that was replayed.
    pub async fn replays_of(
        &self,
        queue_ids: &[QueueId],
    ) -> Result<HashMap<QueueId, QueueId>, DeliveryError> {
        let mut replays = HashMap::new();
        for chunk in queue_ids.chunks(REPLAYS_AT_ONCE) {
            replays.extend(self.records.replays_of(chunk).await?);
        }
        Ok(replays)
    }

    /// Whether a replay of a delivery to the current URL would go elsewhere than the delivery itself, or cannot be made.
    pub async fn is_elsewhere(&self, delivery: &Delivery) -> Result<bool, DeliveryError> {
        let endpoint = self.directory.recent(delivery.config_id).await?;
        let replay = endpoint.map(|endpoint| {
            NewDelivery::replay(delivery.queue_id, delivery, &endpoint, ReplayTarget::CurrentUrl)
        });
        Ok(!matches!(replay, Some(Ok(replay)) if replay.webhook_url == delivery.webhook_url))
    }

    /// Sends a delivery again, as a new delivery, under the endpoint's present limits. A waiting delivery can only be replayed
    /// to another URL; it is cancelled in the same transaction. A delivery is replayed at most once. To send it a third time,
    /// replay the replay.
    pub async fn replay(
        &self,
        queue_id: QueueId,
        target: ReplayTarget,
        by: &Arc<Operator>,
    ) -> Result<Replay, DeliveryError> {
        let old = self.show(queue_id).await?;
        let status = old.state.status();
        let waits = match (status, target) {
            _ if status.is_terminal() => false,
            (DeliveryStatus::Pending, ReplayTarget::CurrentUrl) => true,
            _ => {
                return Err(DeliveryError::Conflict(format!(
                    "the delivery is {status} and will be attempted anyway"
                )));
            }
        };
        for _ in 0..LOOKS_MAX {
            let endpoint = self.directory.current(old.config_id).await?;
            let Some(endpoint) = endpoint.filter(|endpoint| endpoint.deleted_at.is_none()) else {
                return Err(DeliveryError::Conflict(format!("config {} was deleted", old.config_id)));
            };
            let new_id = QueueId::new(Uuid::now_v7());
            let replay = NewDelivery::replay(new_id, &old, &endpoint, target)
                .map_err(|cannot| DeliveryError::Conflict(cannot.to_string()))?
                .asked_for_by(by.clone());
            let stored = if waits {
                if replay.webhook_url == old.webhook_url {
                    return Err(DeliveryError::Conflict(
                        "the delivery waits for that very URL already".into(),
                    ));
                }
                let reason = format!("sent to the current URL as {new_id}");
                let rerouted = self.queue.reroute(&replay, &reason).await?;
                self.wakeup.announce();
                rerouted.ok_or_else(|| {
                    DeliveryError::Conflict("the delivery does not wait any more: look again".into())
                })?
            } else {
                self.enqueue.accept_replay(replay).await?
            };
            match stored {
                Stored::New { .. } => return Ok(Replay::New(self.show(new_id).await?)),
                Stored::Duplicate { first, .. } => return Ok(Replay::Before(self.show_first(first).await?)),
                Stored::EndpointChanged => {}
            }
        }
        Err(DeliveryError::Conflict(format!("config {} is being changed by others", old.config_id)))
    }
}

/// What became of a replay.
#[derive(Debug)]
pub enum Replay {
    /// The new delivery.
    New(Delivery),
    /// The delivery had been replayed before, as this one. Nothing was stored.
    Before(Delivery),
}

impl Replay {
    /// The replay, new or not.
    pub fn delivery(&self) -> &Delivery {
        match self {
            Self::New(delivery) | Self::Before(delivery) => delivery,
        }
    }
}
