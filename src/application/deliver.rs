//! One leased delivery: send, judge, settle.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tracing::{debug, error, info, warn};

use super::batching::{BatchError, Batcher, Linger, ProcessBatch};
use super::circuits::Circuits;
use super::directory::EndpointDirectory;
use super::ports::{DeliveryQueue, Sender, Settled, StoreError};
use super::shares::Shares;
use super::wakeup::Wakeup;
use crate::domain::attempt::AttemptOutcome;
use crate::domain::delivery::{AttemptTimes, FinishedAttempt, LeasedDelivery};
use crate::domain::endpoint::Endpoint;
use crate::domain::retry::{DeadLetterReason, RetryPolicy, Verdict};

/// The most outcomes that one transaction writes.
const BATCH_MAX: usize = 500;
/// Far more than the leases of one process can fill: workers hold theirs until they are settled.
const BUFFER_KIB_MAX: usize = 1024 * 1024;
/// How many times outcomes let all else that can run go first: an answer that has arrived passes through its connection's
/// task and through the attempt's before it is an outcome, too.
const LINGER_TURNS: usize = 3;
/// Fewer outcomes than this part of all leases wait a little for more, where nothing waits for their leases.
const LINGER_PART: usize = 32;
/// For how long.
const LINGER_MAX: Duration = Duration::from_millis(5);
/// Delays between tries to reach a store that is unavailable: the first, and the longest.
const STORE_BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The latest after its claim that an attempt may begin: a lease outlives an attempt by 15 s or more.
const START_MAX: Duration = Duration::from_secs(8);

/// Makes attempts.
pub struct Deliver {
    directory: Arc<EndpointDirectory>,
    sender: Arc<dyn Sender>,
    outcomes: Batcher<FinishedAttempt, Settled>,
    circuits: Circuits,
    shares: Arc<Shares>,
}

impl Deliver {
    /// Starts the writer of outcomes behind it, for workers whose leases are counted by `shares`.
    pub fn start(
        directory: Arc<EndpointDirectory>,
        queue: Arc<dyn DeliveryQueue>,
        circuits: Circuits,
        sender: Arc<dyn Sender>,
        wakeup: Arc<Wakeup>,
        shares: Arc<Shares>,
    ) -> Self {
        let enough = shares.leases_max() / LINGER_PART;
        let linger = Linger { turns: LINGER_TURNS, enough, time_max: LINGER_MAX };
        let settle = SettleUntilWritten { queue, wakeup };
        let outcomes = Batcher::start_lingering(settle, BATCH_MAX, BUFFER_KIB_MAX, linger);
        Self { directory, sender, outcomes, circuits, shares }
    }

    /// Makes one attempt and returns once its outcome is written, or the lease is lost.
    /// A delivery whose last attempt was lost with its worker is not sent: the loss is what is written.
    pub async fn attempt(&self, delivery: LeasedDelivery) {
        let endpoint = match self.endpoint_of(&delivery).await {
            Ok(Some(endpoint)) => endpoint,
            Ok(None) => {
                error!(queue_id = %delivery.queue_id, config_id = %delivery.config_id, "the config of a delivery is missing");
                return;
            }
            Err(cause) => {
                let cause = anyhow::Error::new(cause);
                error!(queue_id = %delivery.queue_id, config_id = %delivery.config_id, error = format!("{cause:#}"),
                    "a delivery is not attempted, because its config cannot be read; it is tried again when the lease ends");
                return;
            }
        };
        if delivery.abandoned_for.is_none() && delivery.claimed_at.elapsed() > START_MAX {
            warn!(queue_id = %delivery.queue_id, "a delivery is not attempted: its lease may end too soon");
            return;
        }
        let probe = delivery.probe;
        let finished = self.send_and_judge(delivery, &endpoint).await;
        report(&finished);
        // before it is written: once it is, the delivery may be attempted again
        self.circuits.note(&endpoint, &finished, probe).await;
        let bytes = finished.outcome.body().map_or(0, str::len) + 256;
        let (queue_id, config_id, number) = (finished.queue_id, finished.config_id, finished.number);
        let settled = if self.shares.is_wanted(config_id) {
            self.outcomes.process_when_room(finished, bytes).await
        } else {
            self.outcomes.process_unhurried(finished, bytes).await
        };
        match settled {
            Ok(Settled::Written) => {}
            Ok(Settled::LeaseLost) => {
                metrics::counter!("webhook_leases_lost_total").increment(1);
                warn!(%queue_id, %config_id, attempt = number, "the lease was lost before the outcome could be written");
            }
            Err(BatchError::Store(cause)) => {
                let cause = anyhow::Error::new(cause);
                error!(%queue_id, %config_id, attempt = number, error = format!("{cause:#}"),
                    "the outcome of an attempt could not be written; it is repeated when the lease ends");
            }
            Err(BatchError::Full | BatchError::Stopped) => {
                warn!(%queue_id, %config_id, attempt = number, "stopped before the outcome of an attempt was written");
            }
        }
    }

