//! Lost answers: the store may have done what it was asked although its answer never came, and hold leases that nobody uses.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::WorkerPool;
use super::slots::Slots;
use crate::application::backoff::Backoff;
use crate::application::ports::{DeliveryQueue, UnusedLease};
use crate::application::wakeup::Wakeup;
use crate::domain::delivery::WorkerId;

/// Waits between looks. A loss that ends a delivery is kept back for twice the longest before it is recorded.
const LOOK_AGAIN: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
/// For how long after the end of a lease something may still turn up under it: commits may stall for longer than it lasted.
const STALL_MAX: Duration = Duration::from_mins(10);

/// Names that workers had when the store did not answer a claim in time. What is under a lease by such a name, and in no
/// slot, is nobody's.
#[derive(Debug, Default)]
pub struct LostClaims {
    names: Mutex<Vec<LostName>>,
    added: Notify,
}

#[derive(Debug)]
struct LostName {
    name: WorkerId,
    /// Until when something may turn up under it: the store may be slow to do what it was asked.
    until: Instant,
}

impl LostClaims {
    /// The workers have other names from now on; leases by these end after `lease_term`.
    pub fn add(&self, names: Vec<WorkerId>, lease_term: Duration) {
        let until = Instant::now() + lease_term + STALL_MAX;
        self.names().extend(names.into_iter().map(|name| LostName { name, until }));
        self.added.notify_one();
    }

    /// Gives back what is found, one look at a time, for ever.
    pub async fn release(&self, queue: &dyn DeliveryQueue, slots: &Slots, wakeup: &Wakeup) {
        loop {
            self.added.notified().await;
            let mut backoff = LOOK_AGAIN;
            while !self.names().is_empty() {
                let added = tokio::select! {
                    () = self.added.notified() => true,
                    () = sleep(backoff.pause()) => false,
                };
                if added {
                    backoff.reset();
                    continue;
                }
                let names: Vec<WorkerId> = self.names().iter().map(|lost| lost.name.clone()).collect();
                match queue.release_lost_claims(&names, &slots.held()).await {
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
                            error = error.report(),
                            "cannot look for deliveries that may have been claimed"
                        );
                    }
                }
                let now = Instant::now();
                self.names().retain(|lost| lost.until > now);
            }
        }
    }

    fn names(&self) -> MutexGuard<'_, Vec<LostName>> {
        // nothing panics while it is held
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WorkerPool {
    pub(super) async fn release_lost_claims(self: Arc<Self>, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.lost_claims.release(&*self.queue, &self.slots, &self.wakeup) => {}
        }
    }
}

/// Makes ready what may have been stored under these leases although the store did not say so in time. Looks until it has
/// found all, or nothing can turn up any more; what it does not live to find waits for the end of its lease.
pub async fn release_unconfirmed(
    queue: Arc<dyn DeliveryQueue>,
    wakeup: Arc<Wakeup>,
    mut leases: Vec<UnusedLease>,
    lease_term: Duration,
) {
    let (begun, mut backoff) = (Instant::now(), LOOK_AGAIN);
    while !leases.is_empty() && begun.elapsed() < lease_term + STALL_MAX {
        sleep(backoff.pause()).await;
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
                debug!(error = error.report(), "cannot look for deliveries that may have been stored");
            }
        }
    }
}
