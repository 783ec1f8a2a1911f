//! What becomes of the drain when there is much of something: history, schedules, endpoints, snapshots, processes.
//!
//! Each run is compared with a drain just before it, on a fresh database with one endpoint.

use std::slice::from_ref;
use std::time::{Duration, Instant};

use anyhow::ensure;
use sqlx::Connection as _;
use webhook_processor::domain::endpoint_settings::EndpointParts;
use webhook_processor::infrastructure::postgres::tell_ready;

use super::drain::{drain, drain_fresh, fill_and_drain};
use crate::BenchArgs;
use crate::report::figures::{Figure, Samples, Unit, median, per_second, percentile, written};
use crate::rig::load::Connection;
use crate::rig::program::Program;
use crate::rig::store::Store;
use crate::rig::{Rig, operator};

/// Runs in a round.
pub const RUNS: usize = 12 + PROCESSES.len();
/// Runs that are made once: large databases are loaded.
pub const LOADS: usize = 2;
/// Archived deliveries, for each delivery of a run.
const ARCHIVED: usize = 125;
/// Deliveries scheduled for later, for each delivery of a run.
const SCHEDULED: usize = 25;
/// One of this many is an endpoint, of those that are scheduled.
const SCHEDULED_EACH: usize = 100;
/// Ready deliveries of each of many endpoints.
const READY_EACH: usize = 2;
/// Numbers of processes.
const PROCESSES: [usize; 3] = [2, 4, 8];
/// How many times statistics are asked for.
const STATISTICS_CALLS: usize = 100;
/// How long processes may take to drain.
const DRAIN_MAX: Duration = Duration::from_mins(5);

const FRESH: &str = "drain of a fresh database, one endpoint";
const SNAPSHOT: &str = "drain beside a snapshot that is held open";
const NEVER_ANALYZED: &str = "drain, never analyzed against analyzed";
const OF_PROCESSES: &str = " processes against one";
const STATISTICS: &str = "GET /webhooks/stats, with as many archived";

pub async fn measure(rig: &Rig, args: &BenchArgs) -> anyhow::Result<Vec<Figure>> {
    let count = args.deliveries();
    let archived = rig.fresh().await?;
    load_archive(&archived, ARCHIVED * count).await?;
    rig.bar.inc(1);
    let scheduled = rig.fresh().await?;
    load_schedule(&scheduled, SCHEDULED * count).await?;
    rig.checkpoint().await?;
    rig.bar.inc(1);
    let [with_archived, with_scheduled, with_endpoints] = [
        format!("drain with {} archived", written(ARCHIVED * count)),
        format!(
            "drain with {} scheduled for later, on {} endpoints",
            written(SCHEDULED * count),
            written(SCHEDULED * count / SCHEDULED_EACH)
        ),
        format!("drain of {} endpoints", written(count / READY_EACH)),
    ];

    let mut samples = Samples::default();
    for _ in 0..args.rounds() {
        let rate = fresh(rig, count, &mut samples).await?;
        let drained = fill_and_drain(rig, &archived, count).await?;
        rig.bar.inc(1);
        samples.add(&with_archived, Unit::Ratio, drained / rate);
        let rate = fresh(rig, count, &mut samples).await?;
        let drained = fill_and_drain(rig, &scheduled, count).await?;
        rig.bar.inc(1);
        samples.add(&with_scheduled, Unit::Ratio, drained / rate);
        let rate = fresh(rig, count, &mut samples).await?;
        samples.add(&with_endpoints, Unit::Ratio, many_endpoints(rig, count).await? / rate);
        let rate = fresh(rig, count, &mut samples).await?;
        samples.add(SNAPSHOT, Unit::Ratio, beside_a_snapshot(rig, count).await? / rate);
        let rate = fresh(rig, count, &mut samples).await?;
        samples.add(NEVER_ANALYZED, Unit::Ratio, rate / analyzed(rig, count).await?);

        let one = by_processes(rig, count, 1).await?;
        samples.add("drain by one process of its own", Unit::PerSecond, one);
        for processes in PROCESSES {
            let rate = by_processes(rig, count, processes).await?;
            samples.add(format!("{processes}{OF_PROCESSES}"), Unit::Ratio, rate / one);
        }
        let times = statistics(&archived).await?;
        rig.bar.inc(1);
        samples.add(STATISTICS, Unit::Milliseconds, median(&times));
        samples.add("the same, slowest of 100", Unit::Milliseconds, percentile(&times, 100));
    }
    for store in [archived, scheduled] {
        rig.drop_database(&store.name).await?;
    }
    Ok(samples.into_figures(|figure| match figure.name.as_str() {
        SNAPSHOT => figure.at_least(0.8),
        NEVER_ANALYZED => figure.at_least(0.95),
        STATISTICS => figure.at_most(20.0),
        name if [&with_archived, &with_scheduled, &with_endpoints].iter().any(|known| *known == name) => {
            figure.at_least(0.9)
        }
        name if name.ends_with(OF_PROCESSES) => figure.at_least(1.0),
        _ => figure,
    }))
}

/// What the run after it is measured against.
async fn fresh(rig: &Rig, count: usize, samples: &mut Samples) -> anyhow::Result<f64> {
    let rate = drain_fresh(rig, count).await?;
    samples.add(FRESH, Unit::PerSecond, rate);
    Ok(rate)
}

