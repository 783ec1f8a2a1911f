//! Statistics: what is asked for, and the counts that answer it.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;

use crate::application::ports::Statistics;
use crate::domain::delivery::DeliveryStatus;
use crate::domain::held::Held;
use crate::domain::invalid::Invalid;
use crate::domain::millis;

/// A window of a minute to a hundred years.
pub fn parse_window(text: &str) -> Result<Duration, Invalid> {
    let window = humantime::parse_duration(text).ok();
    let bounds = Duration::from_mins(1)..=Duration::from_hours(24 * 36_500);
    window
        .filter(|window| bounds.contains(window))
        .ok_or_else(|| Invalid::field("window", "must be a duration of a minute or more, such as 1h or 7d"))
}

/// Deliveries and attempts, counted.
#[derive(Debug, Serialize, ToSchema)]
pub struct StatisticsView {
    /// The time from which terminal deliveries are counted; `null`: all that are kept.
    from: Option<DateTime<Utc>>,
    /// All deliveries.
    total: u64,
    /// Those that wait: for a worker, for a later time, or because they are held.
    pending: u64,
    /// Those under a lease.
    processing: u64,
    /// Those that the receiver has.
    completed: u64,
    /// Dead letters.
    failed: u64,
    /// Those ended on request.
    cancelled: u64,
    /// Requests made.
    attempts: u64,
    /// Requests after the first of each delivery.
    retries: u64,
    /// Completed ones among the completed and failed, from 0 to 1; `null` if there are none.
    success_rate: Option<f64>,
    /// Attempts that succeeded among all attempts, from 0 to 1; `null` if there are none. Unlike `success_rate` it falls
    /// with each failure, also while a delivery is still retried. Failed probes are no attempts.
    attempt_success_rate: Option<f64>,
    /// Attempts by the kind of their error (`error_kind`), without kinds that did not occur. An attempt that succeeded is among
    /// them if the body of its answer broke off.
    errors: BTreeMap<&'static str, u64>,
    /// What attempts took; `null` if there were none.
    duration_ms: Option<DurationsView>,
    /// How long the oldest delivery has waited that could be claimed now; `null` if there is none.
    oldest_ready_age_ms: Option<u64>,
    /// Those of the pending that are due but may not be attempted.
    held: HeldView,
}

/// Deliveries that are due but may not be attempted, by what holds them; each is counted once.
#[derive(Debug, Serialize, ToSchema)]
pub struct HeldView {
    /// All of them.
    total: u64,
    /// By a config that is disabled.
    paused: u64,
    /// By a circuit that is open or half open.
    circuit_open: u64,
    /// By `max_in_flight` or `rate_limit_per_second`.
    limited: u64,
    /// For how long the oldest of them has been due; `null` if there is none.
    oldest_age_ms: Option<u64>,
}

impl From<Held> for HeldView {
    fn from(held: Held) -> Self {
        Self {
            total: held.total(),
            paused: held.paused,
            circuit_open: held.circuit_open,
            limited: held.limited,
            oldest_age_ms: held.oldest_age.map(millis),
        }
    }
}

/// Durations in milliseconds; percentiles are exact below 1 s, and have three significant digits from there on.
#[derive(Debug, Serialize, ToSchema)]
pub struct DurationsView {
    /// The mean.
    avg: f64,
    /// The median.
    p50: u64,
    /// The 95th percentile.
    p95: u64,
    /// The 99th percentile.
    p99: u64,
}

impl From<Statistics> for StatisticsView {
    #[expect(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
    fn from(statistics: Statistics) -> Self {
        let Statistics { from, pending, processing, attempts, retries, .. } = statistics;
        let ended_as = |status| statistics.ended.get(&status).copied().unwrap_or_default();
        let completed = ended_as(DeliveryStatus::Completed);
        let failed = ended_as(DeliveryStatus::Failed);
        let cancelled = ended_as(DeliveryStatus::Cancelled);
        let ended = completed + failed;
        Self {
            from,
            total: pending + processing + completed + failed + cancelled,
            pending,
            processing,
            completed,
            failed,
            cancelled,
            attempts,
            retries,
            success_rate: (ended > 0).then(|| completed as f64 / ended as f64),
            // the last attempt of a completed delivery has succeeded, and no other
            attempt_success_rate: (attempts > 0).then(|| completed as f64 / attempts as f64),
            errors: statistics.errors.into_iter().map(|(kind, count)| (kind.as_str(), count)).collect(),
            duration_ms: statistics.duration_ms.map(|d| DurationsView {
                avg: d.avg,
                p50: d.p50,
                p95: d.p95,
                p99: d.p99,
            }),
            oldest_ready_age_ms: statistics.oldest_ready_age.map(millis),
            held: statistics.held.into(),
        }
    }
}
