//! Slots that are kept for deliveries while these are stored: a delivery that has one is stored under a lease, and is
//! attempted as soon as it is committed, without a claim.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tracing::{debug, warn};

use super::WorkerPool;
use super::shares::Share;
use super::slots::Slot;
use crate::application::ports::{DeliveryQueue, UnusedLease};
use crate::application::wakeup::Wakeup;
use crate::domain::delivery::{Lease, NewDelivery, WorkerId};

/// The shortest and the longest time between two looks for deliveries that may have been stored after all.
/// At most: a loss that ends a delivery is kept back for twice as long before it is recorded.
pub(super) const LOOK_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
/// For how long after the end of a lease something may still turn up under it: commits may stall for longer than it lasted.
pub(super) const STALL_MAX: Duration = Duration::from_mins(10);

/// A worker's slot, and a share of what the delivery's endpoint may hold. Both are free again once this is dropped.
pub struct Reservation {
    workers: Arc<WorkerPool>,
    slot: Slot,
    share: Share,
}

impl Reservation {
    /// Keeps a slot for a delivery, unless others may wait that should go first, or its endpoint has no room.
    pub fn of(workers: &Arc<WorkerPool>, delivery: &NewDelivery) -> Option<Self> {
        if !delivery.due_at_once {
            return None;
        }
        let share = workers.shares.take_for_new(delivery.config_id)?;
        let Some(mut slot) = workers.slots.try_take() else {
            workers.shares.hold_back(delivery.config_id);
            return None;
        };
        slot.hold(delivery.queue_id);
        Some(Self { workers: workers.clone(), slot, share })
    }

    /// The lease that the delivery should be stored under: whose, and for how long.
    pub fn lease(&self) -> (&WorkerId, Duration) {
        (self.slot.worker(), self.workers.lease())
    }

    /// Attempts the delivery, which was stored under a lease from `locked_at` on by an enqueue that began at `begun`.
    pub fn attempt(self, delivery: &NewDelivery, locked_at: DateTime<Utc>, begun: Instant) {
        let Self { workers, slot, share } = self;
        let lease = Lease { worker_id: slot.worker().clone(), locked_at };
        tokio::spawn(workers.attempt(delivery.leased(lease, begun), false, slot, share));
    }
}

/// Makes ready what may have been stored under these leases although the store did not say so in time. Looks until it has
/// found all, or nothing can turn up any more; what it does not live to find waits for the end of its lease.
pub async fn release_unconfirmed(
    queue: Arc<dyn DeliveryQueue>,
    wakeup: Arc<Wakeup>,
    mut leases: Vec<UnusedLease>,
    lease: Duration,
) {
    let begun = Instant::now();
    let mut pause = LOOK_AGAIN.0;
    while !leases.is_empty() && begun.elapsed() < lease + STALL_MAX {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOK_AGAIN.1);
        match queue.release(&leases).await {
            Ok(released) if released.is_empty() => {}
            Ok(released) => {
                warn!(
                    deliveries = released.len(),
                    "deliveries were stored although the database did not answer in time; they are made ready"
                );
                leases.retain(|lease| !released.contains(&lease.queue_id));
                wakeup.announce();
            }
            Err(error) => {
                debug!(
                    error = format!("{:#}", error.cause()),
                    "cannot look for deliveries that may have been stored"
                );
            }
        }
    }
}
