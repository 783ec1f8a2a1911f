//! `webhook-processor bench`: what this machine can do, part by part and together. Not a test: it fails nothing.
//!
//! The ceiling is what claim, send and settle would reach if they took turns on the machine without any loss:
//! `1 / (1 / HTTP-only + 1 / SQL-only)`. Rates of single runs vary on a shared machine; shares of the ceiling do less.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use async_trait::async_trait;
use clap::Args;
use futures_util::stream::{self, StreamExt as _};
use serde::Serialize;
use sqlx::ConnectOptions as _;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::output::{print_json, progress, say, table};
use crate::application::circuits::Circuits;
use crate::application::deliver::Deliver;
use crate::application::directory::EndpointDirectory;
use crate::application::ports::{Claim, DeliveryQueue as _, Sender, Upkeep as _};
use crate::application::shares::Rooms;
use crate::application::wakeup::Wakeup;
use crate::application::worker_pool::WorkerPool;
use crate::domain::address::AddressPolicy;
use crate::domain::attempt::{Answer, AttemptOutcome};
use crate::domain::delivery::{
    AttemptTimes, FinishedAttempt, Lease, LeasedDelivery, NewDelivery, QueueId, WorkerId,
};
use crate::domain::endpoint::{Endpoint, EndpointParts};
use crate::domain::event::{Event, EventParts};
use crate::domain::retry::Verdict;
use crate::infrastructure::embedded_postgres::{EmbeddedOptions, EmbeddedPostgres};
use crate::infrastructure::postgres::Database;
use crate::infrastructure::sender::{HttpSender, SenderSettings};
use crate::infrastructure::service::Application;
use crate::infrastructure::settings::Settings;

/// Deliveries that one statement stores while a run is prepared.
const PREPARE_BATCH: usize = 1_000;
/// How long the API of the benchmark may take to start.
const API_START_MAX: Duration = Duration::from_secs(30);

#[derive(Args)]
pub struct BenchArgs {
    /// Deliveries of each run.
    #[arg(long, default_value_t = 40_000)]
    deliveries: usize,
    /// Runs of each kind; their median is told.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Connections that enqueue at the same time.
    #[arg(long, default_value_t = 50)]
    connections: usize,
}

/// Medians, in deliveries or requests a second.
#[derive(Serialize)]
struct Figures {
    http_only: f64,
    sql_only: f64,
    ceiling: f64,
    drain: f64,
    share_of_ceiling: f64,
    enqueue: f64,
    enqueue_p50_ms: f64,
    enqueue_p99_ms: f64,
}

pub async fn run(args: BenchArgs, settings: &Settings, json: bool) -> anyhow::Result<()> {
    // durable, as in production, and never the user's own database
    let directory = std::env::temp_dir().join(format!("webhook-processor-bench-{}", std::process::id()));
    let options = EmbeddedOptions { directory: directory.clone(), durable: true, binaries: None };
    let server = EmbeddedPostgres::start(&options).await?;
    let bench = Bench::prepare(&server, settings).await?;
    let figures = bench.measure(&args).await;
    bench.database.close().await;
    server.stop().await?;
    std::fs::remove_dir_all(&directory).context("removing the database of the benchmark")?;
    let figures = figures?;
    if json {
        return print_json(&figures);
    }
    let mut rows = table(&["figure", "median"]);
    let rate = |rate: f64| format!("{rate:.0}/s");
    rows.add_row(["HTTP only: sender against receiver".to_owned(), rate(figures.http_only)]);
    rows.add_row(["SQL only: claim and settle".to_owned(), rate(figures.sql_only)]);
    rows.add_row(["ceiling: 1 / (1 / HTTP + 1 / SQL)".to_owned(), rate(figures.ceiling)]);
    rows.add_row(["drain: claim, GET, settle, audit".to_owned(), rate(figures.drain)]);
    rows.add_row(["share of the ceiling".to_owned(), format!("{:.2}", figures.share_of_ceiling)]);
    rows.add_row([format!("POST /webhooks, {} connections", args.connections), rate(figures.enqueue)]);
    let latency = format!("{:.1} ms / {:.1} ms", figures.enqueue_p50_ms, figures.enqueue_p99_ms);
    rows.add_row(["the same: p50 / p99".to_owned(), latency]);
    say(rows)
}

/// What all runs share.
struct Bench {
    database: Database,
    settings: Settings,
    endpoint: Endpoint,
    api: Program,
    /// Runs until the benchmark ends.
    _receiver: Program,
}

impl Bench {
    async fn prepare(server: &EmbeddedPostgres, settings: &Settings) -> anyhow::Result<Self> {
        let mut settings = settings.clone();
        settings.egress_allow = vec!["127.0.0.0/8".parse().expect("a network")];
        settings.database = Some(server.connect_options());
        let database = Database::new(server.connect_options(), settings.request_connections);
        database.migrate().await?;
        database.ensure_archives().await?;
        let receiver = Program::receiver()?;
        let endpoint = Application::new(&database, &settings)
            .api
            .endpoints
            .register(EndpointParts {
                name: Some("bench".into()),
                postback_url: Some(Some(format!("{}/postback", receiver.url))),
                ..EndpointParts::default()
            })
            .await?;
        let api = Program::api(server).await?;
        Ok(Self { database, settings, endpoint, api, _receiver: receiver })
    }

