//! The drain and its ceiling: what claim, send and settle would reach if they took turns on the machine without any
//! loss, `1 / (1 / HTTP only + 1 / SQL only)`.

use std::slice::from_ref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::BenchArgs;
use super::figures::{Figure, Samples, Unit, float};
use super::rig::{Rig, Store, new_delivery, per_second};
use crate::application::circuits::Circuits;
use crate::application::deliver::{AttemptLimits, Deliver};
use crate::application::directory::EndpointDirectory;
use crate::application::ports::{Claim, DeliveryQueue as _, Sender};
use crate::application::wakeup::Wakeup;
use crate::application::workers::ledger::{Ledger, Rooms};
use crate::application::workers::{WorkerNames, WorkerPool};
use crate::domain::address::AddressPolicy;
use crate::domain::attempt::{Answer, AttemptOutcome};
use crate::domain::delivery::{AttemptTimes, FinishedAttempt, Lease, LeasedDelivery, Work, WorkerId};
use crate::domain::endpoint::Endpoint;
use crate::domain::retry::Verdict;
use crate::infrastructure::sender::{HttpSender, SenderSettings};

/// Kinds of run in a round.
pub const RUNS: usize = CEILING_RUNS + 1;
/// Kinds of run that make a ceiling.
pub const CEILING_RUNS: usize = 2;
pub const CEILING: &str = "ceiling: 1 / (1 / HTTP + 1 / SQL)";
/// Clients that claim and settle without sending.
const SQL_CLIENTS: usize = 2;

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
        samples.add(CEILING, Unit::PerSecond, ceiling.both());
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

/// The two halves of a drain, each alone, in deliveries a second.
pub struct Ceiling {
    http_only: f64,
    sql_only: f64,
}

impl Ceiling {
    pub async fn measure(rig: &Rig, deliveries: usize) -> anyhow::Result<Self> {
        let http_only = http_only(rig, deliveries).await?;
        rig.bar.inc(1);
        let sql_only = sql_only(rig, deliveries).await?;
        Ok(Self { http_only, sql_only })
    }

    /// By taking turns.
    pub fn both(&self) -> f64 {
        1.0 / (1.0 / self.http_only + 1.0 / self.sql_only)
    }
}

fn sender(rig: &Rig) -> anyhow::Result<HttpSender> {
    HttpSender::new(SenderSettings {
        timeout: rig.settings.http_timeout,
        response_bytes_max: rig.settings.response_bytes_max,
        idle_connections_max: rig.settings.workers.leases_max(),
        addresses: AddressPolicy::new(rig.settings.egress_allow.clone()),
    })
}

/// The sender alone, as many requests under way as workers hold leases.
async fn http_only(rig: &Rig, requests: usize) -> anyhow::Result<f64> {
    let sender = Arc::new(sender(rig)?);
    let endpoint = Arc::new(rig.endpoint.clone());
    let left = Arc::new(AtomicUsize::new(requests));
    let begun = Instant::now();
    let lanes = (0..rig.settings.workers.leases_max()).map(|_| {
        let (sender, endpoint, left) = (sender.clone(), endpoint.clone(), left.clone());
        let delivery = leased(&endpoint);
        tokio::spawn(async move {
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
            {
                let outcome = sender.send(&delivery, &endpoint).await;
                let status = outcome.as_ref().and_then(AttemptOutcome::status);
                anyhow::ensure!(status == Some(200), "the receiver answered {outcome:?}");
            }
            Ok(())
        })
    });
    for lane in futures_util::future::join_all(lanes).await {
        lane??;
    }
    Ok(per_second(requests, begun))
}

/// A delivery as a worker would hold it.
fn leased(endpoint: &Endpoint) -> LeasedDelivery {
    let new = new_delivery(endpoint);
    LeasedDelivery {
        queue_id: new.queue_id,
        lease: Lease { worker_id: WorkerId::new("bench", 0, 0, 0), locked_at: chrono::Utc::now() },
        config_id: new.config_id,
        config_revision: new.config_revision,
        event_id: new.event_id,
        webhook_url: new.webhook_url,
        traceparent: None,
        attempt: 0,
        max_retries: new.max_retries,
        priority: new.priority,
        probe: false,
        in_flight_limited: false,
        claimed_at: Instant::now(),
        work: Work::Attempt { waited: Duration::ZERO, starts_at: None },
    }
}

/// The queue alone: claims of the size of a process's, each settled before the next one of the same client.
async fn sql_only(rig: &Rig, deliveries: usize) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    store.fill(from_ref(&store.endpoint), deliveries).await?;
    let database = &store.open();
    let begun = Instant::now();
    let clients = (1..=SQL_CLIENTS).map(|number| async move {
        let limit = rig.settings.workers.claim_max();
        let claim = Claim {
            worker_ids: vec![WorkerId::new("bench", 0, 0, number); limit],
            lease_term: rig.settings.workers.lease_term,
            after: None,
            rooms: Rooms { limit, share: limit, listed: vec![] },
        };
        loop {
            let claimed = database.claim(&claim).await?;
            if claimed.deliveries.is_empty() && !claimed.look_again {
                return anyhow::Ok(());
            }
            let delivered: Vec<_> = claimed.deliveries.into_iter().map(delivered).collect();
            database.settle(&delivered.iter().collect::<Vec<_>>()).await?;
        }
    });
    for client in futures_util::future::join_all(clients).await {
        client?;
    }
    let rate = per_second(deliveries, begun);
    database.close().await;
    rig.finish(store).await?;
    Ok(rate)
}

/// What a worker would settle had the receiver answered at once.
fn delivered(delivery: LeasedDelivery) -> FinishedAttempt {
    FinishedAttempt {
        queue_id: delivery.queue_id,
        lease: delivery.lease,
        config_id: delivery.config_id,
        webhook_url: delivery.webhook_url,
        number: delivery.attempt,
        times: AttemptTimes::Measured { started: delivery.claimed_at, ended: Instant::now() },
        outcome: AttemptOutcome::Answered(Answer {
            status: 200,
            body: "ok".into(),
            retry_after: None,
            broken_off: None,
        }),
        verdict: Verdict::Completed,
    }
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
        Arc::new(StopAfter { sender: sender(rig)?, left: AtomicUsize::new(deliveries), stop: stop.clone() });
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
