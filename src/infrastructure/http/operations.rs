//! Health and metrics, for operators and their tools.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use metrics::Gauge;
use serde::Serialize;
use tokio::sync::Mutex;
use utoipa::ToSchema;

use super::Operations;
use crate::application::ports::{Backlog, DeliveryRecords, HeldCircuit, StoreError};
use crate::domain::statistics::Held;

const TAG: &str = "operations";
/// How old the backlog may be that metrics tell of, at least.
const BACKLOG_AGE_MAX: Duration = Duration::from_secs(5);
/// Reading it costs more the larger it is; it is read so seldom that this many times the cost lies in between.
const BACKLOG_REST: u32 = 20;
/// How long an answer about health waits for the backlog.
const HEALTH_PATIENCE: Duration = Duration::from_secs(1);
/// How many circuits metrics tell of, of those that are not closed.
const CIRCUITS_MAX: usize = 1_000;

/// How much is waiting, read at most every few seconds.
pub struct BacklogSample {
    records: Arc<dyn DeliveryRecords>,
    last: std::sync::Mutex<Option<Sample>>,
    /// Held by whoever reads.
    reading: Mutex<()>,
}

#[derive(Clone, Copy)]
struct Sample {
    backlog: Backlog,
    good_until: Instant,
}

impl BacklogSample {
    /// Nothing is read yet.
    pub fn new(records: Arc<dyn DeliveryRecords>) -> Self {
        Self { records, last: std::sync::Mutex::default(), reading: Mutex::default() }
    }

    fn last(&self) -> Option<Sample> {
        // a sample is replaced whole, whatever panics
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fresh(&self) -> Option<Backlog> {
        self.last().filter(|sample| Instant::now() < sample.good_until).map(|sample| sample.backlog)
    }

    async fn recent(&self) -> Result<Backlog, StoreError> {
        if let Some(backlog) = self.fresh() {
            return Ok(backlog);
        }
        let _reading = self.reading.lock().await;
        if let Some(backlog) = self.fresh() {
            return Ok(backlog);
        }
        let begun = Instant::now();
        let backlog = self.records.backlog().await?;
        let rest = BACKLOG_AGE_MAX.max(begun.elapsed() * BACKLOG_REST);
        let sample = Sample { backlog, good_until: Instant::now() + rest };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(sample);
        Ok(backlog)
    }

    /// As recent as can be had soon, for callers who cannot wait; the reading goes on without them. `None`: nothing could be
    /// read yet.
    async fn recent_soon(self: &Arc<Self>) -> Option<Backlog> {
        let sample = self.clone();
        let reading = tokio::spawn(async move { sample.recent().await });
        match tokio::time::timeout(HEALTH_PATIENCE, reading).await {
            Ok(Ok(Ok(backlog))) => Some(backlog),
            Ok(Ok(Err(_)) | Err(_)) | Err(_) => self.last().map(|sample| sample.backlog),
        }
    }
}

/// Gauges of the circuits that are not closed.
#[derive(Default)]
pub struct CircuitGauges {
    shown: std::sync::Mutex<Vec<Gauge>>,
}

impl CircuitGauges {
    /// Shows these, and no longer those that were shown before.
    fn show(&self, circuits: &[HeldCircuit]) {
        // a panic elsewhere leaves plain gauges behind
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        for gauge in shown.drain(..) {
            gauge.set(0.0);
        }
        for HeldCircuit { config_id, circuit } in circuits {
            let reason = if circuit.probe_at.is_some() { "failures" } else { "by_hand" };
            let gauge = metrics::gauge!("webhook_circuit_held",
                "config_id" => config_id.to_string(), "state" => circuit.state.as_str(), "reason" => reason);
            gauge.set(1.0);
            shown.push(gauge);
        }
    }
}

/// How a process is.
#[derive(Debug, Serialize, ToSchema)]
pub struct HealthView {
    /// `ok` or `failing`.
    status: &'static str,
    /// Of this program.
    version: &'static str,
    /// What was looked at; empty where nothing was.
    checks: Vec<CheckView>,
}

/// One thing that was looked at.
#[derive(Debug, Serialize, ToSchema)]
pub struct CheckView {
    /// `database`, `migrations`, `oldest_ready_delivery`, `held_deliveries`, `writes`, `durability`,
    /// `duties` or `start`.
    name: &'static str,
    /// `ok`, `warning` or `failing`. Only `failing` makes the whole fail.
    status: &'static str,
    /// In words.
    detail: String,
}

fn health_view(checks: Vec<CheckView>) -> (StatusCode, Json<HealthView>) {
    let well = checks.iter().all(|check| check.status != "failing");
    let (code, status) =
        if well { (StatusCode::OK, "ok") } else { (StatusCode::SERVICE_UNAVAILABLE, "failing") };
    (code, Json(HealthView { status, version: env!("CARGO_PKG_VERSION"), checks }))
}

fn check(name: &'static str, well: bool, detail: impl Into<String>) -> CheckView {
    CheckView { name, status: if well { "ok" } else { "failing" }, detail: detail.into() }
}

/// Overall health: the same as readiness.
#[utoipa::path(get, path = "/health", tag = TAG, responses(
    (status = 200, description = "All is well", body = HealthView),
    (status = 503, description = "Something is not", body = HealthView),
))]
pub async fn health(state: State<Operations>) -> impl IntoResponse {
    ready(state).await
}

