//! Gives back leases that the store may have granted in an answer that never came.
//!
//! After a claim, only the names of the workers are known ([`LostClaims`]); after an enqueue, the deliveries are known too
//! ([`release_unconfirmed`]).

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

/// The longest wait between two looks. A loss is recorded later than that, and one that ends a delivery after twice the time.
pub(super) const LOOK_AGAIN_MAX: Duration = Duration::from_secs(5);
/// Waits between looks.
const LOOK_AGAIN: Backoff = Backoff::new(Duration::from_secs(1), LOOK_AGAIN_MAX);
/// How long after the end of its term a lease may still appear, because a commit may stall for longer than the term.
const STALL_MAX: Duration = Duration::from_mins(10);

/// Names that workers had when the store did not answer a claim. A lease under such a name that belongs to no slot is used
/// by nobody.
#[derive(Debug, Default)]
pub struct LostClaims {
    names: Mutex<Vec<LostName>>,
    added: Notify,
}

#[derive(Debug)]
struct LostName {
    name: WorkerId,
    /// Until when leases may appear under the name, because the store may be slow.
    until: Instant,
}

impl LostClaims {
    /// Adds names that workers no longer use. Leases under them end after `lease_term`.
    pub fn add(&self, names: Vec<WorkerId>, lease_term: Duration) {
        let until = Instant::now() + lease_term + STALL_MAX;
        self.names().extend(names.into_iter().map(|name| LostName { name, until }));
        self.added.notify_one();
    }

    /// Looks again and again for leases under these names, and gives them back. Never returns.
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
        // no code panics while it holds this lock
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

/// Makes deliveries ready that the store may have stored under these leases without answering in time. Looks until it has
/// found all, or until no more can appear. If the process ends before that, the deliveries wait for the end of their leases.
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
