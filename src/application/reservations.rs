//! Slots that are kept for deliveries while these are stored: a delivery that has one is stored under a lease, and is
//! attempted as soon as it is committed, without a claim.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tokio::sync::Notify;
use tracing::{debug, warn};

use super::ports::{DeliveryQueue, UnusedLease};
use super::shares::Share;
use super::slots::{Slot, Slots};
use super::wakeup::Wakeup;
use super::worker_pool::WorkerPool;
use crate::domain::delivery::{Lease, NewDelivery, WorkerId};

/// The shortest and the longest time between two looks for deliveries that may have been stored after all.
/// At most: a loss that ends a delivery is kept back for twice as long before it is recorded.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
/// For how long after the end of a lease something may still turn up under it: commits may stall for longer than it lasted.
const STALL_MAX: Duration = Duration::from_mins(10);

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

/// Names that workers had when the store did not answer a claim in time. What is under a lease by such a name, and in no
/// slot, is nobody's.
#[derive(Debug, Default)]
pub struct Orphans {
    /// The names, and until when something may turn up under them: the store may be slow to do what it was asked.
    names: Mutex<Vec<(WorkerId, Instant)>>,
    added: Notify,
}

impl Orphans {
    /// The workers have other names from now on; leases by these end after `lease`.
    pub fn add(&self, names: Vec<WorkerId>, lease: Duration) {
        let until = Instant::now() + lease + STALL_MAX;
        self.names().extend(names.into_iter().map(|name| (name, until)));
        self.added.notify_one();
    }

    /// Gives back what is found, one look at a time, for ever.
    pub async fn release(&self, queue: &dyn DeliveryQueue, slots: &Slots, wakeup: &Wakeup) {
        loop {
            self.added.notified().await;
            let mut pause = LOOK_AGAIN.0;
            while !self.names().is_empty() {
                let added = tokio::select! {
                    () = self.added.notified() => true,
                    () = tokio::time::sleep(pause) => false,
                };
                if added {
                    pause = LOOK_AGAIN.0;
                    continue;
                }
                pause = (pause * 2).min(LOOK_AGAIN.1);
                let names: Vec<WorkerId> = self.names().iter().map(|(name, _)| name.clone()).collect();
                match queue.release_orphans(&names, &slots.held()).await {
                    Ok(0) => {}
                    Ok(deliveries) => {
                        warn!(
                            deliveries,
                            "deliveries were claimed although the database did not answer in time; they are made ready"
                        );
                        wakeup.announce();
                    }
                    Err(error) => {
                        debug!(
                            error = format!("{:#}", error.cause()),
                            "cannot look for deliveries that may have been claimed"
                        );
                    }
                }
                let now = Instant::now();
                self.names().retain(|(_, until)| *until > now);
            }
        }
    }

    fn names(&self) -> MutexGuard<'_, Vec<(WorkerId, Instant)>> {
        // nothing panics while it is held
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
