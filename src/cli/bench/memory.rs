//! Resident memory of a process that runs the API and workers, at its highest.

use std::net::SocketAddr;
use std::slice::from_ref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use sqlx::Connection as _;
use tokio::task::JoinSet;

use super::BenchArgs;
use super::figures::{Figure, Samples, Unit};
use super::load::{self, Connection};
use super::program::Program;
use super::rig::Rig;
use crate::domain::endpoint::Endpoint;

/// Kinds of run in a round.
pub const RUNS: usize = 3;
/// Deliveries to drain, for each delivery of a run.
const WAITING: usize = 5;
/// How long that may take.
const DRAIN_MAX: Duration = Duration::from_mins(10);
/// Callers that send single events, one after the other.
const CALLERS: usize = 500;
/// Characters of their longest parameter: 16 MiB of such events are in the buffer before the first is given up.
const CALLERS_NOTE_CHARS: usize = 7_000;
/// Callers that send streams.
const STREAMS: usize = 40;
/// More than are on their way at a time.
const STREAM_EVENTS: usize = 2_000;
/// Characters of their longest parameter, so that each event has about the size that it counts for.
const STREAMS_NOTE_CHARS: usize = 300;
/// A refusal that comes this soon is for want of room; others are for want of time.
const AT_ONCE: Duration = Duration::from_secs(1);
/// How long the buffer may take to be full.
const FILL_MAX: Duration = Duration::from_mins(1);
/// How long it stays full.
const FULL_FOR: Duration = Duration::from_secs(5);

pub async fn measure(rig: &Rig, args: &BenchArgs) -> anyhow::Result<Vec<Figure>> {
    let mut samples = Samples::default();
    for _ in 0..args.rounds() {
        samples.add(
            "while draining",
            Unit::Megabytes,
            while_draining(rig, WAITING * args.deliveries()).await?,
        );
        let single = |endpoint: &Endpoint| load::post_event(endpoint, &note(CALLERS_NOTE_CHARS));
        let memory = with_a_full_buffer(rig, CALLERS, single).await?;
        samples.add(format!("with a full enqueue buffer, {CALLERS} callers"), Unit::Megabytes, memory);
        let stream =
            |endpoint: &Endpoint| load::post_events(endpoint, STREAM_EVENTS, &note(STREAMS_NOTE_CHARS));
        let memory = with_a_full_buffer(rig, STREAMS, stream).await?;
        samples.add(format!("with a full enqueue buffer, {STREAMS} streams"), Unit::Megabytes, memory);
    }
    Ok(samples.into_figures(|figure| figure.at_most(80.0)))
}

async fn while_draining(rig: &Rig, deliveries: usize) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    store.fill(from_ref(&store.endpoint), deliveries).await?;
    let due = rig.receiver.received().await? + deliveries as u64;
    let serve = Program::service("serve", &store).await?;
    let begun = Instant::now();
    while rig.receiver.received().await? < due {
        ensure!(begun.elapsed() < DRAIN_MAX, "{deliveries} deliveries are not drained");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let memory = serve.memory_mb()?;
    drop(serve);
    rig.finish(store).await?;
    Ok(memory.highest)
}

/// A parameter of so many characters.
fn note(chars: usize) -> [(&'static str, String); 1] {
    [("note", "x".repeat(chars))]
}

/// The database stores nothing for a while, as somebody holds a lock, and callers go on.
async fn with_a_full_buffer(
    rig: &Rig,
    callers: usize,
    request: impl Fn(&Endpoint) -> Vec<u8>,
) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    let serve = Program::service("serve", &store).await?;
    let mut blocker = store.connect().await?;
    let mut lock = blocker.begin().await?;
    sqlx::query("lock table webhook_event_keys in share mode").execute(&mut *lock).await?;

    let request = Arc::new(request(&store.endpoint));
    let mut lanes = JoinSet::new();
    for _ in 0..callers {
        lanes.spawn(call(serve.address, request.clone()));
    }
    let single = load::post_event(&store.endpoint, &note(CALLERS_NOTE_CHARS));
    let begun = Instant::now();
    let mut connection = Connection::open(serve.address).await?;
    loop {
        let asked = Instant::now();
        if connection.exchange(&single).await? == 503 && asked.elapsed() < AT_ONCE {
            break;
        }
        ensure!(begun.elapsed() < FILL_MAX, "the buffer does not become full");
    }
    tokio::time::sleep(FULL_FOR).await;
    lock.rollback().await?;
    tokio::time::sleep(FULL_FOR).await;
    let memory = serve.memory_mb()?;
    drop((lanes, serve));
    rig.finish(store).await?;
    Ok(memory.highest)
}

/// Sends the same again and again, whatever is answered.
async fn call(address: SocketAddr, request: Arc<Vec<u8>>) -> anyhow::Result<()> {
    let mut connection = Connection::open(address).await?;
    loop {
        connection.exchange(&request).await?;
    }
}
