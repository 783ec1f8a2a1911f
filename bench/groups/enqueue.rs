//! Enqueue, against plain inserts: single events against `pgbench`, a stream against `psql`.

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use tokio::process::Command;

use crate::BenchArgs;
use crate::report::figures::{Figure, Samples, Unit, per_second, percentile};
use crate::rig::Rig;
use crate::rig::load::{self, Connection, Schedule};
use crate::rig::payload::{self, new_delivery};
use crate::rig::program::Program;
use crate::rig::store::Store;

/// Kinds of run in a round.
pub const RUNS: usize = 5;
/// Clients of `pgbench`.
const PLAIN_CLIENTS: usize = 10;
/// Rows that one statement of `psql` inserts.
const PLAIN_ROWS: usize = 1_000;
/// Seconds for which half the rate is held.
const HALF_LOAD_SECONDS: f64 = 8.0;

const AGAINST_PGBENCH: &str = "POST /webhooks against pgbench";
const HALF_P99: &str = "POST /webhooks at half that rate, p99";
const AGAINST_PSQL: &str = "NDJSON against psql";

/// As plain as it gets: the columns, defaults and indexes of the open partition, none of its checks and settings.
const PLAIN_TABLE: &str =
    "create table plain_queue (like webhook_queue_open including defaults including indexes)";

pub async fn measure(rig: &Rig, args: &BenchArgs) -> anyhow::Result<Vec<Figure>> {
    let mut samples = Samples::default();
    let (single, many) = (args.deliveries(), args.deliveries() * 5 / 2);
    for _ in 0..args.rounds() {
        let post = posts(rig, args, single).await?;
        samples.add(format!("POST /webhooks, {} connections", args.connections), Unit::PerSecond, post);
        for protocol in ["simple", "prepared"] {
            let pgbench = plain_single_rows(rig, single, protocol).await?;
            let name = format!("pgbench: one-row INSERTs, {PLAIN_CLIENTS} clients, {protocol}");
            samples.add(name, Unit::PerSecond, pgbench);
            samples.add(format!("{AGAINST_PGBENCH}, {protocol}"), Unit::Ratio, post / pgbench);
        }
        let latencies = posts_at_rate(rig, args, post / 2.0).await?;
        samples.add("POST /webhooks at half that rate, p50", Unit::Milliseconds, percentile(&latencies, 50));
        samples.add(HALF_P99, Unit::Milliseconds, percentile(&latencies, 99));
        let ndjson = stream(rig, many).await?;
        let psql = plain_many_rows(rig, many).await?;
        samples.add("NDJSON, one stream", Unit::PerSecond, ndjson);
        samples.add(format!("psql: INSERTs of {PLAIN_ROWS} rows"), Unit::PerSecond, psql);
        samples.add(AGAINST_PSQL, Unit::Ratio, ndjson / psql);
    }
    Ok(samples.into_figures(|figure| match figure.name.as_str() {
        name if name.starts_with(AGAINST_PGBENCH) => figure.at_least(1.25),
        HALF_P99 => figure.at_most(20.0),
        AGAINST_PSQL => figure.at_least(0.6),
        _ => figure,
    }))
}

/// Single events over HTTP, each acknowledged after its commit, to an API without workers.
async fn posts(rig: &Rig, args: &BenchArgs, events: usize) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    let api = Program::service("api", &store).await?;
    let request = payload::post_event(&store.endpoint, &[]);
    let rate = load::at_full_speed(api.address, args.connections, events, request).await?;
    drop(api);
    rig.finish(store).await?;
    Ok(rate)
}

/// The same at a steady rate; the time of each in milliseconds.
async fn posts_at_rate(rig: &Rig, args: &BenchArgs, per_second: f64) -> anyhow::Result<Vec<f64>> {
    let store = rig.fresh().await?;
    let api = Program::service("api", &store).await?;
    let request = payload::post_event(&store.endpoint, &[]);
    // the API has been running for a while when it is measured
    load::at_full_speed(api.address, args.connections, args.deliveries() / 20, request.clone()).await?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
    let events = (per_second * HALF_LOAD_SECONDS) as usize;
    let schedule = Schedule::from_now(per_second);
    let latencies =
        load::on_schedule(api.address, args.connections, events, schedule, move |_| request.clone()).await?;
    drop(api);
    rig.finish(store).await?;
    Ok(latencies)
}

/// What `pgbench` reaches with the same rows, one a transaction.
async fn plain_single_rows(rig: &Rig, rows: usize, protocol: &str) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    store.execute(PLAIN_TABLE).await?;
    let script = rig.file("insert.pgbench");
    std::fs::write(&script, insert(&store, ["gen_random_uuid()".to_owned()]))?;
    let mut pgbench = rig.client("pgbench", &store).await?;
    pgbench.args(["--no-vacuum", "--jobs=2", "--protocol", protocol]);
    pgbench.args(["--client", &PLAIN_CLIENTS.to_string()]);
    pgbench.args(["--transactions", &rows.div_ceil(PLAIN_CLIENTS).to_string()]);
    let printed = output(pgbench.arg("--file").arg(script)).await?;
    let rate = printed.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    rig.finish(store).await?;
    rate.context("pgbench has shown no rate")
}

/// Many events as one stream of lines.
async fn stream(rig: &Rig, events: usize) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    let api = Program::service("api", &store).await?;
    let request = payload::post_events(&store.endpoint, events, &[]);
    let begun = Instant::now();
    Connection::open(api.address).await?.exchange(&request).await?;
    let rate = per_second(events, begun);
    let stored: i64 = sqlx::query_scalar("select count(*) from webhook_queue_open")
        .fetch_one(&mut store.connect().await?)
        .await?;
    ensure!(usize::try_from(stored)? == events, "{stored} events were stored of {events}");
    drop(api);
    rig.finish(store).await?;
    Ok(rate)
}

/// What `psql` reaches with the same rows, many a statement.
async fn plain_many_rows(rig: &Rig, rows: usize) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    store.execute(PLAIN_TABLE).await?;
    let script = rig.file("insert.sql");
    let mut statements = String::new();
    for begin in (0..rows).step_by(PLAIN_ROWS) {
        let ids = (begin..rows.min(begin + PLAIN_ROWS))
            .map(|_| format!("'{}'", new_delivery(&store.endpoint).queue_id));
        statements += &insert(&store, ids);
    }
    std::fs::write(&script, statements)?;
    let mut psql = rig.client("psql", &store).await?;
    psql.args(["--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", "--file"]).arg(script);
    let begun = Instant::now();
    output(&mut psql).await?;
    let rate = per_second(rows, begun);
    rig.finish(store).await?;
    Ok(rate)
}

/// One statement that inserts a row for each of `ids`, which are written as SQL.
fn insert(store: &Store, ids: impl IntoIterator<Item = String>) -> String {
    let delivery = new_delivery(&store.endpoint);
    let mut statement = "insert into plain_queue \
         (queue_id, event_type, event_id, config_id, webhook_url, url_params, priority, max_retries) values"
        .to_owned();
    for (number, id) in ids.into_iter().enumerate() {
        write!(
            statement,
            "{}\n({id}, '{}', '{}', {}, '{}', '{}', {}, {})",
            if number == 0 { "" } else { "," },
            delivery.event_type.as_str(),
            delivery.event_id,
            delivery.config_id,
            delivery.webhook_url,
            delivery.url_params,
            delivery.priority.get(),
            delivery.max_retries,
        )
        .expect("a String takes it");
    }
    statement + ";\n"
}

/// What a program prints, if it succeeds.
async fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().await.context("running a program of PostgreSQL")?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(printed)
}
