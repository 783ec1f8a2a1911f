//! `/metrics`: what operators watch.

use std::sync::{Mutex, PoisonError};

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use metrics::Gauge;

use super::operators::{Operations, TAG};
use crate::application::ports::{Backlog, HeldCircuit};

/// How many circuits metrics tell of, of those that are not closed.
const CIRCUITS_MAX: usize = 1_000;

/// Gauges of the circuits that are not closed.
#[derive(Default)]
pub struct CircuitGauges {
    shown: Mutex<Vec<Gauge>>,
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
