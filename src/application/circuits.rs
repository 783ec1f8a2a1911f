//! Opens the circuits of endpoints that keep failing, and closes them once a probe succeeds.
//!
//! Each process counts failures in its own window. The circuit's state is in the store, where claims look at it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::ports::{CircuitStore, ProbeLease, StoreError, UnsuccessfulProbe};
use super::wakeup::Wakeup;
use crate::domain::attempt::{Answer, AttemptOutcome, ReceiverSign};
use crate::domain::circuit::{AttemptWindow, CircuitPolicy, CountedAttempt, Opening};
use crate::domain::delivery::{AttemptTimes, FinishedAttempt};
use crate::domain::endpoint::{Endpoint, EndpointId, EndpointUrl};
use crate::domain::millis;
use crate::domain::retry::RETRY_AFTER_MAX;

/// How many times, and how long apart, the result of a probe is offered to a store that is away.
const PROBE_TRIES: usize = 30;
const PROBE_AGAIN: Duration = Duration::from_secs(1);
/// With this many windows, the first look for expired ones is made.
const WINDOWS_MIN: usize = 1_024;

pub struct Circuits {
    store: Arc<dyn CircuitStore>,
    wakeup: Arc<Wakeup>,
    windows: Mutex<Windows>,
}

#[derive(Default)]
struct Windows {
    by_endpoint: HashMap<EndpointId, Window>,
    /// With this many windows, the expired ones are dropped.
    tidy_at: usize,
}

struct Window {
    attempts: AttemptWindow,
    policy: CircuitPolicy,
    /// Where the attempts went. With other URLs the endpoint is another receiver, and counting starts again.
    urls: Vec<EndpointUrl>,
}

impl Window {
    fn new(attempts: AttemptWindow, endpoint: &Endpoint) -> Self {
        let urls = endpoint.settings.urls().map(|(_, url)| url.clone()).collect();
        Self { attempts, policy: endpoint.settings.circuit, urls }
    }

    fn is_of(&self, endpoint: &Endpoint) -> bool {
        self.urls.iter().eq(endpoint.settings.urls().map(|(_, url)| url))
    }
}

impl Circuits {
    pub fn new(store: Arc<dyn CircuitStore>, wakeup: Arc<Wakeup>) -> Self {
        Self { store, wakeup, windows: Mutex::default() }
    }

    /// Opens the circuit because this process cannot send to the endpoint. Its deliveries wait and use up no attempts.
    pub async fn hold(&self, attempt: &FinishedAttempt, fault: &str) {
        metrics::counter!("webhook_own_faults_total").increment(1);
        let (id, reason) = (attempt.config_id, format!("nothing can be sent: {fault}"));
        match self.store.open(id, &attempt.webhook_url, &reason, Duration::ZERO).await {
            Ok(Some(probe_in)) => {
                error!(
                    config_id = id.get(),
                    reason, "circuit opened: deliveries wait until this is mended here"
                );
                changed("open");
                self.wake_for_probe(probe_in);
            }
            // it is open already
            Ok(None) => {}
            Err(cause) => not_changed(id, &cause),
        }
    }

    /// Counts the outcome of an attempt, or of a probe under this lease, and opens or closes the circuit accordingly.
    pub async fn note(&self, endpoint: &Endpoint, attempt: &FinishedAttempt, probe: Option<ProbeLease>) {
        let done = if let Some(lease) = probe {
            // nothing else is sent to this endpoint until the store knows how the probe ended
            let mut done = self.note_probe(endpoint, attempt, lease).await;
            for _ in 0..PROBE_TRIES {
                if !done.as_ref().is_err_and(StoreError::passes) {
                    break;
                }
                tokio::time::sleep(PROBE_AGAIN).await;
                done = self.note_probe(endpoint, attempt, lease).await;
            }
            done
        } else if let Some(opening) = self.reason_to_open(endpoint, attempt) {
            self.open(endpoint.id, &attempt.webhook_url, &opening).await
        } else {
            Ok(())
        };
        if let Err(cause) = done {
            not_changed(endpoint.id, &cause);
        }
    }

    fn reason_to_open(&self, endpoint: &Endpoint, attempt: &FinishedAttempt) -> Option<Opening> {
        let (sign, started) = match (sign_of(endpoint, attempt), attempt.times) {
            (Some(sign), AttemptTimes::Measured { started, .. }) => (sign, started),
            // a lost worker says nothing about the receiver
            (None, _) | (_, AttemptTimes::Lost { .. }) => return None,
        };
        let (now, policy) = (Instant::now(), endpoint.settings.circuit);
        // a panic elsewhere leaves plain counts behind
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.tidy(now);
        let begin = || Window::new(AttemptWindow::new(now), endpoint);
        let window = windows.by_endpoint.entry(endpoint.id).or_insert_with(begin);
        if !window.is_of(endpoint) {
            *window = begin();
        }
        window.policy = policy;
        let counted = CountedAttempt { started, number: attempt.number, sign };
        let opening = window.attempts.count(now, counted, &policy);
        if opening.is_some() {
            windows.by_endpoint.remove(&endpoint.id);
        }
        opening
    }

