//! The workers: each holds as many leases as it has slots for, and makes the attempts of all of them at once.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use rand::RngExt as _;
use tokio::time::{sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};

use super::deliver::{Deliver, LeaseEnd};
use super::floors::KnownFloors;
use super::ports::{Claim, DeliveryQueue, StoreError};
use super::reservations::Orphans;
use super::shares::{Rooms, Share, Shares};
use super::slots::{Slot, Slots};
use super::wakeup::Wakeup;
use crate::domain::delivery::{LeasedDelivery, QueueId, WorkerId};
use crate::domain::endpoint::EndpointId;
use crate::domain::millis;

/// How many deliveries are made ready at a time.
const PROMOTE_MAX: usize = 1_000;
/// The longest that the promoter sleeps: deliveries scheduled by other processes come to its notice then.
const PROMOTE_POLL: Duration = Duration::from_millis(500);
/// How often leases are looked for that have expired at endpoints that are disabled, or whose circuit is not closed.
const HELD_POLL: Duration = Duration::from_mins(2);
/// The wait before a loop that panicked begins again.
const AFTER_PANIC: Duration = Duration::from_secs(1);
/// How long a loss is kept back before it is recorded: the worker that was thought lost may know the outcome after all, and
/// could not write it while the store stood still. Settles are tried again within two seconds.
const LOSS_GRACE: Duration = Duration::from_secs(3);
/// The same where the loss ends the delivery: what is known later could not be written any more.
const LAST_LOSS_GRACE: Duration = Duration::from_secs(10);
/// The longest wait after the store failed.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// How the workers go about it.
#[derive(Debug, Clone)]
pub struct WorkerSettings {
    /// How many workers.
    pub count: usize,
    /// How many leases each may hold.
    pub batch_size: usize,
    /// How often they look, without being woken.
    pub poll_interval: Duration,
    /// For how long a lease is taken.
    pub lease: Duration,
}

impl WorkerSettings {
    /// How many leases all workers together may hold.
    pub fn leases_max(&self) -> usize {
        self.count * self.batch_size
    }

    /// How many leases one claim takes at most: larger ones would have to wait for as many free slots.
    pub fn claim_max(&self) -> usize {
        self.leases_max().div_ceil(4)
    }
}

/// The names of the workers of a process: `host:pid:random:n`.
#[derive(Debug, Clone)]
pub struct WorkerNames {
    /// Where it runs.
    pub host: String,
    /// As what.
    pub pid: u32,
}

impl WorkerNames {
    /// Names for so many workers, that no worker has had before.
    fn of(&self, count: usize) -> Vec<WorkerId> {
        let random = rand::rng().random();
        (1..=count).map(|number| WorkerId::new(&self.host, self.pid, random, number)).collect()
    }
}

/// The workers of one process.
pub struct WorkerPool {
    queue: Arc<dyn DeliveryQueue>,
    deliver: Deliver,
    wakeup: Arc<Wakeup>,
    settings: WorkerSettings,
    names: WorkerNames,
    /// Losses that are kept back.
    losses: TaskTracker,
    orphans: Orphans,
    stop: CancellationToken,
    pub(super) slots: Arc<Slots>,
    pub(super) shares: Arc<Shares>,
}

impl WorkerPool {
    /// Workers that are yet to run.
    pub fn new(
        queue: Arc<dyn DeliveryQueue>,
        deliver: Deliver,
        wakeup: Arc<Wakeup>,
        shares: Arc<Shares>,
        settings: WorkerSettings,
        names: WorkerNames,
    ) -> Self {
        let slots = Slots::new(&names.of(settings.count), settings.batch_size);
        let (losses, stop) = (TaskTracker::new(), CancellationToken::new());
        let orphans = Orphans::default();
        Self { queue, deliver, wakeup, settings, names, losses, orphans, stop, slots, shares }
    }

    /// For how long a lease is taken.
    pub fn lease(&self) -> Duration {
        self.settings.lease
    }

