//! The workers of a process: they take leases on deliveries, make the attempts, and settle them.
//!
//! A *worker* is a name under which slots are held, not a task. There is no loop per worker. The names are written into the
//! leases, so that the audit shows who held what.
//!
//! The cast, in the order in which a delivery meets it:
//!
//! - a [slot](slots) is the right to hold one more lease; each worker has `WORKER_BATCH_SIZE` of them;
//! - the [ledger] counts the leases per endpoint and says how much room a claim has there;
//! - a [reservation](reservations) keeps a slot for an event that is being stored, so that it needs no claim;
//! - the claimer waits for free slots, claims for all workers at once, and starts an attempt for each delivery;
//! - the promoter makes scheduled deliveries ready when they are due;
//! - losses are recorded for attempts whose workers never reported an outcome;
//! - [lost answers](lost_answers) of the store may have left leases that nobody uses; these are found and given back.

mod claimer;
pub mod ledger;
mod losses;
pub mod lost_answers;
mod promoter;
pub mod reservations;
mod restart;
pub mod slots;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use rand::RngExt as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;

use self::ledger::Ledger;
use self::lost_answers::LostClaims;
use self::restart::again_after_panics;
use self::slots::Slots;
use super::deliver::Deliver;
use super::duties::Duties;
use super::ports::DeliveryQueue;
use super::wakeup::Wakeup;
use crate::domain::delivery::WorkerId;

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
    pub lease_term: Duration,
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
    lost_claims: LostClaims,
    duties: Arc<Duties>,
    stop: CancellationToken,
    pub(super) slots: Arc<Slots>,
    pub(super) ledger: Arc<Ledger>,
}

impl WorkerPool {
    /// Workers that are yet to run.
    pub fn new(
        queue: Arc<dyn DeliveryQueue>,
        deliver: Deliver,
        wakeup: Arc<Wakeup>,
        ledger: Arc<Ledger>,
        duties: Arc<Duties>,
        settings: WorkerSettings,
        names: WorkerNames,
    ) -> Self {
        let slots = Slots::new(&names.of(settings.count), settings.batch_size);
        let (losses, stop) = (TaskTracker::new(), CancellationToken::new());
        let lost_claims = LostClaims::default();
        Self { queue, deliver, wakeup, settings, names, losses, lost_claims, duties, stop, slots, ledger }
    }

    /// For how long a lease is taken.
    pub fn lease_term(&self) -> Duration {
        self.settings.lease_term
    }

    /// Works until `stop`, then lets the attempts under way end and settles them.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        info!(workers = self.settings.count, batch_size = self.settings.batch_size, "workers started");
        tokio::join!(
            again_after_panics(&stop, || self.clone().claim_and_attempt(stop.clone())),
            again_after_panics(&stop, || self.clone().promote_what_is_due(stop.clone())),
            again_after_panics(&stop, || self.clone().record_held_losses(stop.clone())),
            again_after_panics(&stop, || self.clone().release_lost_claims(stop.clone())),
        );
        self.stop.cancel();
        self.slots.close().await;
        self.losses.close();
        self.losses.wait().await;
        info!("workers stopped, nothing is under way");
    }
}
