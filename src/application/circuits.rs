//! Opens the circuits of endpoints that keep failing, and closes them once a probe succeeds.
//!
//! What has failed is counted by each process for itself; the state is in the store, where claims look at it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::ports::{CircuitStore, StoreError};
use super::wakeup::Wakeup;
use crate::domain::attempt::AttemptOutcome;
use crate::domain::circuit::AttemptWindow;
use crate::domain::delivery::FinishedAttempt;
use crate::domain::endpoint::{Endpoint, EndpointId};
use crate::domain::retry::Verdict;

/// Learns how attempts end.
pub struct Circuits {
    store: Arc<dyn CircuitStore>,
    wakeup: Arc<Wakeup>,
    /// Of endpoints where something has failed lately.
    windows: Mutex<HashMap<EndpointId, AttemptWindow>>,
}

impl Circuits {
    /// Nothing has failed yet.
    pub fn new(store: Arc<dyn CircuitStore>, wakeup: Arc<Wakeup>) -> Self {
        Self { store, wakeup, windows: Mutex::default() }
    }

    /// An attempt has ended.
    pub async fn note(&self, endpoint: &Endpoint, attempt: &FinishedAttempt, probe: bool) {
        let failure = match (&attempt.outcome, attempt.verdict) {
            // that a worker was lost says nothing about the receiver
            (AttemptOutcome::Unknown, _) => return,
            (_, Verdict::Completed) => None,
            (outcome, Verdict::RetryIn(_) | Verdict::DeadLetter(_) | Verdict::ProbeFailed) => outcome.error(),
        };
        let done = if probe {
            self.note_probe(endpoint.id, failure).await
        } else if let Some(reason) = self.reason_to_open(endpoint, failure.is_some()) {
            self.open(endpoint.id, &reason).await
        } else {
            Ok(())
        };
        if let Err(cause) = done {
            let cause = anyhow::Error::new(cause);
            warn!(config_id = %endpoint.id, error = format!("{cause:#}"),
                "a circuit could not be changed; the next attempt or probe tries again");
        }
    }

    fn reason_to_open(&self, endpoint: &Endpoint, failed: bool) -> Option<String> {
        // a panic elsewhere leaves plain counts behind
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if !failed && !windows.contains_key(&endpoint.id) {
            return None;
        }
        let now = Instant::now();
        let window = windows.entry(endpoint.id).or_insert_with(|| AttemptWindow::new(now));
        let reason = window.count(now, failed, &endpoint.settings.circuit);
        if reason.is_some() || window.is_clean() {
            windows.remove(&endpoint.id);
        }
        reason
    }

    async fn open(&self, id: EndpointId, reason: &str) -> Result<(), StoreError> {
        if let Some(probe_in) = self.store.open(id, reason).await? {
            warn!(config_id = %id, reason, probe_in_ms = probe_in.as_millis(), "circuit opened: deliveries wait");
            changed("open");
            self.wake_for_probe(probe_in);
        }
        Ok(())
    }

    async fn note_probe(&self, id: EndpointId, failure: Option<String>) -> Result<(), StoreError> {
        let Some(failure) = failure else {
            if self.store.close(id).await? {
                info!(config_id = %id, "circuit closed: the probe succeeded");
                changed("closed");
                self.wakeup.announce();
            }
            return Ok(());
        };
        let reason = format!("the last probe failed: {failure}");
        if let Some(probe_in) = self.store.reopen(id, &reason).await? {
            warn!(config_id = %id, reason, probe_in_ms = probe_in.as_millis(), "circuit stays open");
            changed("open");
            self.wake_for_probe(probe_in);
        }
        Ok(())
    }

    /// If this process ends before, the poll of another finds the probe due.
    fn wake_for_probe(&self, probe_in: Duration) {
        let wakeup = self.wakeup.clone();
        tokio::spawn(async move {
            tokio::time::sleep(probe_in).await;
            wakeup.wake_claimer();
        });
    }
}

fn changed(to: &'static str) {
    metrics::counter!("webhook_circuit_changes_total", "to" => to).increment(1);
}