    /// Works until `stop`, then lets the attempts under way end and settles them.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        info!(workers = self.settings.count, batch_size = self.settings.batch_size, "workers started");
        tokio::join!(
            again_after_panics(&stop, || self.clone().claim_and_attempt(stop.clone())),
            again_after_panics(&stop, || self.clone().promote_what_is_due(stop.clone())),
            again_after_panics(&stop, || self.clone().record_held_losses(stop.clone())),
            again_after_panics(&stop, || self.clone().release_orphans(stop.clone())),
        );
        self.stop.cancel();
        self.slots.close().await;
        self.losses.close();
        self.losses.wait().await;
        info!("workers stopped, nothing is under way");
    }

    /// Claims for all workers, as they have free slots: one claim at a time, so that under load each is large, and none
    /// steps over what another is about to take. It owns all waiting; attempts run beside it, one a slot.
    async fn claim_and_attempt(self: Arc<Self>, stop: CancellationToken) {
        let mut cursor = None;
        let mut floors = KnownFloors::default();
        let mut more_waits = false;
        let mut backoff = Duration::ZERO;
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
            match self.claim(&mut free, cursor, &mut floors).await {
                Ok(deliveries) => {
                    backoff = Duration::ZERO;
                    more_waits = deliveries.len() == free.len();
                    cursor = deliveries.last().map_or(cursor, |(last, _)| Some(last.config_id));
                    let pacemakers = pacemakers(deliveries.iter().map(|(delivery, _)| delivery));
                    for ((delivery, share), slot) in deliveries.into_iter().zip(free) {
                        if delivery.abandoned_for.is_some() {
                            self.record_loss_soon(delivery);
                            continue;
                        }
                        let is_pacemaker = pacemakers.contains(&delivery.queue_id);
                        tokio::spawn(self.clone().attempt(delivery, is_pacemaker, slot, share));
                    }
                }
                Err(cause) => {
                    drop(free);
                    if matches!(cause, StoreError::InDoubt(_)) {
                        self.disown_claims();
                    }
                    backoff = (backoff * 2).clamp(Duration::from_millis(100), BACKOFF_MAX);
                    let cause = anyhow::Error::new(cause);
                    let retry_in_ms = millis(backoff);
                    warn!(error = format!("{cause:#}"), retry_in_ms, "cannot claim");
                }
            }
            if more_waits && backoff.is_zero() {
                continue;
            }
            let pause =
                if backoff.is_zero() { jittered(self.settings.poll_interval) } else { jittered(backoff) };
            tokio::select! {
                () = stop.cancelled() => break,
                () = woken, if backoff.is_zero() => {}
                () = sleep(pause) => {}
            }
        }
    }

    async fn claim(
        &self,
        slots: &mut [Slot],
        after: Option<EndpointId>,
        floors: &mut KnownFloors,
    ) -> Result<Vec<(LeasedDelivery, Share)>, StoreError> {
        let mut claimed = Vec::new();
        loop {
            let free = &mut slots[claimed.len()..];
            let claim = Claim {
                worker_ids: free.iter().map(|slot| slot.worker().clone()).collect(),
                lease: self.settings.lease,
                after,
                rooms: self.shares.rooms(free.len()),
                floors: floors.for_claim(),
                held: false,
            };
            let deliveries = match self.queue.claim(&claim).await {
                Ok(deliveries) => deliveries,
                Err(cause) => {
                    self.shares.claim_failed();
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
                // one that was taken over is not attempted
                if delivery.abandoned_for.is_none() {
                    slot.hold(delivery.queue_id);
                }
            }
            let again = floors.learn(&claim.floors, free.len(), &claim.rooms, &deliveries);
            claimed.extend(self.shares.take(&claim.rooms, deliveries));
            if !again {
                return Ok(claimed);
            }
        }
    }

    /// One attempt. A panic in it is logged here; its outcome is unknown when the lease ends.
    pub(super) async fn attempt(
        self: Arc<Self>,
        delivery: LeasedDelivery,
        is_pacemaker: bool,
        slot: Slot,
        share: Share,
    ) {
        let (queue_id, claimed_at) = (delivery.queue_id, delivery.claimed_at);
        if let Some(starts_at) = delivery.starts_at {
            sleep_until(starts_at.into()).await;
            if is_pacemaker {
                self.wakeup.wake_claimer();
            }
        }
        let ended = AssertUnwindSafe(self.deliver.attempt(delivery)).catch_unwind().await;
        if ended.is_err() {
            error!(%queue_id, "an attempt panicked; its outcome is unknown when the lease ends");
        }
        // the slot first: whoever the share wakes finds it free
        match ended {
            // for as long as a look for what lost claims took may find the lease: until it is taken over after its end
            Ok(LeaseEnd::Now) => drop(slot),
            Ok(LeaseEnd::ByItself) | Err(_) => {
                slot.leave_lease(claimed_at + self.settings.lease * 2 + HELD_POLL * 2);
            }
        }
        share.ended_after(claimed_at.elapsed());
    }

    /// A claim may have taken leases although its answer never came. What is under the workers' names, and in no slot, is such
    /// a lease, once they have other names.
    fn disown_claims(&self) {
        let disowned = self.slots.rename(self.names.of(self.settings.count));
        self.orphans.add(disowned, self.settings.lease);
    }

    async fn release_orphans(self: Arc<Self>, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.orphans.release(&*self.queue, &self.slots, &self.wakeup) => {}
        }
    }

    /// Records that the outcome of an attempt is unknown, unless it becomes known within a while. No slot is held meanwhile:
    /// there are never more of these than leases of workers that were lost.
    fn record_loss_soon(self: &Arc<Self>, delivery: LeasedDelivery) {
        let workers = self.clone();
        let grace = if delivery.attempt < delivery.max_retries { LOSS_GRACE } else { LAST_LOSS_GRACE };
        self.losses.spawn(async move {
            tokio::select! {
                () = workers.stop.cancelled() => {}
                () = sleep(grace) => {}
            }
            workers.deliver.attempt(delivery).await;
        });
    }

    async fn promote_what_is_due(self: Arc<Self>, stop: CancellationToken) {
        let mut backoff = PROMOTE_POLL;
        loop {
            let rescheduled = self.wakeup.rescheduled();
            let mut rescheduled = pin!(rescheduled);
            rescheduled.as_mut().enable();
            let pause = match self.queue.promote(PROMOTE_MAX).await {
                Ok(promotion) => {
                    backoff = PROMOTE_POLL;
                    if promotion.promoted > 0 {
                        debug!(deliveries = promotion.promoted, "made ready");
                        self.wakeup.announce();
                    }
                    promotion.next_due_in.unwrap_or(PROMOTE_POLL).min(PROMOTE_POLL)
                }
                Err(cause) => {
                    warn_unless_passing(
                        cause,
                        "retries and events for later cannot be made ready; they wait",
                    );
                    let pause = backoff;
                    backoff = (backoff * 2).min(BACKOFF_MAX);
                    pause
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = rescheduled => {}
                () = sleep(pause) => {}
            }
        }
    }

    /// Nothing claims from an endpoint that is held, so the leases that expire there are settled here.
    async fn record_held_losses(self: Arc<Self>, stop: CancellationToken) {
        let limit = self.settings.batch_size;
        while let Some(id) = self.slots.first_worker() {
            let claim = Claim {
                worker_ids: vec![id; limit],
                lease: self.settings.lease,
                after: None,
                rooms: Rooms { limit, share: limit, listed: vec![] },
                floors: vec![],
                held: true,
            };
            match self.queue.claim(&claim).await {
                Ok(lost) => {
                    let more_may_wait = !lost.is_empty() && !stop.is_cancelled();
                    for delivery in lost {
                        self.record_loss_soon(delivery);
                    }
                    if more_may_wait {
                        continue;
                    }
                }
                Err(cause) => {
                    warn_unless_passing(cause, "cannot look for expired leases of endpoints that are held");
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(jittered(HELD_POLL)) => {}
            }
        }
    }
}

/// Those that have more claimed when they begin, where an endpoint's rate is limited: the one in the middle of what it has
/// granted, so that the next grant comes in time, and the last, lest that one found another claim there.
fn pacemakers<'a>(deliveries: impl Iterator<Item = &'a LeasedDelivery>) -> HashSet<QueueId> {
    let mut starts: HashMap<EndpointId, Vec<(Instant, QueueId)>> = HashMap::new();
    for delivery in deliveries {
        if let Some(starts_at) = delivery.starts_at {
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

/// Runs a loop until it ends, from its beginning each time that it panics: without one of its loops a process would go
/// on as if nothing were missing.
async fn again_after_panics<F>(stop: &CancellationToken, mut begin: impl FnMut() -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    while let Err(cause) = tokio::spawn(begin()).await {
        error!(error = %cause, "a part of the workers ended unexpectedly; it begins again");
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(AFTER_PANIC) => {}
        }
    }
}

/// While the store is away, the claimer says so for all loops. Anything else is a fault that nobody else would see.
fn warn_unless_passing(cause: StoreError, what: &'static str) {
    let passes = cause.passes();
    let error = format!("{:#}", anyhow::Error::new(cause));
    if passes {
        debug!(error, "{what}");
    } else {
        warn!(error, "{what}");
    }
}

/// Up to a tenth longer or shorter, so that processes do not fall into step.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.9..1.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_loop_that_panics_begins_again() {
        let mut begun = 0;
        again_after_panics(&CancellationToken::new(), || {
            begun += 1;
            let panics = begun == 1;
            async move { assert!(!panics, "on purpose") }
        })
        .await;
        assert_eq!(begun, 2);
    }

    #[tokio::test]
    async fn a_loop_that_panicked_does_not_begin_again_once_the_process_stops() {
        let (stop, mut begun) = (CancellationToken::new(), 0);
        stop.cancel();
        again_after_panics(&stop, || {
            begun += 1;
            async { panic!("on purpose") }
        })
        .await;
        assert_eq!(begun, 1);
    }
}
