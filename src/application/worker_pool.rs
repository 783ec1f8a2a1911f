//! The workers: each takes leases as it has room, and makes the attempts of all of them at once.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use rand::RngExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::deliver::Deliver;
use super::floors::KnownFloors;
use super::ports::{Claim, DeliveryQueue, StoreError};
use super::shares::{Rooms, Shares};
use super::wakeup::Wakeup;
use crate::domain::delivery::{LeasedDelivery, QueueId, WorkerId};
use crate::domain::endpoint::EndpointId;

/// How many claims a process makes at a time. While workers wait for their turn their room grows, so under load each
/// claim is large, and idle it is immediate.
const CLAIMS_AT_ONCE: usize = 2;
/// With more waiting than a worker can take, it claims again once half of its leases are free, or after this.
const REFILL_WAIT: Duration = Duration::from_millis(20);
/// How many deliveries are made ready at a time.
const PROMOTE_MAX: usize = 1_000;
/// The longest that the promoter sleeps: deliveries scheduled by other processes come to its notice then.
const PROMOTE_POLL: Duration = Duration::from_millis(500);
/// How often leases are looked for that have expired at endpoints that are disabled, or whose circuit is not closed.
const HELD_POLL: Duration = Duration::from_mins(2);
/// The longest wait after the store failed.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// How the workers go about it.
#[derive(Debug, Clone)]
pub struct WorkerSettings {
    /// How many workers.
    pub count: usize,
    /// How many leases each may hold.
    pub batch_size: usize,
    /// How often each looks, without being woken.
    pub poll_interval: Duration,
    /// For how long a lease is taken.
    pub lease: Duration,
}

/// The workers of one process.
pub struct WorkerPool {
    queue: Arc<dyn DeliveryQueue>,
    deliver: Deliver,
    wakeup: Arc<Wakeup>,
    settings: WorkerSettings,
    claims: Semaphore,
    shares: Shares,
    floors: KnownFloors,
}

impl WorkerPool {
    /// Workers that are yet to run.
    pub fn new(
        queue: Arc<dyn DeliveryQueue>,
        deliver: Deliver,
        wakeup: Arc<Wakeup>,
        settings: WorkerSettings,
    ) -> Self {
        let shares = Shares::new(settings.count * settings.batch_size);
        let claims = Semaphore::new(CLAIMS_AT_ONCE);
        Self { queue, deliver, wakeup, settings, claims, shares, floors: KnownFloors::default() }
    }

    /// Works until `stop`, then lets the attempts under way end and settles them.
    pub async fn run(self: Arc<Self>, ids: Vec<WorkerId>, stop: CancellationToken) {
        let mut loops = tokio::task::JoinSet::new();
        for id in &ids {
            loops.spawn(self.clone().work(id.clone(), stop.clone()));
        }
        loops.spawn(self.clone().promote_what_is_due(stop.clone()));
        if let Some(first) = ids.first() {
            loops.spawn(self.clone().record_held_losses(first.clone(), stop.clone()));
        }
        info!(workers = ids.len(), batch_size = self.settings.batch_size, "workers started");
        while let Some(ended) = loops.join_next().await {
            if let Err(cause) = ended {
                error!(error = %cause, "a worker ended unexpectedly");
            }
        }
        info!("workers stopped, nothing is under way");
    }