    /// After a probe that succeeded, earlier failures no longer count.
    fn begin_anew(&self, endpoint: &Endpoint) {
        let window = Window::new(AttemptWindow::recovered(Instant::now()), endpoint);
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.by_endpoint.insert(endpoint.id, window);
    }

    async fn open(&self, id: EndpointId, url: &str, opening: &Opening) -> Result<(), StoreError> {
        let counted_for = opening.counted_since.elapsed();
        if let Some(probe_in) = self.store.open(id, url, &opening.reason, counted_for).await? {
            let probe_in_ms = millis(probe_in);
            warn!(
                config_id = id.get(),
                reason = opening.reason,
                probe_in_ms,
                "circuit opened: deliveries wait"
            );
            changed("open");
            self.wake_for_probe(probe_in);
        }
        Ok(())
    }

    async fn note_probe(
        &self,
        endpoint: &Endpoint,
        attempt: &FinishedAttempt,
        lease: ProbeLease,
    ) -> Result<(), StoreError> {
        let (id, outcome) = (endpoint.id, &attempt.outcome);
        if !endpoint.is_at(&attempt.webhook_url) {
            self.store.probe_another(id, lease).await?;
            self.wakeup.wake_claimer();
            return Ok(());
        }
        let sign = outcome.sign();
        if sign == Some(ReceiverSign::Well) {
            probed("success");
            self.begin_anew(endpoint);
            if self.store.close(id).await? {
                info!(config_id = id.get(), "circuit closed: the probe succeeded");
                changed("closed");
                self.wakeup.announce();
            }
            return Ok(());
        }
        probed("failure");
        let retry_after = match outcome {
            AttemptOutcome::Answered(Answer { retry_after, .. }) => retry_after.unwrap_or_default(),
            AttemptOutcome::Unanswered { .. } | AttemptOutcome::Unknown | AttemptOutcome::NotSent { .. } => {
                Duration::ZERO
            }
        };
        let probe = UnsuccessfulProbe {
            error: outcome.error().unwrap_or_default(),
            receiver_fails: sign == Some(ReceiverSign::Failing),
            retry_after: retry_after.min(RETRY_AFTER_MAX),
        };
        self.reopen(id, lease, &probe).await
    }

    async fn reopen(
        &self,
        id: EndpointId,
        lease: ProbeLease,
        probe: &UnsuccessfulProbe,
    ) -> Result<(), StoreError> {
        if let Some(probe_in) = self.store.reopen(id, lease, probe).await? {
            let probe_in_ms = millis(probe_in);
            warn!(
                config_id = id.get(),
                error = probe.error,
                probe_in_ms,
                "circuit stays open: the probe failed"
            );
            self.wake_for_probe(probe_in);
        }
        Ok(())
    }

    /// If this process ends before that, another one's poll finds the probe due.
    fn wake_for_probe(&self, probe_in: Duration) {
        let wakeup = self.wakeup.clone();
        tokio::spawn(async move {
            tokio::time::sleep(probe_in).await;
            wakeup.wake_claimer();
        });
    }
}

impl Windows {
    fn tidy(&mut self, now: Instant) {
        if self.by_endpoint.len() >= self.tidy_at.max(WINDOWS_MIN) {
            self.by_endpoint.retain(|_, window| !window.attempts.is_over(now, &window.policy));
            self.tidy_at = self.by_endpoint.len() * 2;
        }
    }
}

/// What an attempt says about the endpoint's present receiver. An attempt at a URL that the endpoint no longer has says
/// nothing (`None`).
fn sign_of(endpoint: &Endpoint, attempt: &FinishedAttempt) -> Option<ReceiverSign> {
    if endpoint.is_at(&attempt.webhook_url) { attempt.outcome.sign() } else { None }
}

fn not_changed(id: EndpointId, cause: &StoreError) {
    warn!(
        config_id = id.get(),
        error = cause.report(),
        "a circuit could not be changed; the next attempt or probe tries again"
    );
}

fn changed(to: &'static str) {
    metrics::counter!("webhook_circuit_changes_total", "to" => to).increment(1);
}

fn probed(outcome: &'static str) {
    metrics::counter!("webhook_probes_total", "outcome" => outcome).increment(1);
}
