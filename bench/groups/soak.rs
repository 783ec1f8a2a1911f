//! Many minutes at half the drain rate, after which nothing may have grown: memory, the open partition, the lag.

use std::time::Instant;

use super::drain::drain_fresh;
use crate::BenchArgs;
use crate::report::figures::{Figure, Samples, Unit, float, median};
use crate::rig::Rig;
use crate::rig::load::{self, Schedule};
use crate::rig::payload;
use crate::rig::program::Program;
use crate::rig::store::Store;

/// Requests a second, each of which carries many events.
const REQUESTS: f64 = 10.0;
/// Connections that send them.
const CONNECTIONS: usize = 4;
const SECONDS: usize = 60;

const LAG: &str = "age of the oldest ready delivery, at the end";
const MEMORY: &str = "memory at the end against half time";
const PARTITION: &str = "open partition after VACUUM, at the end against half time";

pub fn runs(args: &BenchArgs) -> usize {
    args.rounds() + args.minutes()
}

pub async fn measure(rig: &Rig, args: &BenchArgs) -> anyhow::Result<Vec<Figure>> {
    let mut rates = Vec::new();
    for _ in 0..args.rounds() {
        rates.push(drain_fresh(rig, args.deliveries()).await?);
    }
    let rate = median(&rates) / 2.0;

    let store = rig.fresh().await?;
    let serve = Program::service("serve", &store).await?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
    let events = (rate / REQUESTS).ceil() as usize;
    let requests = 10 * SECONDS;
    let request = payload::post_events(&store.endpoint, events, &[]);
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
            partition_mb: partition_mb(&store).await?,
        };
        // not part of the result, which may be meant for a program
        rig.bar.suspend(|| eprintln!("{}", state.text(minute)));
        rig.bar.inc(1);
        minutes.push(state);
    }
    drop(serve);
    rig.drop_database(&store.name).await?;

    let mut samples = Samples::default();
    for minute in &minutes {
        samples.add("delivered", Unit::PerSecond, minute.delivered_per_second);
    }
    // files of indexes never shrink: they have their size once the longest pause between two vacuums has been
    let (Some(last), Some(half_time)) = (minutes.last(), minutes.get(minutes.len() / 2)) else {
        return Ok(vec![]);
    };
    let highest = minutes.iter().map(|minute| minute.lag_ms).fold(0.0, f64::max);
    samples.add(
        "age of the oldest ready delivery, at the worst end of a minute",
        Unit::Milliseconds,
        highest,
    );
    samples.add(LAG, Unit::Milliseconds, last.lag_ms);
    samples.add("memory at the end", Unit::Megabytes, last.memory_mb);
    samples.add(MEMORY, Unit::Ratio, last.memory_mb / half_time.memory_mb);
    samples.add("open partition after VACUUM, at the end", Unit::Megabytes, last.partition_mb);
    samples.add(PARTITION, Unit::Ratio, last.partition_mb / half_time.partition_mb);
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
    partition_mb: f64,
}

impl Minute {
    fn text(&self, number: usize) -> String {
        format!(
            "minute {number}: {} delivered, oldest ready {}, memory {}, open partition {}",
            Unit::PerSecond.write(self.delivered_per_second),
            Unit::Milliseconds.write(self.lag_ms),
            Unit::Megabytes.write(self.memory_mb),
            Unit::Megabytes.write(self.partition_mb),
        )
    }
}

/// With its indexes, once what is dead is cleared away.
async fn partition_mb(store: &Store) -> anyhow::Result<f64> {
    store.execute("vacuum webhook_queue_open").await?;
    let megabytes = sqlx::query_scalar("select pg_total_relation_size('webhook_queue_open') / 1e6::float8")
        .fetch_one(&mut store.connect().await?)
        .await?;
    Ok(megabytes)
}
