//! Lost claims: the store may have done what it was asked although its answer never came.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::WorkerPool;
use super::reservations::{LOOK_AGAIN, STALL_MAX};
use super::slots::Slots;
use crate::application::ports::DeliveryQueue;
use crate::application::wakeup::Wakeup;
use crate::domain::delivery::WorkerId;

/// Names that workers had when the store did not answer a claim in time. What is under a lease by such a name, and in no
/// slot, is nobody's.
#[derive(Debug, Default)]
pub struct LostClaims {
    /// The names, and until when something may turn up under them: the store may be slow to do what it was asked.
    names: Mutex<Vec<(WorkerId, Instant)>>,
    added: Notify,
}

impl LostClaims {
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

impl WorkerPool {
    pub(super) async fn release_lost_claims(self: Arc<Self>, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.lost_claims.release(&*self.queue, &self.slots, &self.wakeup) => {}
        }
    }
}
