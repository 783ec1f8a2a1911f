//! Stores accepted deliveries, a batch per transaction, under leases of workers that have room.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::batching::ProcessBatch;
use super::ports::{DeliveryQueue, Incoming, StoreError, Stored, UnusedLease, WantedLease};
use super::wakeup::Wakeup;
use super::workers::WorkerPool;
use super::workers::lost_answers::release_unconfirmed;
use super::workers::reservations::Reservation;
use crate::domain::delivery::NewDelivery;

/// If storing a delivery takes longer than this, it is not attempted under the lease that it was stored with.
const ATTEMPT_WITHIN: Duration = Duration::from_secs(2);

/// Stores a batch. Deliveries that the workers have slots for are attempted at once; a claimer is woken for the others.
pub(super) struct Store {
    queue: Arc<dyn DeliveryQueue>,
    wakeup: Arc<Wakeup>,
    workers: Option<Arc<WorkerPool>>,
    /// Whether the store answered the last batch. If it did not, no leases are asked for, so that few are in doubt.
    answered: AtomicBool,
}

impl Store {
    pub(super) fn new(
        queue: Arc<dyn DeliveryQueue>,
        wakeup: Arc<Wakeup>,
        workers: Option<Arc<WorkerPool>>,
    ) -> Self {
        Self { queue, wakeup, workers, answered: AtomicBool::new(true) }
    }

    /// Gives back the leases that the store may have granted, now or later, after the time to attempt under them.
    fn release_if_stored(&self, deliveries: &[Incoming<'_>]) {
        let leases: Vec<UnusedLease> = deliveries
            .iter()
            .filter_map(|incoming| {
                let WantedLease { worker_id, .. } = incoming.lease?;
                let queue_id = incoming.delivery.queue_id;
                Some(UnusedLease { queue_id, worker_id: worker_id.clone(), locked_at: None })
            })
            .collect();
        if let Some(WantedLease { term, .. }) = deliveries.iter().find_map(|incoming| incoming.lease) {
            tokio::spawn(release_unconfirmed(self.queue.clone(), self.wakeup.clone(), leases, term));
        }
    }
}

#[async_trait]
impl ProcessBatch<Arc<NewDelivery>, Stored> for Store {
    async fn process(&self, deliveries: &[Arc<NewDelivery>]) -> Result<Vec<Stored>, StoreError> {
        let begun = Instant::now();
        let workers = self.workers.as_ref().filter(|_| self.answered.load(Ordering::Relaxed));
        let reserved: Vec<Option<Reservation>> =
            deliveries.iter().map(|delivery| Reservation::of(workers?, delivery)).collect();
        let incoming: Vec<Incoming<'_>> = deliveries
            .iter()
            .zip(&reserved)
            .map(|(delivery, reserved)| Incoming {
                delivery,
                lease: reserved.as_ref().map(Reservation::lease),
            })
            .collect();
        let stored = self.queue.enqueue(&incoming).await;
        let in_doubt = matches!(stored, Err(StoreError::InDoubt(_)));
        self.answered.store(stored.is_ok(), Ordering::Relaxed);
        // an old lease may end before an attempt under it does
        let too_late = begun.elapsed() > ATTEMPT_WITHIN;
        if in_doubt || too_late {
            self.release_if_stored(&incoming);
        }
        let stored = stored?;

        let (mut leased, mut waiting, mut duplicates) = (0, 0, 0);
        for ((delivery, reserved), stored) in deliveries.iter().zip(reserved).zip(&stored) {
            match (stored, reserved) {
                (Stored::New { locked_at: Some(locked_at) }, Some(reservation)) if !too_late => {
                    reservation.attempt(delivery, *locked_at, begun);
                    leased += 1;
                }
                (Stored::New { .. }, _) => waiting += 1,
                (Stored::Duplicate { .. }, _) => duplicates += 1,
                (Stored::EndpointChanged, _) => {}
            }
        }
        metrics::counter!("webhook_enqueued_total").increment(leased + waiting);
        metrics::counter!("webhook_leased_at_enqueue_total").increment(leased);
        metrics::counter!("webhook_duplicates_total").increment(duplicates);
        if waiting > 0 {
            self.wakeup.announce();
        }
        Ok(stored)
    }
}
