//! `/health`: how a process is.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::Serialize;
use utoipa::ToSchema;

use super::operators::{Operations, TAG};
use crate::domain::held::Held;

/// The health of a process.
#[derive(Debug, Serialize, ToSchema)]
pub struct HealthView {
    /// `ok` or `failing`.
    status: &'static str,
    /// The version of this program.
    version: &'static str,
    /// What was checked; empty for liveness.
    checks: Vec<CheckView>,
}

/// The result of one check.
#[derive(Debug, Serialize, ToSchema)]
pub struct CheckView {
    /// `database`, `migrations`, `oldest_ready_delivery`, `held_deliveries`, `writes`, `durability`,
    /// `duties` or `start`.
    name: &'static str,
    /// `ok`, `warning` or `failing`. Only `failing` makes the whole fail.
    status: &'static str,
    /// The finding, in words.
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
    (status = 200, description = "No check is failing", body = HealthView),
    (status = 503, description = "A check is failing", body = HealthView),
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

/// Whether the process can do its work: the database answers, its schema is new enough, writes are committed, deliveries do
/// not pile up, and no recurring duty keeps failing.
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
                // a service that is waiting for its database knows more
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
                    "the service is starting; until it has started, its API answers 503",
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

/// The recurring duties of the process: promotion and upkeep.
fn duties(operations: &Operations) -> CheckView {
    const NAME: &str = "duties";
    let failing = operations.duties.that_keep_failing();
    if failing.is_empty() {
        return check(NAME, true, "are done");
    }
    let failing: Vec<String> = failing.iter().map(|(duty, error)| format!("{duty}: {error}")).collect();
    check(NAME, false, format!("keep failing: {}", failing.join("; ")))
}

/// How long a check waits for the database, since health checks have short time limits.
const CHECK_LIMIT: Duration = Duration::from_secs(2);

async fn oldest_ready(operations: &Operations) -> CheckView {
    const NAME: &str = "oldest_ready_delivery";
    let limit = operations.ready_age_max;
    let Ok(age) = tokio::time::timeout(CHECK_LIMIT, operations.records.oldest_ready_age()).await else {
        return check(NAME, false, "cannot be read in time: the queue may be locked");
    };
    match age {
        Err(_) => check(NAME, false, "cannot be read"),
        // held deliveries may be waiting all the same
        Ok(None) => check(NAME, true, "nothing waits that could be claimed"),
        Ok(Some(age)) => {
            let detail = format!("has waited {} ms; the limit is {} ms", age.as_millis(), limit.as_millis());
            check(NAME, age <= limit, detail)
        }
    }
}

/// Held deliveries are shown, but are no failure of this service: a pause, a limit or a receiver holds them.
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

/// A duration, rounded down, in a unit that suits its size.
fn rough(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..=119 => format!("{seconds} s"),
        seconds @ 120..=7_199 => format!("{} m", seconds / 60),
        seconds @ 7_200..=172_799 => format!("{} h", seconds / 3_600),
        seconds => format!("{} d", seconds / 86_400),
    }
}
