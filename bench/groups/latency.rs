//! Latency at a steady rate, from the call of `POST /webhooks` to the request at the receiver.
//!
//! It is measured alone, then beside an endpoint that has much waiting and never answers.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::ensure;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use webhook_processor::domain::endpoint_settings::EndpointParts;

use crate::BenchArgs;
use crate::report::figures::{Figure, Samples, Unit, percentile};
use crate::rig::load::{self, Schedule};
use crate::rig::payload;
use crate::rig::program::Program;
use crate::rig::{Rig, operator};

/// Kinds of run in a round.
pub const RUNS: usize = 2;
/// Events a second.
const RATE: f64 = 1_000.0;
/// Waiting deliveries of the endpoint that never answers, for each delivery of a run.
const WAITING: usize = 5;
/// How long workers run before they are measured; its leases are taken by then.
const WARM_UP: Duration = Duration::from_secs(5);
/// How long after the last call its request may arrive.
const ARRIVAL_MAX: Duration = Duration::from_mins(1);
/// The path of the endpoint that never answers.
const SILENT: &str = "/silent";
/// The parameter that numbers events.
const NUMBER: &str = "number";

const P50: &str = "1,000 events/s, call to request, p50";
const P99: &str = "1,000 events/s, call to request, p99";
const BESIDE: &str = "beside it, p99 against undisturbed";

pub async fn measure(rig: &Rig, args: &BenchArgs) -> anyhow::Result<Vec<Figure>> {
    let mut samples = Samples::default();
    for _ in 0..args.rounds() {
        let undisturbed = steady(rig, args, 0).await?;
        let disturbed = steady(rig, args, WAITING * args.deliveries()).await?;
        samples.add(P50, Unit::Milliseconds, percentile(&undisturbed, 50));
        samples.add(P99, Unit::Milliseconds, percentile(&undisturbed, 99));
        samples.add(
            "beside an endpoint that never answers, p50",
            Unit::Milliseconds,
            percentile(&disturbed, 50),
        );
        samples.add("beside it, p99", Unit::Milliseconds, percentile(&disturbed, 99));
        samples.add(BESIDE, Unit::Ratio, percentile(&disturbed, 99) / percentile(&undisturbed, 99));
    }
    Ok(samples.into_figures(|figure| match figure.name.as_str() {
        P50 => figure.at_most(3.0),
        P99 => figure.at_most(15.0),
        BESIDE => figure.at_most(1.5),
        _ => figure,
    }))
}

/// Milliseconds of each event, while another endpoint has so many `waiting`.
async fn steady(rig: &Rig, args: &BenchArgs, waiting: usize) -> anyhow::Result<Vec<f64>> {
    let events = args.deliveries() * 3 / 8;
    let receiver = Receiver::start(events).await?;
    let store = rig.fresh().await?;
    let database = store.open();
    let endpoints = store.application(&database).api.endpoints;
    let register = async |path: &str| {
        let parts = EndpointParts {
            name: Some(path.to_owned()),
            postback_url: Some(Some(format!("http://{}{path}", receiver.address))),
            ..EndpointParts::default()
        };
        endpoints.register(parts, &operator()).await
    };
    let (measured, silent) = (register("/measured").await?, register(SILENT).await?);
    database.close().await;
    store.fill(&[silent], waiting).await?;
    rig.checkpoint().await?;

    let serve = Program::service("serve", &store).await?;
    tokio::time::sleep(WARM_UP).await;
    let schedule = Schedule::from_now(RATE);
    let request = move |number: usize| payload::post_event(&measured, &[(NUMBER, number.to_string())]);
    load::on_schedule(serve.address, args.connections, events, schedule, request).await?;
    let arrivals = receiver.wait_for_all().await?;
    drop(serve);
    rig.finish(store).await?;
    let latency = |(number, at): (usize, Instant)| at.saturating_duration_since(schedule.due(number));
    Ok(arrivals.into_iter().enumerate().map(latency).map(|latency| latency.as_secs_f64() * 1e3).collect())
}

/// Notes when the event of each number came.
struct Receiver {
    address: SocketAddr,
    arrivals: Arc<Mutex<Vec<Option<Instant>>>>,
    task: AbortHandle,
}

impl Receiver {
    async fn start(events: usize) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let arrivals = Arc::new(Mutex::new(vec![None; events]));
        let task = tokio::spawn(accept(listener, arrivals.clone())).abort_handle();
        Ok(Self { address, arrivals, task })
    }

    async fn wait_for_all(&self) -> anyhow::Result<Vec<Instant>> {
        let begun = Instant::now();
        loop {
            {
                let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(all) = arrivals.iter().copied().collect() {
                    return Ok(all);
                }
                let missing = arrivals.iter().filter(|arrival| arrival.is_none()).count();
                ensure!(begun.elapsed() < ARRIVAL_MAX, "{missing} events never came");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, arrivals: Arc<Mutex<Vec<Option<Instant>>>>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(answer(stream, arrivals.clone()));
    }
}

/// Answers the requests of one connection, which have no bodies.
async fn answer(mut stream: TcpStream, arrivals: Arc<Mutex<Vec<Option<Instant>>>>) -> std::io::Result<()> {
    let mut request = Vec::with_capacity(1024);
    loop {
        request.clear();
        while !request.ends_with(b"\r\n\r\n") {
            if stream.read_buf(&mut request).await? == 0 {
                return Ok(());
            }
        }
        let now = Instant::now();
        let request = String::from_utf8_lossy(&request);
        let path = request.split(' ').nth(1).unwrap_or_default();
        if path.starts_with(SILENT) {
            std::future::pending::<()>().await;
        }
        if let Some(number) = number_in(path)
            && let Some(arrival) = arrivals.lock().unwrap_or_else(PoisonError::into_inner).get_mut(number)
        {
            arrival.get_or_insert(now);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await?;
    }
}

fn number_in(path: &str) -> Option<usize> {
    let (_, parameters) = path.split_once('?')?;
    parameters
        .split('&')
        .find_map(|parameter| parameter.strip_prefix(NUMBER)?.strip_prefix('=')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_an_event_is_in_its_url() {
        assert_eq!(number_in("/measured?user_id=1&number=42"), Some(42));
        assert_eq!(number_in("/silent"), None);
    }
}
