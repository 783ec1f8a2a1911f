//! Logs and metrics.

use std::io::IsTerminal as _;
use std::str::FromStr;

use anyhow::Context as _;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
    /// `key=value` pairs.
    Logfmt,
}

impl FromStr for LogFormat {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "pretty" => Ok(Self::Pretty),
            "json" => Ok(Self::Json),
            "logfmt" => Ok(Self::Logfmt),
            _ => Err(()),
        }
    }
}

/// Sends log lines to standard error, so that a command's output stays clean.
pub fn log_to_stderr(level: &str, format: LogFormat) -> anyhow::Result<()> {
    // a lone level is meant for this program; of the libraries below it only trouble is told
    // a connection that is found broken when it is given back is replaced, and is no trouble
    let directives = if level.contains(['=', ',']) {
        level.to_owned()
    } else {
        format!("warn,sqlx_core::pool::connection=error,webhook_processor={level}")
    };
    let filter: EnvFilter = directives.parse().context("LOG_LEVEL")?;
    let layer = match format {
        LogFormat::Pretty => fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .boxed(),
        LogFormat::Json => fmt::layer().json().flatten_event(true).with_writer(std::io::stderr).boxed(),
        LogFormat::Logfmt => tracing_logfmt::builder().layer().with_writer(std::io::stderr).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(layer).try_init().context("starting the log")
}

/// Installs the recorder behind `/metrics` and says what each metric is.
pub fn record_metrics() -> anyhow::Result<PrometheusHandle> {
    let delays = [
        0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0,
    ];
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &delays)
        .context("choosing histogram buckets")?
        .install_recorder()
        .context("installing the metrics recorder")?;
    describe();
    begin_at_zero();
    Ok(handle)
}

/// A counter that is missing until it first counts cannot be watched for its first increase.
fn begin_at_zero() {
    use metrics::counter;
    for name in ["webhook_enqueued_total", "webhook_duplicates_total", "webhook_leases_lost_total"] {
        counter!(name).increment(0);
    }
    for outcome in ["success", "refused", "unanswered", "unknown"] {
        counter!("webhook_attempts_total", "outcome" => outcome).increment(0);
    }
    for status in ["completed", "failed", "cancelled"] {
        counter!("webhook_deliveries_total", "status" => status).increment(0);
    }
}

fn describe() {
    use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
    describe_counter!("webhook_enqueued_total", "Deliveries stored by this process");
    describe_counter!(
        "webhook_duplicates_total",
        "Enqueues answered with a delivery that the same event made before"
    );
    describe_counter!("webhook_claims_total", "Claims made");
    describe_counter!("webhook_claimed_total", "Leases taken by claims");
    describe_counter!(
        "webhook_leased_at_enqueue_total",
        "Leases taken as deliveries were stored, by workers of the same process"
    );
    describe_counter!("webhook_attempts_total", "Attempts by outcome: success, refused, unanswered, unknown");
    describe_counter!("webhook_deliveries_total", "Deliveries by final status");
    describe_counter!("webhook_leases_lost_total", "Attempts whose lease had passed to another worker");
    describe_histogram!(
        "webhook_attempt_duration_seconds",
        Unit::Seconds,
        "Attempts, from connect to the end of the body"
    );
    describe_histogram!(
        "webhook_first_attempt_delay_seconds",
        Unit::Seconds,
        "From due to the first attempt"
    );
    describe_histogram!(
        "http_request_duration_seconds",
        Unit::Seconds,
        "API requests, by route, method and status"
    );
    describe_gauge!(
        "webhook_queue_depth",
        "Open deliveries by state: ready, scheduled, processing; read at most every 5 s"
    );
    describe_gauge!(
        "webhook_oldest_ready_age_seconds",
        Unit::Seconds,
        "Wait of the oldest delivery that could be claimed"
    );
    describe_gauge!("webhook_pool_connections", "Database connections by pool and state");
}