    /// One worker. It owns all waiting; attempts run beside it, each under a permit of its own.
    async fn work(self: Arc<Self>, id: WorkerId, stop: CancellationToken) {
        let room = Arc::new(Semaphore::new(self.settings.batch_size));
        let mut cursor = None;
        let mut more_waits = false;
        let mut backoff = Duration::ZERO;
        loop {
            let turn = async {
                let permits = self.wait_for_room(&room, more_waits).await;
                let turn = self.claims.acquire().await.expect("the semaphore is never closed");
                (permits, turn)
            };
            let (permits, turn) = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                turn = turn => turn,
            };
            // armed before it looks, and only now that it has room: a wakeup must not reach a worker that has none
            let woken = self.wakeup.woken();
            let mut woken = pin!(woken);
            woken.as_mut().enable();
            let free = permits.num_permits() + room.available_permits();
            let claimed = self.claim(&id, free, cursor).await;
            drop((permits, turn));

            match claimed {
                Ok(deliveries) => {
                    backoff = Duration::ZERO;
                    more_waits = deliveries.len() == free;
                    cursor = deliveries.last().map_or(cursor, |last| Some(last.config_id));
                    let pacemakers = pacemakers(&deliveries);
                    for delivery in deliveries {
                        let permit = room
                            .clone()
                            .try_acquire_owned()
                            .expect("no more is claimed than there is room for");
                        let is_pacemaker = pacemakers.contains(&delivery.queue_id);
                        tokio::spawn(self.clone().attempt(delivery, is_pacemaker, permit));
                    }
                }
                Err(cause) => {
                    backoff = (backoff * 2).clamp(Duration::from_millis(100), BACKOFF_MAX);
                    let cause = anyhow::Error::new(cause);
                    warn!(
                        worker_id = id.as_str(),
                        error = format!("{cause:#}"),
                        retry_in_ms = backoff.as_millis(),
                        "cannot claim"
                    );
                }
            }
            if more_waits && backoff.is_zero() {
                self.wakeup.wake_worker();
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
        let all = u32::try_from(self.settings.batch_size).expect("settings keep it small");
        let _settled = room.acquire_many(all).await.expect("the semaphore is never closed");
    }

    /// Waits until there is room; while more waits than fits, for half of it, so that claims stay large.
    async fn wait_for_room(&self, room: &Arc<Semaphore>, more_waits: bool) -> OwnedSemaphorePermit {
        let half = u32::try_from(self.settings.batch_size.div_ceil(2)).expect("settings keep it small");
        if more_waits && let Ok(permits) = timeout(REFILL_WAIT, room.clone().acquire_many_owned(half)).await {
            return permits.expect("the semaphore is never closed");
        }
        room.clone().acquire_owned().await.expect("the semaphore is never closed")
    }

    async fn claim(
        &self,
        id: &WorkerId,
        limit: usize,
        after: Option<EndpointId>,
    ) -> Result<Vec<LeasedDelivery>, StoreError> {
        let mut claimed = Vec::new();
        loop {
            let claim = Claim {
                worker_id: id.clone(),
                limit: limit - claimed.len(),
                lease: self.settings.lease,
                after,
                rooms: self.shares.rooms(limit),
                floors: self.floors.for_claim(),
                held: false,
            };
            let deliveries = self.queue.claim(&claim).await?;
            self.shares.take(&claim.rooms, deliveries.iter().map(|d| (d.config_id, d.in_flight_limited)));
            metrics::counter!("webhook_claims_total").increment(1);
            metrics::counter!("webhook_claimed_total").increment(deliveries.len() as u64);
            let again = self.floors.learn(&claim.floors, claim.limit, &claim.rooms, &deliveries);
            claimed.extend(deliveries);
            if !again {
                return Ok(claimed);
            }
        }
    }

    /// One attempt. A panic in it is told here and healed by the lease.
    async fn attempt(
        self: Arc<Self>,
        delivery: LeasedDelivery,
        is_pacemaker: bool,
        _room: OwnedSemaphorePermit,
    ) {
        let (queue_id, config_id) = (delivery.queue_id, delivery.config_id);
        if let Some(starts_in) = delivery.starts_in {
            sleep_until((delivery.claimed_at + starts_in).into()).await;
            if is_pacemaker {
                self.wakeup.wake_worker();
            }
        }
        if AssertUnwindSafe(self.deliver.attempt(delivery)).catch_unwind().await.is_err() {
            error!(%queue_id, "an attempt panicked; it is repeated when the lease ends");
        }
        if self.shares.give_back(config_id) {
            self.wakeup.wake_worker();
        }
    }

    async fn promote_what_is_due(self: Arc<Self>, stop: CancellationToken) {
        loop {
            let rescheduled = self.wakeup.rescheduled();
            let mut rescheduled = pin!(rescheduled);
            rescheduled.as_mut().enable();
            let pause = match self.queue.promote(PROMOTE_MAX).await {
                Ok(promotion) => {
                    if promotion.promoted > 0 {
                        debug!(deliveries = promotion.promoted, "made ready");
                        self.wakeup.announce();
                    }
                    promotion.next_due_in.unwrap_or(PROMOTE_POLL).min(PROMOTE_POLL)
                }
                Err(cause) => {
                    debug!(error = %cause, "cannot make deliveries ready");
                    PROMOTE_POLL
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
    async fn record_held_losses(self: Arc<Self>, id: WorkerId, stop: CancellationToken) {
        let limit = self.settings.batch_size;
        loop {
            let claim = Claim {
                worker_id: id.clone(),
                limit,
                lease: self.settings.lease,
                after: None,
                rooms: Rooms { share: limit, listed: vec![] },
                floors: vec![],
                held: true,
            };
            match self.queue.claim(&claim).await {
                Ok(lost) if !lost.is_empty() => {
                    for delivery in lost {
                        self.deliver.attempt(delivery).await;
                    }
                    continue;
                }
                Ok(_) => {}
                Err(cause) => {
                    debug!(error = %cause, "cannot look for expired leases of endpoints that are held");
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
fn pacemakers(deliveries: &[LeasedDelivery]) -> HashSet<QueueId> {
    let mut starts: HashMap<EndpointId, Vec<(Duration, QueueId)>> = HashMap::new();
    for delivery in deliveries {
        if let Some(starts_in) = delivery.starts_in {
            starts.entry(delivery.config_id).or_default().push((starts_in, delivery.queue_id));
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

/// Up to a tenth longer or shorter, so that processes do not fall into step.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.9..1.1))
}