    /// Rounds of all kinds in turn, so that what else happens on the machine meets all of them alike.
    async fn measure(&self, args: &BenchArgs) -> anyhow::Result<Figures> {
        let bar = progress(Some(args.rounds as u64 * 4), "runs");
        let (mut http, mut sql, mut drain, mut enqueue) = (vec![], vec![], vec![], vec![]);
        let (mut p50, mut p99) = (vec![], vec![]);
        for _ in 0..args.rounds {
            http.push(self.http_only(args.deliveries).await?);
            bar.inc(1);
            sql.push(self.sql_only(args.deliveries).await?);
            bar.inc(1);
            drain.push(self.drain(args.deliveries).await?);
            bar.inc(1);
            let (rate, mut latencies) = self.enqueue(args.deliveries / 4, args.connections).await?;
            enqueue.push(rate);
            latencies.sort_unstable();
            p50.push(latencies[latencies.len() / 2].as_secs_f64() * 1e3);
            p99.push(latencies[latencies.len() * 99 / 100].as_secs_f64() * 1e3);
            bar.inc(1);
        }
        bar.finish_and_clear();
        let (http_only, sql_only, drain) = (median(http), median(sql), median(drain));
        let ceiling = 1.0 / (1.0 / http_only + 1.0 / sql_only);
        Ok(Figures {
            http_only,
            sql_only,
            ceiling,
            drain,
            share_of_ceiling: drain / ceiling,
            enqueue: median(enqueue),
            enqueue_p50_ms: median(p50),
            enqueue_p99_ms: median(p99),
        })
    }

    fn sender(&self) -> anyhow::Result<HttpSender> {
        HttpSender::new(SenderSettings {
            timeout: self.settings.http_timeout,
            response_bytes_max: self.settings.response_bytes_max,
            idle_connections_max: self.settings.workers.count * self.settings.workers.batch_size,
            addresses: AddressPolicy::new(self.settings.egress_allow.clone()),
        })
    }

    /// The sender alone, as many requests under way as workers hold leases.
    async fn http_only(&self, requests: usize) -> anyhow::Result<f64> {
        let sender = Arc::new(self.sender()?);
        let endpoint = Arc::new(self.endpoint.clone());
        let lanes = self.settings.workers.count * self.settings.workers.batch_size;
        let left = Arc::new(AtomicUsize::new(requests));
        let begun = Instant::now();
        let lanes = (0..lanes).map(|_| {
            let (sender, endpoint, left) = (sender.clone(), endpoint.clone(), left.clone());
            let delivery = self.leased();
            tokio::spawn(async move {
                while left
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
                    .is_ok()
                {
                    let outcome = sender.send(&delivery, &endpoint).await;
                    anyhow::ensure!(outcome.status() == Some(200), "the receiver answered {outcome:?}");
                }
                Ok(())
            })
        });
        for lane in futures_util::future::join_all(lanes).await {
            lane??;
        }
        Ok(rate(requests, begun))
    }