    async fn send_and_judge(&self, delivery: LeasedDelivery, endpoint: &Endpoint) -> FinishedAttempt {
        let (outcome, times) = if let Some(leased_for) = delivery.abandoned_for {
            (AttemptOutcome::Unknown, AttemptTimes::Lost { found: delivery.claimed_at, leased_for })
        } else {
            let started = Instant::now();
            if delivery.attempt == 0 {
                let since_due = delivery.waited + (started - delivery.claimed_at);
                metrics::histogram!("webhook_first_attempt_delay_seconds").record(since_due);
            }
            let outcome = self.sender.send(&delivery, endpoint).await;
            (outcome, AttemptTimes::Measured { started, ended: Instant::now() })
        };
        let policy = &endpoint.settings.retry;
        let verdict = if delivery.probe {
            RetryPolicy::judge_probe(&outcome)
        } else {
            policy.judge(delivery.attempt, delivery.max_retries, &outcome, &mut rand::rng())
        };
        FinishedAttempt {
            queue_id: delivery.queue_id,
            lease: delivery.lease,
            config_id: delivery.config_id,
            number: delivery.attempt,
            times,
            outcome,
            verdict,
        }
    }

    /// The delivery's endpoint, waited for while the store is away, but no longer than the lease allows.
    async fn endpoint_of(&self, delivery: &LeasedDelivery) -> Result<Option<Arc<Endpoint>>, StoreError> {
        let mut backoff = STORE_BACKOFF.0;
        loop {
            match self.directory.at(delivery.config_id, delivery.config_revision).await {
                Err(StoreError::Unavailable(_)) if delivery.claimed_at.elapsed() < START_MAX => {
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(STORE_BACKOFF.1);
                }
                result => return result,
            }
        }
    }
}

/// Counts an attempt and tells of it. A receiver's failure is not an error of ours.
fn report(finished: &FinishedAttempt) {
    let outcome = match (&finished.outcome, finished.verdict) {
        (_, Verdict::Completed) => "success",
        (AttemptOutcome::Answered(_), _) => "refused",
        (AttemptOutcome::Unanswered { .. }, _) => "unanswered",
        (AttemptOutcome::Unknown, _) => "unknown",
    };
    metrics::counter!("webhook_attempts_total", "outcome" => outcome).increment(1);
    if let Some(duration) = finished.times.duration() {
        metrics::histogram!("webhook_attempt_duration_seconds").record(duration);
    }
    let FinishedAttempt { queue_id, config_id, number: attempt, .. } = finished;
    let status = finished.outcome.status();
    let reason = finished.outcome.error().unwrap_or_default();
    match finished.verdict {
        Verdict::Completed => debug!(%queue_id, %config_id, attempt, status, "delivered"),
        Verdict::RetryIn(delay) => {
            info!(%queue_id, %config_id, attempt, status, reason, retry_in_ms = delay.as_millis(), "attempt failed");
        }
        Verdict::ProbeFailed => {
            info!(%queue_id, %config_id, attempt, status, reason, "probe failed: the delivery waits on");
        }
        Verdict::DeadLetter(why) => {
            warn!(%queue_id, %config_id, attempt, status, reason, why = why.as_str(), "delivery failed for good");
        }
    }
}

/// Writes outcomes, however long the store is away: a lease that has not been taken over is still good then.
struct SettleUntilWritten {
    queue: Arc<dyn DeliveryQueue>,
    wakeup: Arc<Wakeup>,
}

#[async_trait]
impl ProcessBatch<FinishedAttempt, Settled> for SettleUntilWritten {
    async fn process(&self, attempts: &[FinishedAttempt]) -> Result<Vec<Settled>, StoreError> {
        let mut backoff = STORE_BACKOFF.0;
        let settled = loop {
            match self.queue.settle(attempts).await {
                Err(StoreError::Unavailable(cause)) => {
                    warn!(
                        outcomes = attempts.len(),
                        error = format!("{cause:#}"),
                        "outcomes cannot be written while the database is away; trying again"
                    );
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(STORE_BACKOFF.1);
                }
                result => break result?,
            }
        };
        let mut retries = false;
        for (attempt, settled) in attempts.iter().zip(&settled) {
            let status = match attempt.verdict {
                _ if *settled == Settled::LeaseLost => continue,
                Verdict::RetryIn(_) => {
                    retries = true;
                    continue;
                }
                Verdict::ProbeFailed => continue,
                Verdict::Completed => "completed",
                Verdict::DeadLetter(DeadLetterReason::RetriesExhausted | DeadLetterReason::EndpointGone) => {
                    "failed"
                }
            };
            metrics::counter!("webhook_deliveries_total", "status" => status).increment(1);
        }
        if retries {
            self.wakeup.scheduled();
        }
        Ok(settled)
    }
}