/// Whether the process runs at all. Restart it if this does not answer.
#[utoipa::path(get, path = "/health/live", tag = TAG, responses(
    (status = 200, description = "It runs", body = HealthView),
))]
pub async fn live() -> impl IntoResponse {
    health_view(vec![])
}

/// Whether the process can do its work: the database answers, its schema is new enough, what is written is committed,
/// deliveries do not pile up, and nothing that is done over and over keeps failing.
#[utoipa::path(get, path = "/health/ready", tag = TAG, responses(
    (status = 200, description = "Ready", body = HealthView),
    (status = 503, description = "Not ready", body = HealthView),
))]
pub async fn ready(State(operations): State<Operations>) -> impl IntoResponse {
    let mut checks = Vec::new();
    match operations.database.is_migrated().await {
        Err(_) => {
            let reason = operations.database.trouble();
            checks.push(check("database", false, reason.as_deref().unwrap_or("does not answer")));
        }
        Ok(migrated) => {
            checks.push(check("database", true, "answers"));
            let detail = if migrated {
                "all applied".to_owned()
            } else {
                // a start that waits knows better
                let trouble = operations.database.trouble();
                trouble.unwrap_or_else(|| "missing; run webhook-processor migrate".to_owned())
            };
            checks.push(check("migrations", migrated, detail));
            if migrated {
                checks.push(oldest_ready(&operations).await);
                checks.push(held_deliveries(&operations).await);
                checks.push(writes(&operations).await);
                checks.push(durability(&operations).await);
                checks.push(duties(&operations));
            }
            if migrated && !operations.begun.has() {
                checks.push(check(
                    "start",
                    false,
                    "the service is starting; its API answers 503 until it has",
                ));
            }
        }
    }
    health_view(checks)
}

async fn writes(operations: &Operations) -> CheckView {
    match operations.database.accepts_writes().await {
        Ok(()) => check("writes", true, "are committed"),
        Err(reason) => check("writes", false, reason),
    }
}

/// A database that may forget is no reason to send callers elsewhere: all processes use the same one. But someone should know.
async fn durability(operations: &Operations) -> CheckView {
    const NAME: &str = "durability";
    let warning = |detail| CheckView { name: NAME, status: "warning", detail };
    match operations.database.durability_faults().await {
        Ok(faults) if faults.is_empty() => check(NAME, true, "the database keeps what it acknowledges"),
        Ok(faults) => {
            warning(format!("the database does not keep all that it acknowledges: {}", faults.join("; ")))
        }
        Err(_) => warning("the settings of the database cannot be read".to_owned()),
    }
}

/// What the process does over and over: promotion, upkeep.
fn duties(operations: &Operations) -> CheckView {
    const NAME: &str = "duties";
    let failing = operations.duties.that_keep_failing();
    if failing.is_empty() {
        return check(NAME, true, "are done");
    }
    let failing: Vec<String> = failing.iter().map(|(duty, error)| format!("{duty}: {error}")).collect();
    check(NAME, false, format!("keep failing: {}", failing.join("; ")))
}