    /// A delivery as a worker would hold it.
    fn leased(&self) -> LeasedDelivery {
        let new = self.new_delivery();
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
            abandoned_for: None,
            waited: Duration::ZERO,
            priority: new.priority,
            ready_since: chrono::Utc::now(),
            probe: false,
            in_flight_limited: false,
            starts_in: None,
            claimed_at: Instant::now(),
        }
    }

    fn new_delivery(&self) -> NewDelivery {
        let params =
            [("user_id", "user_123"), ("value", "100"), ("token", "abc123"), ("signature", "xyz789")];
        let event = Event::parse(EventParts {
            event_type: "+credit".into(),
            config_id: self.endpoint.id.get(),
            url_params: params.into_iter().collect(),
            ..EventParts::default()
        });
        let event = event.expect("the event is well-formed");
        NewDelivery::new(QueueId::new(Uuid::now_v7()), &event, &self.endpoint)
            .expect("the endpoint has the URL")
    }

    async fn fill(&self, deliveries: usize) -> anyhow::Result<()> {
        for begin in (0..deliveries).step_by(PREPARE_BATCH) {
            let batch: Vec<_> =
                (begin..deliveries.min(begin + PREPARE_BATCH)).map(|_| self.new_delivery()).collect();
            self.database.enqueue(&batch).await?;
        }
        Ok(())
    }

    /// The queue alone: as many claimers as there are workers, each settling what it has claimed.
    async fn sql_only(&self, deliveries: usize) -> anyhow::Result<f64> {
        self.fill(deliveries).await?;
        let begun = Instant::now();
        let claimers = (1..=self.settings.workers.count).map(|number| async move {
            let limit = self.settings.workers.batch_size;
            let claim = Claim {
                worker_ids: vec![WorkerId::new("bench", 0, 0, number); limit],
                lease: self.settings.workers.lease,
                after: None,
                rooms: Rooms { share: limit, listed: vec![] },
                floors: vec![],
                held: false,
            };
            loop {
                let claimed = self.database.claim(&claim).await?;
                if claimed.is_empty() {
                    return anyhow::Ok(());
                }
                let delivered: Vec<_> = claimed.into_iter().map(delivered).collect();
                self.database.settle(&delivered).await?;
            }
        });
        for claimer in futures_util::future::join_all(claimers).await {
            claimer?;
        }
        Ok(rate(deliveries, begun))
    }

    /// Fills the queue, then lets workers empty it.
    async fn drain(&self, deliveries: usize) -> anyhow::Result<f64> {
        self.fill(deliveries).await?;
        let sender = self.sender()?;
        let store = Arc::new(self.database.clone());
        let stop = CancellationToken::new();
        let sender = Arc::new(StopAfter { sender, left: AtomicUsize::new(deliveries), stop: stop.clone() });
        let wakeup = Arc::new(Wakeup::default());
        let directory = Arc::new(EndpointDirectory::new(store.clone()));
        let circuits = Circuits::new(store.clone(), wakeup.clone());
        let deliver = Deliver::start(directory, store.clone(), circuits, sender, wakeup.clone());
        let pool = Arc::new(WorkerPool::new(store, deliver, wakeup, self.settings.workers.clone()));
        let ids =
            (1..=self.settings.workers.count).map(|number| WorkerId::new("bench", 0, 0, number)).collect();
        let begun = Instant::now();
        // ends once the last attempt is settled
        pool.run(ids, stop).await;
        Ok(rate(deliveries, begun))
    }

    /// Single events over HTTP, each acknowledged after its commit, to a process of its own.
    async fn enqueue(&self, events: usize, connections: usize) -> anyhow::Result<(f64, Vec<Duration>)> {
        let client = reqwest::Client::builder().no_proxy().build()?;
        let url = format!("{}/webhooks", self.api.url);
        let body = serde_json::json!({
            "event_type": "+credit", "config_id": self.endpoint.id.get(),
            "url_params": {"user_id": "user_123", "value": 100, "token": "abc123", "signature": "xyz789"},
            // the queue is left as it is: these are not to be delivered
            "scheduled_at": "2999-01-01T00:00:00Z",
        });
        let begun = Instant::now();
        let latencies = stream::iter(0..events).map(|_| async {
            let sent = Instant::now();
            let answer = client.post(&url).json(&body).send().await?;
            anyhow::ensure!(answer.status() == 201, "the API answered {}", answer.status());
            Ok(sent.elapsed())
        });
        let latencies: Vec<_> = latencies.buffer_unordered(connections).collect().await;
        let rate = rate(events, begun);
        Ok((rate, latencies.into_iter().collect::<anyhow::Result<_>>()?))
    }
}

/// What a worker would settle had the receiver answered at once.
fn delivered(delivery: LeasedDelivery) -> FinishedAttempt {
    FinishedAttempt {
        queue_id: delivery.queue_id,
        lease: delivery.lease,
        config_id: delivery.config_id,
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

fn rate(count: usize, since: Instant) -> f64 {
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    f64::from(count) / since.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Stops the workers once the last delivery is sent.
struct StopAfter {
    sender: HttpSender,
    left: AtomicUsize,
    stop: CancellationToken,
}

#[async_trait]
impl Sender for StopAfter {
    async fn send(&self, delivery: &LeasedDelivery, endpoint: &Endpoint) -> AttemptOutcome {
        let outcome = self.sender.send(delivery, endpoint).await;
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.stop.cancel();
        }
        outcome
    }
}

/// Another process of this program; killed when it goes out of scope.
struct Program {
    child: Child,
    url: String,
}

impl Program {
    fn command(arguments: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe().context("finding this program")?);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        Ok(command)
    }

    /// A receiver, which says where it listens.
    fn receiver() -> anyhow::Result<Self> {
        let mut child =
            Self::command(&["receiver", "--port", "0", "--quiet"])?.spawn().context("starting a receiver")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("it is piped")).read_line(&mut line)?;
        let url = line
            .trim()
            .strip_prefix("listening on ")
            .context("the receiver does not say where it listens")?;
        Ok(Self { child, url: url.to_owned() })
    }

    /// An API, on a port that was free a moment ago.
    async fn api(server: &EmbeddedPostgres) -> anyhow::Result<Self> {
        let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = Self::command(&["api"])?;
        command.env("LISTEN_ADDR", address.to_string());
        command.env("DATABASE_URL", server.connect_options().to_url_lossy().as_str());
        let program =
            Self { child: command.spawn().context("starting an API")?, url: format!("http://{address}") };
        let client = reqwest::Client::builder().no_proxy().build()?;
        let begun = Instant::now();
        while client.get(format!("{}/health/live", program.url)).send().await.is_err() {
            anyhow::ensure!(begun.elapsed() < API_START_MAX, "the API does not start");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(program)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // it may have ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
