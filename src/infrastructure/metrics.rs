//! The metrics of a process, each with what `/metrics` says of it.

use std::time::Duration;

use anyhow::Context as _;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::domain::error_kind::ErrorKind;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts values in buckets.
    Histogram,
}

/// A metric, as `/metrics` describes it.
#[derive(Debug)]
pub struct Metric {
    /// Its name, with its unit.
    pub name: &'static str,
    /// Its kind.
    pub kind: MetricKind,
    /// One line.
    pub help: &'static str,
    /// The label sets that are there from the start, at zero. None if they are not known before.
    pub at_start: &'static [&'static [(&'static str, &'static str)]],
}

/// One series, without labels.
const PLAIN: &[&[(&str, &str)]] = &[&[]];

/// All metrics.
pub const METRICS: &[Metric] = &[
    counter("webhook_enqueued_total", "Deliveries stored by this process", PLAIN),
    counter(
        "webhook_duplicates_total",
        "Enqueues answered with a delivery that the same event made before",
        PLAIN,
    ),
    counter("webhook_claims_total", "Claims made", PLAIN),
    counter("webhook_leases_taken_total", "Leases taken by claims", PLAIN),
    counter(
        "webhook_leased_at_enqueue_total",
        "Leases taken as deliveries were stored, by workers of the same process",
        PLAIN,
    ),
    counter(
        "webhook_attempts_total",
        "Attempts by outcome: success (2xx), http_error (any other status), no_answer (none came), unknown (lost with its worker), not_sent (a fault of our own)",
        &[
            &[("outcome", "success")],
            &[("outcome", "http_error")],
            &[("outcome", "no_answer")],
            &[("outcome", "unknown")],
            &[("outcome", "not_sent")],
        ],
    ),
    counter(
        "webhook_attempt_errors_total",
        "Attempts that failed, or whose answer is incomplete, by kind of error (error_kind in the audit)",
        ERROR_KINDS,
    ),
    counter(
        "webhook_deliveries_total",
        "Deliveries by final status",
        &[&[("status", "completed")], &[("status", "failed")], &[("status", "cancelled")]],
    ),
    counter("webhook_leases_lost_total", "Attempts whose lease had passed to another worker", PLAIN),
    counter(
        "webhook_circuit_changes_total",
        "Circuits opened and closed by this process, by the state that followed; probes change nothing",
        &[&[("to", "open")], &[("to", "closed")]],
    ),
    counter(
        "webhook_probes_total",
        "Probes of open circuits, by outcome",
        &[&[("outcome", "success")], &[("outcome", "failure")]],
    ),
    counter(
        "webhook_own_faults_total",
        "Attempts at which nothing could be sent for a reason of our own: a forbidden address, no name server, no certificate authorities",
        PLAIN,
    ),
    gauge(
        "webhook_circuit_held",
        "1 for each config whose circuit is not closed, by state and reason (failures or by_hand); 0 once it is closed again",
        &[],
    ),
    histogram("webhook_attempt_duration_seconds", "Attempts, from connect to the end of the body", PLAIN),
    histogram("webhook_first_attempt_delay_seconds", "From due to the first attempt", PLAIN),
    histogram("http_request_duration_seconds", "API requests, by route, method and status", &[]),
    gauge(
        "webhook_queue_depth",
        "Open deliveries by state: ready, held, scheduled, processing; read at most every 5 s",
        &[&[("state", "ready")], &[("state", "held")], &[("state", "scheduled")], &[("state", "processing")]],
    ),
    gauge("webhook_oldest_ready_age_seconds", "Wait of the oldest delivery that could be claimed", PLAIN),
    gauge(
        "webhook_held_deliveries",
        "Deliveries that are due but may not be claimed, by reason; read at most every 5 s",
        &[&[("reason", "paused")], &[("reason", "circuit_open")], &[("reason", "limited")]],
    ),
    gauge("webhook_oldest_held_age_seconds", "For how long the oldest of them has been due", PLAIN),
    gauge(
        "webhook_pool_connections",
        "Database connections by pool and state",
        &[
            &[("pool", "engine"), ("state", "in_use")],
            &[("pool", "engine"), ("state", "idle")],
            &[("pool", "requests"), ("state", "in_use")],
            &[("pool", "requests"), ("state", "idle")],
        ],
    ),
];

const ERROR_KINDS: LabelSets = &[
    &[("kind", ErrorKind::AddressNotAllowed.as_str())],
    &[("kind", ErrorKind::Connect.as_str())],
    &[("kind", ErrorKind::Dns.as_str())],
    &[("kind", ErrorKind::HttpStatus.as_str())],
    &[("kind", ErrorKind::HttpsRequired.as_str())],
    &[("kind", ErrorKind::InvalidUrl.as_str())],
    &[("kind", ErrorKind::OutcomeUnknown.as_str())],
    &[("kind", ErrorKind::PortNotAllowed.as_str())],
    &[("kind", ErrorKind::Protocol.as_str())],
    &[("kind", ErrorKind::Reset.as_str())],
    &[("kind", ErrorKind::Timeout.as_str())],
    &[("kind", ErrorKind::Tls.as_str())],
];

type LabelSets = &'static [&'static [(&'static str, &'static str)]];

const fn counter(name: &'static str, help: &'static str, at_start: LabelSets) -> Metric {
    Metric { name, kind: MetricKind::Counter, help, at_start }
}

const fn gauge(name: &'static str, help: &'static str, at_start: LabelSets) -> Metric {
    Metric { name, kind: MetricKind::Gauge, help, at_start }
}

const fn histogram(name: &'static str, help: &'static str, at_start: LabelSets) -> Metric {
    Metric { name, kind: MetricKind::Histogram, help, at_start }
}

/// Installs the recorder behind `/metrics` and describes each metric.
pub fn record_metrics() -> anyhow::Result<PrometheusHandle> {
    let delays = [
        0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0,
    ];
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &delays)
        .context("choosing histogram buckets")?
        .install_recorder()
        .context("installing the metrics recorder")?;
    for metric in METRICS {
        describe(metric);
        begin_at_zero(metric);
    }
    Ok(handle)
}

/// Histograms hold single values until someone reads them; this folds them into their buckets.
pub async fn keep_metrics_small(metrics: PrometheusHandle, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(Duration::from_secs(5)) => metrics.run_upkeep(),
        }
    }
}

fn describe(metric: &Metric) {
    match metric.kind {
        MetricKind::Counter => metrics::describe_counter!(metric.name, metric.help),
        MetricKind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
        MetricKind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
    }
}

/// A series that is missing until it first counts cannot be watched for its first increase.
fn begin_at_zero(metric: &Metric) {
    for labels in metric.at_start {
        match metric.kind {
            MetricKind::Counter => metrics::counter!(metric.name, *labels).increment(0),
            MetricKind::Gauge => metrics::gauge!(metric.name, *labels).set(0.0),
            // naming a series registers it
            MetricKind::Histogram => drop(metrics::histogram!(metric.name, *labels)),
        }
    }
}