/// How long a check waits for the database: whoever asks has little patience.
const CHECK_LIMIT: Duration = Duration::from_secs(2);

async fn oldest_ready(operations: &Operations) -> CheckView {
    const NAME: &str = "oldest_ready_delivery";
    let limit = operations.ready_age_max;
    let Ok(age) = tokio::time::timeout(CHECK_LIMIT, operations.records.oldest_ready_age()).await else {
        return check(NAME, false, "cannot be read in time: the queue may be locked");
    };
    match age {
        Err(_) => check(NAME, false, "cannot be read"),
        // what is held may wait all the same
        Ok(None) => check(NAME, true, "nothing waits that could be claimed"),
        Ok(Some(age)) => {
            let detail = format!("has waited {} ms; the limit is {} ms", age.as_millis(), limit.as_millis());
            check(NAME, age <= limit, detail)
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is a double")]
fn show_backlog(backlog: &Backlog) {
    let held = backlog.held;
    for (state, depth) in [
        ("ready", backlog.ready),
        ("held", held.total()),
        ("scheduled", backlog.scheduled),
        ("processing", backlog.processing),
    ] {
        metrics::gauge!("webhook_queue_depth", "state" => state).set(depth as f64);
    }
    for (reason, count) in
        [("paused", held.paused), ("circuit_open", held.circuit_open), ("limited", held.limited)]
    {
        metrics::gauge!("webhook_held_deliveries", "reason" => reason).set(count as f64);
    }
    metrics::gauge!("webhook_oldest_held_age_seconds").set(held.oldest_age.unwrap_or_default().as_secs_f64());
}

/// What is held is no failure of this service: operators and receivers have their reasons. But it is not idle, either.
async fn held_deliveries(operations: &Operations) -> CheckView {
    const NAME: &str = "held_deliveries";
    match operations.backlog.recent_soon().await {
        None => check(NAME, true, "could not be counted in time"),
        Some(backlog) => check(NAME, true, in_words(&backlog.held)),
    }
}

fn in_words(held: &Held) -> String {
    if held.total() == 0 {
        return "none are held".into();
    }
    let reasons = [
        (held.circuit_open, "by an open circuit"),
        (held.paused, "by a paused config"),
        (held.limited, "by a limit"),
    ];
    let reasons: Vec<String> = reasons
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, reason)| format!("{count} {reason}"))
        .collect();
    let are = if held.total() == 1 { "is" } else { "are" };
    let age = rough(held.oldest_age.unwrap_or_default());
    format!("{} {are} held, the oldest for {age}: {}", held.total(), reasons.join(", "))
}

/// A duration in its largest unit.
fn rough(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..=119 => format!("{seconds} s"),
        seconds @ 120..=7_199 => format!("{} m", seconds / 60),
        seconds @ 7_200..=172_799 => format!("{} h", seconds / 3_600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

/// Metrics in Prometheus text format.
#[utoipa::path(get, path = "/metrics", tag = TAG, responses(
    (status = 200, description = "All metrics", body = String, content_type = "text/plain"),
))]
pub async fn metrics(State(operations): State<Operations>) -> impl IntoResponse {
    for (pool, open, idle) in operations.database.pool_use() {
        let in_use = f64::from(open.saturating_sub(u32::try_from(idle).unwrap_or(u32::MAX)));
        metrics::gauge!("webhook_pool_connections", "pool" => pool, "state" => "in_use").set(in_use);
        metrics::gauge!("webhook_pool_connections", "pool" => pool, "state" => "idle")
            .set(f64::from(open) - in_use);
    }
    // without the database the rest is still worth telling
    if let Ok(backlog) = operations.backlog.recent().await {
        show_backlog(&backlog);
    }
    if let Ok(circuits) = operations.circuits.held(CIRCUITS_MAX).await {
        operations.circuit_gauges.show(&circuits);
    }
    if let Ok(age) = operations.records.oldest_ready_age().await {
        metrics::gauge!("webhook_oldest_ready_age_seconds").set(age.unwrap_or_default().as_secs_f64());
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], operations.metrics.render())
}