/// Terminal deliveries of the last hours, all in the archive of today, into which settles write.
async fn load_archive(store: &Store, count: usize) -> anyhow::Result<()> {
    // two at a time, each every other row, so that the rows lie about in the order of time
    let halves = [1, 2].map(|first: i64| async move {
        let mut connection = store.connect().await?;
        sqlx::query(
            "insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, url_params, priority,
               max_retries, created_at, status, updated_at, next_retry_at, ready_since, completed_at, settled_in,
               retry_0_started_at, retry_0_completed_at, retry_0_duration_ms, retry_0_http_status, retry_0_response_body)
             select d.queue_id, '+credit', d.queue_id::text, $1,
               $2 || '?user_id=user_123&value=100&token=abc123&signature=xyz789',
               '{\"user_id\":\"user_123\",\"value\":\"100\",\"token\":\"abc123\",\"signature\":\"xyz789\"}', 2,
               6, d.ended, 'completed', d.ended, d.ended, null, d.ended, 1 + n * (txid_current() - 1) / $4,
               d.ended, d.ended, n % 50, 200, 'ok'
             from generate_series($3, $4, 2) as n
             cross join lateral (
               select (lpad(to_hex(n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid as queue_id,
                      greatest(now() - ($4 - n) * interval '2 ms', date_trunc('day', now(), 'UTC')) as ended) as d",
        )
        .bind(store.endpoint.id.get())
        .bind(store.endpoint_url())
        .bind(first)
        .bind(i64::try_from(count)?)
        .execute(&mut connection)
        .await?;
        anyhow::Ok(())
    });
    futures_util::future::try_join_all(halves).await?;
    store.execute("vacuum (analyze) webhook_queue").await?;
    count_statistics(store).await
}

/// Lets the statistics catch up, as processes do by themselves.
async fn count_statistics(store: &Store) -> anyhow::Result<()> {
    let database = store.open();
    database.count_statistics(Duration::ZERO).await?;
    database.close().await;
    Ok(())
}

/// Deliveries that are due tomorrow, on many endpoints.
async fn load_schedule(store: &Store, count: usize) -> anyhow::Result<()> {
    let endpoints = store.more_endpoints(count / SCHEDULED_EACH).await?;
    sqlx::query(
        "insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, url_params, priority,
           max_retries, next_retry_at, ready_since)
         select d.queue_id, '+credit', d.queue_id::text, ($1::bigint[])[1 + n % cardinality($1)],
           $2 || '?user_id=user_123', '{\"user_id\":\"user_123\"}', 2, 6,
           now() + interval '1 day' + n * interval '1 ms', null
         from generate_series(1, $3::bigint) as n
         cross join lateral (
           select (lpad(to_hex(n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid as queue_id) as d",
    )
    .bind(endpoints.iter().map(|endpoint| endpoint.id.get()).collect::<Vec<_>>())
    .bind(store.endpoint_url())
    .bind(i64::try_from(count)?)
    .execute(&mut store.connect().await?)
    .await?;
    store.execute("vacuum webhook_queue_open").await
}

async fn many_endpoints(rig: &Rig, count: usize) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    let endpoints = store.more_endpoints(count / READY_EACH).await?;
    store.fill(&endpoints, count).await?;
    let drained = drain(rig, &store, count).await?;
    rig.finish(store).await?;
    Ok(drained)
}

/// The snapshot is older than the first delivery, so no trace of any can be removed before the end.
async fn beside_a_snapshot(rig: &Rig, count: usize) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    let mut connection = store.connect().await?;
    let mut snapshot = connection.begin_with("begin isolation level repeatable read").await?;
    sqlx::query("select from webhook_queue_open").execute(&mut *snapshot).await?;
    store.fill(from_ref(&store.endpoint), count).await?;
    let drained = drain(rig, &store, count).await?;
    snapshot.rollback().await?;
    rig.finish(store).await?;
    Ok(drained)
}

async fn analyzed(rig: &Rig, count: usize) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    store.fill(from_ref(&store.endpoint), count).await?;
    store.execute("analyze").await?;
    let drained = drain(rig, &store, count).await?;
    rig.finish(store).await?;
    Ok(drained)
}

/// Real workers, which wait for their endpoint to be enabled.
async fn by_processes(rig: &Rig, count: usize, processes: usize) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    let database = store.open();
    let endpoints = store.application(&database).api.endpoints;
    let enable = async |enabled| {
        let parts = EndpointParts { enabled: Some(enabled), ..EndpointParts::default() };
        endpoints.change(store.endpoint.id, parts, &operator()).await
    };
    let disabled = enable(false).await?;
    let mut workers = Vec::new();
    for _ in 0..processes {
        workers.push(Program::service("worker", &store).await?);
    }
    store.fill(&[disabled], count).await?;
    let received = rig.receiver.received().await?;
    let begun = Instant::now();
    enable(true).await?;
    tell_ready(&database, None).await?;
    // cheap to ask; the queue, which is not, is asked once the end is near
    while rig.receiver.received().await? < received + count as u64 {
        ensure!(begun.elapsed() < DRAIN_MAX, "{processes} processes do not drain");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut connection = store.connect().await?;
    while sqlx::query_scalar("select exists (select from webhook_queue_open)")
        .fetch_one(&mut connection)
        .await?
    {
        ensure!(begun.elapsed() < DRAIN_MAX, "{processes} processes do not settle");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let rate = per_second(count, begun);
    drop(workers);
    database.close().await;
    rig.finish(store).await?;
    Ok(rate)
}

/// Milliseconds of each call.
async fn statistics(store: &Store) -> anyhow::Result<Vec<f64>> {
    count_statistics(store).await?;
    let api = Program::service("api", store).await?;
    let mut connection = Connection::open(api.address).await?;
    let mut times = Vec::with_capacity(STATISTICS_CALLS);
    for _ in 0..STATISTICS_CALLS {
        let begun = Instant::now();
        connection.get("/webhooks/stats").await?;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    Ok(times)
}
