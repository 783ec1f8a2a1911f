//! Resident memory of a `serve` process, at its highest.

use std::net::SocketAddr;
use std::slice::from_ref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use sqlx::Connection as _;
use tokio::task::JoinSet;
use webhook_processor::domain::endpoint::Endpoint;

use crate::BenchArgs;
use crate::report::figures::{Figure, Samples, Unit};
use crate::rig::Rig;
use crate::rig::load::Connection;
use crate::rig::payload;
use crate::rig::program::Program;

/// Kinds of run in a round.
pub const RUNS: usize = 3;
/// Deliveries to drain, for each delivery of a run.
const WAITING: usize = 5;
/// How long that may take.
const DRAIN_MAX: Duration = Duration::from_mins(10);
/// Callers that send single events, one after the other.
const CALLERS: usize = 500;
/// Characters of their longest parameter: so large that they fill the buffer.
const CALLERS_NOTE_CHARS: usize = 7_000;
/// Callers that send streams.
const STREAMS: usize = 40;
/// More than are on their way at a time.
const STREAM_EVENTS: usize = 2_000;
/// Characters of their longest parameter.
const STREAMS_NOTE_CHARS: usize = 300;
/// A refusal that comes this soon is for want of room; others are for want of time.
const AT_ONCE: Duration = Duration::from_secs(1);
/// How long the buffer may take to be full.
const FILL_MAX: Duration = Duration::from_mins(1);
/// How long nothing is stored after that.
const BLOCKED_FOR: Duration = Duration::from_secs(5);

pub async fn measure(rig: &Rig, args: &BenchArgs) -> anyhow::Result<Vec<Figure>> {
    let mut samples = Samples::default();
    for _ in 0..args.rounds() {
        samples.add(
            "while draining",
            Unit::Megabytes,
            while_draining(rig, WAITING * args.deliveries()).await?,
        );
        let single = |endpoint: &Endpoint| payload::post_event(endpoint, &note(CALLERS_NOTE_CHARS));
        let memory = while_nothing_is_stored(rig, CALLERS, single, until_the_buffer_is_full).await?;
        samples.add(format!("with a full enqueue buffer, {CALLERS} callers"), Unit::Megabytes, memory);
        let stream =
            |endpoint: &Endpoint| payload::post_events(endpoint, STREAM_EVENTS, &note(STREAMS_NOTE_CHARS));
        // streams have less room than would fill it
        let memory = while_nothing_is_stored(rig, STREAMS, stream, async |_, _| Ok(())).await?;
        samples.add(format!("while nothing can be stored, {STREAMS} streams"), Unit::Megabytes, memory);
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
async fn while_nothing_is_stored(
    rig: &Rig,
    callers: usize,
    request: impl Fn(&Endpoint) -> Vec<u8>,
    wait: impl AsyncFnOnce(SocketAddr, &Endpoint) -> anyhow::Result<()>,
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
    wait(serve.address, &store.endpoint).await?;
    tokio::time::sleep(BLOCKED_FOR).await;
    lock.rollback().await?;
    tokio::time::sleep(BLOCKED_FOR).await;
    let memory = serve.memory_mb()?;
    drop((lanes, serve));
    rig.finish(store).await?;
    Ok(memory.highest)
}

/// Until one more is refused at once.
async fn until_the_buffer_is_full(address: SocketAddr, endpoint: &Endpoint) -> anyhow::Result<()> {
    let single = payload::post_event(endpoint, &note(CALLERS_NOTE_CHARS));
    let begun = Instant::now();
    let mut connection = Connection::open(address).await?;
    loop {
        let asked = Instant::now();
        if connection.exchange(&single).await? == 503 && asked.elapsed() < AT_ONCE {
            return Ok(());
        }
        ensure!(begun.elapsed() < FILL_MAX, "the buffer does not become full");
    }
}

/// Sends the same again and again, whatever is answered.
async fn call(address: SocketAddr, request: Arc<Vec<u8>>) -> anyhow::Result<()> {
    let mut connection = Connection::open(address).await?;
    loop {
        connection.exchange(&request).await?;
    }
}
