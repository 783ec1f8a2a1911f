//! The claimer: one loop of a process that takes leases for all of its workers, and starts their attempts.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use tokio::time::{sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::WorkerPool;
use super::ledger::Entry;
use super::losses::HELD_POLL;
use super::restart::jittered;
use super::slots::Slot;
use crate::application::backoff::Backoff;
use crate::application::deliver::LeaseEnd;
use crate::application::ports::{Claim, Claimed, StoreError};
use crate::domain::delivery::{LeasedDelivery, QueueId, Work};
use crate::domain::endpoint::EndpointId;
use crate::domain::millis;

/// Waits after a claim that failed.
const CLAIM_BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));

impl WorkerPool {
    /// Claims for all workers, as they have free slots: one claim at a time, so that under load each is large, and none
    /// steps over what another is about to take. It owns all waiting; attempts run beside it, one a slot.
    pub(super) async fn claim_and_attempt(self: Arc<Self>, stop: CancellationToken) {
        let mut cursor = None;
        let mut more_waits = false;
        let mut backoff = CLAIM_BACKOFF;
        loop {
            let mut free = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                free = self.slots.take(self.settings.claim_max(), more_waits) => free,
            };
            // armed before it looks
            let woken = self.wakeup.woken();
            let mut woken = pin!(woken);
            woken.as_mut().enable();
            match self.claim(&mut free, cursor).await {
                Ok(deliveries) => {
                    backoff.reset();
                    more_waits = deliveries.len() == free.len();
                    cursor = deliveries.last().map_or(cursor, |(last, _)| Some(last.config_id));
                    let pacemakers = pacemakers(deliveries.iter().map(|(delivery, _)| delivery));
                    for ((delivery, entry), slot) in deliveries.into_iter().zip(free) {
                        match delivery.work {
                            Work::RecordLoss { .. } => self.record_loss_soon(delivery),
                            Work::Attempt { .. } => {
                                let is_pacemaker = pacemakers.contains(&delivery.queue_id);
                                tokio::spawn(self.clone().attempt(delivery, is_pacemaker, slot, entry));
                            }
                        }
                    }
                    if more_waits {
                        continue;
                    }
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = woken => {}
                        () = sleep(jittered(self.settings.poll_interval)) => {}
                    }
                }
                Err(cause) => {
                    drop(free);
                    if matches!(cause, StoreError::InDoubt(_)) {
                        self.disown_claims();
                    }
                    let pause = jittered(backoff.pause());
                    warn!(error = cause.report(), retry_in_ms = millis(pause), "cannot claim");
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = sleep(pause) => {}
                    }
                }
            }
        }
    }

    async fn claim(
        &self,
        slots: &mut [Slot],
        after: Option<EndpointId>,
    ) -> Result<Vec<(LeasedDelivery, Entry)>, StoreError> {
        let mut claimed = Vec::new();
        loop {
            let free = &mut slots[claimed.len()..];
            let claim = Claim {
                worker_ids: free.iter().map(|slot| slot.worker().clone()).collect(),
                lease_term: self.settings.lease_term,
                after,
                rooms: self.ledger.rooms(free.len()),
            };
            let Claimed { deliveries, look_again } = match self.queue.claim(&claim).await {
                Ok(claimed) => claimed,
                Err(cause) => {
                    self.ledger.claim_failed();
                    // what is claimed must be attempted; the next claim tells if the store is still away
                    if claimed.is_empty() {
                        return Err(cause);
                    }
                    if matches!(cause, StoreError::InDoubt(_)) {
                        self.disown_claims();
                    }
                    return Ok(claimed);
                }
            };
            metrics::counter!("webhook_claims_total").increment(1);
            metrics::counter!("webhook_leases_taken_total").increment(deliveries.len() as u64);
            for (slot, delivery) in free.iter_mut().zip(&deliveries) {
                if let Work::Attempt { .. } = delivery.work {
                    slot.hold(delivery.queue_id);
                }
            }
            claimed.extend(self.ledger.take(&claim.rooms, deliveries));
            if !look_again {
                return Ok(claimed);
            }
        }
    }

    /// One attempt. A panic in it is logged here; its outcome is unknown when the lease ends.
    pub(in crate::application) async fn attempt(
        self: Arc<Self>,
        delivery: LeasedDelivery,
        is_pacemaker: bool,
        slot: Slot,
        entry: Entry,
    ) {
        let (queue_id, claimed_at) = (delivery.queue_id, delivery.claimed_at);
        if let Some(starts_at) = starts_at(&delivery) {
            sleep_until(starts_at.into()).await;
            if is_pacemaker {
                self.wakeup.wake_claimer();
            }
        }
        let ended = AssertUnwindSafe(self.deliver.work(delivery)).catch_unwind().await;
        if ended.is_err() {
            error!(%queue_id, "an attempt panicked; its outcome is unknown when the lease ends");
        }
        // the slot first: whoever the entry wakes finds it free
        match ended {
            Ok(LeaseEnd::Now) => drop(slot),
            // for as long as a look for what lost claims took may find the lease: until it is taken over after its end
            Ok(LeaseEnd::ByItself) | Err(_) => {
                slot.leave_lease(claimed_at + self.settings.lease_term * 2 + HELD_POLL * 2);
            }
        }
        entry.ended_after(claimed_at.elapsed());
    }

    /// A claim may have taken leases although its answer never came. What is under the workers' names, and in no slot, is such
    /// a lease, once they have other names.
    fn disown_claims(&self) {
        let disowned = self.slots.rename(self.names.of(self.settings.count));
        self.lost_claims.add(disowned, self.settings.lease_term);
    }
}

/// When the attempt may begin, if its endpoint's rate is limited.
fn starts_at(delivery: &LeasedDelivery) -> Option<Instant> {
    match delivery.work {
        Work::Attempt { starts_at, .. } => starts_at,
        Work::RecordLoss { .. } => None,
    }
}

/// Those that have more claimed when they begin, where an endpoint's rate is limited: the one in the middle of what it has
/// granted, so that the next grant comes in time, and the last, lest that one found another claim there.
fn pacemakers<'a>(deliveries: impl Iterator<Item = &'a LeasedDelivery>) -> HashSet<QueueId> {
    let mut starts: HashMap<EndpointId, Vec<(Instant, QueueId)>> = HashMap::new();
    for delivery in deliveries {
        if let Some(starts_at) = starts_at(delivery) {
            starts.entry(delivery.config_id).or_default().push((starts_at, delivery.queue_id));
        }
    }
    let mut pacemakers = HashSet::new();
    for starts in starts.values_mut() {
        starts.sort_unstable();
        pacemakers.insert(starts[starts.len() / 2].1);
        pacemakers.extend(starts.last().map(|(_, queue_id)| *queue_id));
    }
    pacemakers
}
