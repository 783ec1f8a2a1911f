//! Many minutes at half the drain rate: memory, the open partition and the lag must not grow.

use std::time::{Duration, Instant};

use super::BenchArgs;
use super::drain::fill_and_drain;
use super::figures::{Figure, Samples, Unit, float};
use super::load::{self, Schedule};
use super::program::Program;
use super::rig::{Rig, Store};
use crate::cli::output::say;

/// Requests a second, each of which carries many events.
const REQUESTS: f64 = 10.0;
/// Connections that send them.
const CONNECTIONS: usize = 4;
const SECONDS: usize = 60;

const LAG: &str = "age of the oldest ready delivery, highest";
const MEMORY: &str = "memory at the end against the second minute";
const PARTITION: &str = "open partition after VACUUM, at the end against the second minute";

pub fn runs(args: &BenchArgs) -> usize {
    1 + args.minutes()
}

pub async fn measure(rig: &Rig, args: &BenchArgs) -> anyhow::Result<Vec<Figure>> {
    let store = rig.fresh().await?;
    let rate = fill_and_drain(rig, &store, args.deliveries()).await? / 2.0;
    rig.finish(store).await?;

    let store = rig.fresh().await?;
    let serve = Program::service("serve", &store).await?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
    let events = (rate / REQUESTS).ceil() as usize;
    let requests = 10 * SECONDS;
    let request = load::post_events(&store.endpoint, events, &[]);
    let mut minutes = Vec::new();
    for minute in 1..=args.minutes() {
        let received = rig.receiver.received().await?;
        let begun = Instant::now();
        let request = request.clone();
        let schedule = Schedule::from_now(REQUESTS);
        load::on_schedule(serve.address, CONNECTIONS, requests, schedule, move |_| request.clone()).await?;
        let delivered = rig.receiver.received().await? - received;
        let state = Minute {
            delivered_per_second: float(usize::try_from(delivered)?) / begun.elapsed().as_secs_f64(),
            lag_ms: serve.get("/webhooks/stats").await?["oldest_ready_age_ms"].as_f64().unwrap_or_default(),
            memory_mb: serve.memory_mb()?.now,
            partition_bytes: partition_bytes(&store).await?,
        };
        rig.bar.suspend(|| say(state.text(minute)))?;
        rig.bar.inc(1);
        minutes.push(state);
    }
    // what is still under way ends
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop(serve);
    rig.drop_database(&store.name).await?;

    let mut samples = Samples::default();
    for minute in &minutes {
        samples.add("delivered", Unit::PerSecond, minute.delivered_per_second);
    }
    let (Some(last), Some(second)) = (minutes.last(), minutes.get(1).or(minutes.first())) else {
        return Ok(vec![]);
    };
    let lag = minutes.iter().map(|minute| minute.lag_ms).fold(0.0, f64::max);
    samples.add(LAG, Unit::Milliseconds, lag);
    samples.add("memory at the end", Unit::Megabytes, last.memory_mb);
    samples.add(MEMORY, Unit::Ratio, last.memory_mb / second.memory_mb);
    samples.add("open partition after VACUUM, at the end", Unit::Bytes, last.partition_bytes);
    samples.add(PARTITION, Unit::Ratio, last.partition_bytes / second.partition_bytes);
    Ok(samples.into_figures(|figure| match figure.name.as_str() {
        LAG => figure.at_most(1_000.0),
        MEMORY | PARTITION => figure.at_most(1.1),
        _ => figure,
    }))
}

/// How it stood at the end of a minute.
struct Minute {
    delivered_per_second: f64,
    lag_ms: f64,
    memory_mb: f64,
    partition_bytes: f64,
}

impl Minute {
    fn text(&self, number: usize) -> String {
        format!(
            "minute {number}: {} delivered, oldest ready {}, memory {}, open partition {}",
            Unit::PerSecond.write(self.delivered_per_second),
            Unit::Milliseconds.write(self.lag_ms),
            Unit::Megabytes.write(self.memory_mb),
            Unit::Bytes.write(self.partition_bytes),
        )
    }
}

/// With its indexes, once what is dead is cleared away.
async fn partition_bytes(store: &Store) -> anyhow::Result<f64> {
    store.execute("vacuum webhook_queue_open").await?;
    let bytes = sqlx::query_scalar("select pg_total_relation_size('webhook_queue_open')::float8")
        .fetch_one(&mut store.connect().await?)
        .await?;
    Ok(bytes)
}
