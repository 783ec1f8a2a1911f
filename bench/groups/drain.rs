//! The drain of a full queue, against its ceiling.

use std::slice::from_ref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use webhook_processor::application::circuits::Circuits;
use webhook_processor::application::deliver::{AttemptLimits, Deliver};
use webhook_processor::application::directory::EndpointDirectory;
use webhook_processor::application::ports::Sender;
use webhook_processor::application::wakeup::Wakeup;
use webhook_processor::application::workers::ledger::Ledger;
use webhook_processor::application::workers::{WorkerNames, WorkerPool};
use webhook_processor::domain::attempt::AttemptOutcome;
use webhook_processor::domain::delivery::LeasedDelivery;
use webhook_processor::domain::endpoint::Endpoint;
use webhook_processor::infrastructure::sender::HttpSender;

use super::ceiling::{self, Ceiling};
use crate::BenchArgs;
use crate::report::figures::{Figure, Samples, Unit, float, per_second};
use crate::rig::Rig;
use crate::rig::store::Store;

/// Kinds of run in a round.
pub const RUNS: usize = ceiling::RUNS + 1;
const SHARE: &str = "drain, share of the ceiling";
const WAL: &str = "WAL for a delivery, during the drain";
const COMMITS: &str = "commits for a delivery, during the drain";

pub async fn measure(rig: &Rig, args: &BenchArgs) -> anyhow::Result<Vec<Figure>> {
    let mut samples = Samples::default();
    for _ in 0..args.rounds() {
        let ceiling = Ceiling::measure(rig, args.deliveries()).await?;
        let drained = drain_and_count(rig, args.deliveries()).await?;
        samples.add("HTTP only: sender against receiver", Unit::PerSecond, ceiling.http_only);
        samples.add("SQL only: claim and settle", Unit::PerSecond, ceiling.sql_only);
        samples.add(ceiling::BOTH, Unit::PerSecond, ceiling.both());
        samples.add("drain: claim, GET, settle, audit", Unit::PerSecond, drained.per_second);
        samples.add(SHARE, Unit::Ratio, drained.per_second / ceiling.both());
        samples.add(WAL, Unit::Bytes, drained.wal_bytes);
        samples.add(COMMITS, Unit::Number, drained.commits);
    }
    Ok(samples.into_figures(|figure| match figure.name.as_str() {
        SHARE => figure.at_least(0.8),
        WAL => figure.at_most(3072.0),
        COMMITS => figure.at_most(0.1),
        _ => figure,
    }))
}

/// What a drain took.
struct Drained {
    per_second: f64,
    /// For a delivery.
    wal_bytes: f64,
    /// For a delivery.
    commits: f64,
}

/// Fills the queue for one endpoint and drains it, of which only the latter counts.
async fn drain_and_count(rig: &Rig, deliveries: usize) -> anyhow::Result<Drained> {
    let store = rig.fresh().await?;
    store.fill(from_ref(&store.endpoint), deliveries).await?;
    let before = Written::by_now(rig, &store).await?;
    let per_second = drain(rig, &store, deliveries).await?;
    let after = Written::by_now(rig, &store).await?;
    rig.finish(store).await?;
    Ok(Drained {
        per_second,
        wal_bytes: (after.wal_bytes - before.wal_bytes) / float(deliveries),
        commits: (after.commits - before.commits) / float(deliveries),
    })
}

/// Fills and drains a database of its own.
pub async fn drain_fresh(rig: &Rig, deliveries: usize) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    let rate = fill_and_drain(rig, &store, deliveries).await?;
    rig.finish(store).await?;
    Ok(rate)
}

/// Fills the queue for one endpoint, then drains it.
pub async fn fill_and_drain(rig: &Rig, store: &Store, deliveries: usize) -> anyhow::Result<f64> {
    store.fill(from_ref(&store.endpoint), deliveries).await?;
    drain(rig, store, deliveries).await
}

/// Lets workers empty a queue that holds so many ready deliveries. Answers how many a second.
pub async fn drain(rig: &Rig, store: &Store, deliveries: usize) -> anyhow::Result<f64> {
    let database = store.open();
    let stop = CancellationToken::new();
    let sender =
        Arc::new(StopAfter { sender: rig.sender()?, left: AtomicUsize::new(deliveries), stop: stop.clone() });
    let queue = Arc::new(database.clone());
    let wakeup = Arc::new(Wakeup::default());
    let directory = Arc::new(EndpointDirectory::start(queue.clone()));
    let circuits = Circuits::new(queue.clone(), wakeup.clone());
    let ledger = Ledger::new(rig.settings.workers.leases_max(), wakeup.clone());
    let limits =
        AttemptLimits { lease_term: rig.settings.workers.lease_term, attempt_max: rig.settings.http_timeout };
    let deliver =
        Deliver::start(directory, queue.clone(), circuits, sender, wakeup.clone(), ledger.clone(), limits);
    let names = WorkerNames { host: "bench".into(), pid: 0 };
    let pool = Arc::new(WorkerPool::new(
        queue,
        deliver,
        wakeup,
        ledger,
        Arc::default(),
        rig.settings.workers.clone(),
        names,
    ));
    let begun = Instant::now();
    // ends once the last attempt is settled
    pool.run(stop).await;
    let rate = per_second(deliveries, begun);
    database.close().await;
    Ok(rate)
}

/// What has been written: the log by the whole server, commits in one database. Connections count theirs, at the latest,
/// when they end.
struct Written {
    wal_bytes: f64,
    commits: f64,
}

impl Written {
    async fn by_now(rig: &Rig, store: &Store) -> anyhow::Result<Self> {
        rig.wait_for_farewell(&store.name).await?;
        let (wal_bytes, commits) = sqlx::query_as(
            "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8, xact_commit::float8
             from pg_stat_database where datname = $1",
        )
        .bind(&store.name)
        .fetch_one(&mut rig.connect().await?)
        .await?;
        Ok(Self { wal_bytes, commits })
    }
}

/// Stops the workers once the last delivery is sent.
struct StopAfter {
    sender: HttpSender,
    left: AtomicUsize,
    stop: CancellationToken,
}

#[async_trait]
impl Sender for StopAfter {
    async fn send(&self, delivery: &LeasedDelivery, endpoint: &Endpoint) -> Option<AttemptOutcome> {
        let outcome = self.sender.send(delivery, endpoint).await;
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.stop.cancel();
        }
        outcome
    }
}
