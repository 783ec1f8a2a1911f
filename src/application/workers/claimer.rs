//! The claimer: one loop per process that turns free slots of its workers into attempts.

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
    /// Claims for all workers that have free slots. There is one claim at a time: under load this makes claims large, and no
    /// claim has to step over rows that another is about to take. This loop does all the waiting; attempts run beside it, one
    /// per slot.
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
            // armed before the look, so that no wakeup is missed in between
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
                    // what is claimed must be attempted; the next claim shows whether the store is still away
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

    /// Makes one attempt. A panic in it is logged here, and its outcome is recorded as unknown when the lease ends.
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
        // the slot before the entry: whoever the entry wakes must find a free slot
        match ended {
            Ok(LeaseEnd::Now) => drop(slot),
            // The lease counts as held until it is taken over after its end, because until then a look for lost claims could
            // find it and give it back.
            Ok(LeaseEnd::ByItself) | Err(_) => {
                slot.leave_lease(claimed_at + self.settings.lease_term * 2 + HELD_POLL * 2);
            }
        }
        entry.ended_after(claimed_at.elapsed());
    }

    /// Renames the workers after a claim that was not answered and may have taken leases. A lease under an old name that
    /// belongs to no slot is then one of those.
    fn disown_claims(&self) {
        let disowned = self.slots.rename(self.names.of(self.settings.count));
        self.lost_claims.add(disowned, self.settings.lease_term);
    }
}

/// When the attempt may begin; `None` if its endpoint's rate is not limited.
fn starts_at(delivery: &LeasedDelivery) -> Option<Instant> {
    match delivery.work {
        Work::Attempt { starts_at, .. } => starts_at,
        Work::RecordLoss { .. } => None,
    }
}

/// The deliveries whose start wakes the claimer. For each rate-limited endpoint: the middle one of its grant, so that the
/// next grant arrives in time, and the last one, in case the claim made at the middle found the endpoint busy.
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
