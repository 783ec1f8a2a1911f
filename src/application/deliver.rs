//! One leased delivery: send, judge, settle.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::time::sleep;
use tracing::{debug, error, info, warn};

use super::batching::{BatchError, Batcher, Linger, ProcessBatch};
use super::circuits::Circuits;
use super::directory::EndpointDirectory;
use super::ports::{DeliveryQueue, Sender, Settled, StoreError, UnusedLease};
use super::wakeup::Wakeup;
use super::workers::shares::Shares;
use crate::domain::attempt::AttemptOutcome;
use crate::domain::delivery::{AttemptTimes, FinishedAttempt, LeasedDelivery};
use crate::domain::endpoint::Endpoint;
use crate::domain::millis;
use crate::domain::retry::{DeadLetterReason, Verdict};

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

/// The longest delay between tries to write an outcome that the store refuses, for a reason that nobody foresaw.
const REFUSED_BACKOFF_MAX: Duration = Duration::from_secs(2);

/// How much longer than the latest attempt a lease lasts: the time to write its outcome.
const SETTLE_TIME: Duration = Duration::from_secs(7);

/// Makes attempts.
pub struct Deliver {
    directory: Arc<EndpointDirectory>,
    queue: Arc<dyn DeliveryQueue>,
    sender: Arc<dyn Sender>,
    outcomes: Batcher<Arc<Outcome>, Settled>,
    circuits: Circuits,
    shares: Arc<Shares>,
    wakeup: Arc<Wakeup>,
    /// The latest after its claim that an attempt may begin.
    start_max: Duration,
    lease: Duration,
}

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct AttemptLimits {
    /// A lease.
    pub lease: Duration,
    /// An attempt.
    pub attempt_max: Duration,
}

/// When the lease of a delivery is over for the worker that had it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseEnd {
    /// It was used up, given back, or lost.
    Now,
    /// Once its time is over: how the attempt ended could not be written.
    ByItself,
}

/// An attempt that is to be written.
struct Outcome {
    attempt: FinishedAttempt,
    /// Whether an earlier try to write it was not answered, and so may have succeeded.
    in_doubt: bool,
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
        limits: AttemptLimits,
    ) -> Self {
        let enough = shares.leases_max() / LINGER_PART;
        let linger = Linger { turns: LINGER_TURNS, enough, time_max: LINGER_MAX };
        let settle = Settle { queue: queue.clone(), wakeup: wakeup.clone() };
        let outcomes = Batcher::start_lingering(settle, BATCH_MAX, BUFFER_KIB_MAX, linger);
        let start_max = limits.lease.saturating_sub(limits.attempt_max + SETTLE_TIME);
        let lease = limits.lease;
        Self { directory, queue, sender, outcomes, circuits, shares, wakeup, start_max, lease }
    }

    /// Makes one attempt and returns once its outcome is written, or the lease is lost.
    /// A delivery whose last attempt was lost with its worker is not sent: the loss is what is written.
    pub async fn attempt(&self, delivery: LeasedDelivery) -> LeaseEnd {
        let (queue_id, config_id) = (delivery.queue_id, delivery.config_id);
        let endpoint = match self.endpoint_of(&delivery).await {
            Ok(Some(endpoint)) => endpoint,
            Ok(None) => {
                error!(%queue_id, config_id = config_id.get(), "the config of a delivery is missing");
                return LeaseEnd::ByItself;
            }
            Err(cause) => {
                let passes = cause.passes();
                let cause = anyhow::Error::new(cause);
                error!(%queue_id, config_id = config_id.get(), error = format!("{cause:#}"),
                    "a delivery is not attempted, because its config cannot be read; it is tried again");
                if passes {
                    return self.give_back(&delivery).await;
                }
                // its lease keeps it from being claimed again at once
                return LeaseEnd::ByItself;
            }
        };
        if delivery.abandoned_for.is_none() && delivery.claimed_at.elapsed() > self.start_max {
            warn!(%queue_id, config_id = config_id.get(), "a delivery is not attempted yet: its lease may end too soon");
            return self.give_back(&delivery).await;
        }
        let (probe, claimed_at) = (delivery.probe, delivery.claimed_at);
        let finished = match self.send_and_judge(delivery, &endpoint).await {
            Ok(finished) => finished,
            Err(not_sent) => {
                let (queue_id, config_id) = (not_sent.queue_id, not_sent.config_id.get());
                warn!(%queue_id, config_id, "a delivery is not attempted yet: this process stood still for too long");
                return self.give_back(&not_sent).await;
            }
        };
        report(&finished);
        if let AttemptOutcome::NotSent { error: fault } = &finished.outcome
            && finished.verdict == Verdict::WaitsOn
        {
            // before it is written: once it is, the delivery would be tried again at once
            self.circuits.hold(&finished, fault).await;
        }
        let outcome = Arc::new(Outcome { attempt: finished, in_doubt: false });
        // before it is written: once it is, the delivery may be attempted again, which an open circuit must prevent. But if
        // the lease may be over, the outcome may not count, and then says nothing about the receiver either; and while a probe
        // is under way nothing else is attempted, so its outcome need not wait for the circuit to be told
        let counts_at_once = !probe && claimed_at.elapsed() < self.lease;
        if counts_at_once {
            self.circuits.note(&endpoint, &outcome.attempt, probe).await;
        }
        let Some(settled) = self.write(outcome.clone()).await else { return LeaseEnd::ByItself };
        if settled == Settled::Written && !counts_at_once {
            self.circuits.note(&endpoint, &outcome.attempt, probe).await;
        }
        LeaseEnd::Now
    }

    /// Writes an outcome, however long the store is away or refuses: what is known must not be forgotten, or the receiver
    /// would be called again. Answers what came of it, and `None` if it could not be written.
    async fn write(&self, mut outcome: Arc<Outcome>) -> Option<Settled> {
        let FinishedAttempt { queue_id, config_id, number: attempt, .. } = outcome.attempt;
        let (mut backoff, mut bare) = (STORE_BACKOFF.0, false);
        loop {
            let bytes = outcome.attempt.outcome.body().map_or(0, str::len) + 256;
            let settled = if self.shares.is_wanted(config_id) {
                self.outcomes.process_when_room(outcome.clone(), bytes).await
            } else {
                self.outcomes.process_unhurried(outcome.clone(), bytes).await
            };
            let cause = match settled {
                Ok(Settled::Written) => return Some(Settled::Written),
                Ok(Settled::LeaseLost) => {
                    metrics::counter!("webhook_leases_lost_total").increment(1);
                    warn!(%queue_id, config_id = config_id.get(), attempt, "the lease was lost before the outcome could be written");
                    return Some(Settled::LeaseLost);
                }
                Err(BatchError::Full | BatchError::Stopped) => {
                    warn!(%queue_id, config_id = config_id.get(), attempt, "stopped before the outcome of an attempt was written");
                    return None;
                }
                Err(BatchError::Store(cause)) => cause,
            };
            match cause {
                // the writer has said so for the whole batch
                StoreError::Unavailable(_) => {
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(STORE_BACKOFF.1);
                }
                StoreError::InDoubt(_) => {
                    if !outcome.in_doubt {
                        outcome = Arc::new(Outcome { attempt: outcome.attempt.clone(), in_doubt: true });
                    }
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(STORE_BACKOFF.1);
                }
                StoreError::Refused(cause) if !bare => {
                    error!(%queue_id, config_id = config_id.get(), attempt, error = format!("{cause:#}"),
                        "the outcome of an attempt was refused; it is written without its text");
                    bare = true;
                    let mut attempt = outcome.attempt.clone();
                    attempt.outcome = attempt.outcome.without_text();
                    outcome = Arc::new(Outcome { attempt, in_doubt: outcome.in_doubt });
                }
                StoreError::Refused(cause) => {
                    error!(%queue_id, config_id = config_id.get(), attempt, error = format!("{cause:#}"),
                        "the outcome of an attempt cannot be written; it is unknown when the lease ends");
                    return None;
                }
                StoreError::Unexpected(cause) => {
                    error!(%queue_id, config_id = config_id.get(), attempt, error = format!("{cause:#}"),
                        "the outcome of an attempt could not be written; trying again");
                    sleep(backoff).await;
                    backoff = (backoff * 4).min(REFUSED_BACKOFF_MAX);
                }
            }
        }
    }

    /// Gives the lease back of a delivery that was not attempted. Where that fails, the lease ends by itself.
    async fn give_back(&self, delivery: &LeasedDelivery) -> LeaseEnd {
        let unused = UnusedLease {
            queue_id: delivery.queue_id,
            worker_id: delivery.lease.worker_id.clone(),
            locked_at: Some(delivery.lease.locked_at),
        };
        match self.queue.release(&[unused]).await {
            Ok(_) => self.wakeup.announce(),
            // nothing was sent, so whoever finds it later may give it back, too
            Err(cause) => {
                let cause = anyhow::Error::new(cause);
                warn!(queue_id = %delivery.queue_id, error = format!("{cause:#}"),
                    "a lease could not be given back; the delivery waits until it ends");
            }
        }
        LeaseEnd::Now
    }

    /// Answers the delivery if it could not be sent in time.
    async fn send_and_judge(
        &self,
        delivery: LeasedDelivery,
        endpoint: &Endpoint,
    ) -> Result<FinishedAttempt, Box<LeasedDelivery>> {
        let is_current = endpoint.is_at(&delivery.webhook_url);
        let (outcome, times) = if let Some(leased_for) = delivery.abandoned_for {
            (AttemptOutcome::Unknown, AttemptTimes::Lost { found: delivery.claimed_at, leased_for })
        } else {
            let started = Instant::now();
            if delivery.attempt == 0 {
                let since_due = delivery.waited + (started - delivery.claimed_at);
                metrics::histogram!("webhook_first_attempt_delay_seconds").record(since_due);
            }
            let Some(outcome) = self.sender.send(&delivery, endpoint).await else {
                return Err(Box::new(delivery));
            };
            (outcome, AttemptTimes::Measured { started, ended: Instant::now() })
        };
        let policy = &endpoint.settings.retry;
        let verdict = if !is_current {
            policy.judge_elsewhere(delivery.attempt, delivery.max_retries, &outcome, &mut rand::rng())
        } else if delivery.probe {
            policy.judge_probe(delivery.attempt, delivery.max_retries, &outcome, &mut rand::rng())
        } else {
            policy.judge(delivery.attempt, delivery.max_retries, &outcome, &mut rand::rng())
        };
        Ok(FinishedAttempt {
            queue_id: delivery.queue_id,
            lease: delivery.lease,
            config_id: delivery.config_id,
            webhook_url: delivery.webhook_url,
            number: delivery.attempt,
            times,
            outcome,
            verdict,
        })
    }

    /// The delivery's endpoint, waited for while the store is away, but no longer than the lease allows.
    async fn endpoint_of(&self, delivery: &LeasedDelivery) -> Result<Option<Arc<Endpoint>>, StoreError> {
        let mut backoff = STORE_BACKOFF.0;
        loop {
            match self.directory.at(delivery.config_id, delivery.config_revision).await {
                Err(StoreError::Unavailable(_) | StoreError::InDoubt(_))
                    if delivery.claimed_at.elapsed() < self.start_max =>
                {
                    sleep(backoff).await;
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
        (AttemptOutcome::Answered(_), _) => "http_error",
        (AttemptOutcome::Unanswered { .. }, _) => "no_answer",
        (AttemptOutcome::NotSent { .. }, _) => "not_sent",
        (AttemptOutcome::Unknown, _) => "unknown",
    };
    metrics::counter!("webhook_attempts_total", "outcome" => outcome).increment(1);
    if let Some(duration) = finished.times.duration() {
        metrics::histogram!("webhook_attempt_duration_seconds").record(duration);
    }
    let FinishedAttempt { queue_id, number: attempt, .. } = finished;
    let config_id = finished.config_id.get();
    let status = finished.outcome.status();
    let reason = finished.outcome.error().unwrap_or_default();
    match finished.verdict {
        Verdict::Completed => debug!(%queue_id, config_id, attempt, status, "delivered"),
        Verdict::RetryIn(delay) => {
            let retry_in_ms = millis(delay);
            info!(%queue_id, config_id, attempt, status, reason, retry_in_ms, "attempt failed");
        }
        Verdict::WaitsOn | Verdict::Postponed => {
            info!(%queue_id, config_id, attempt, status, reason, "no attempt is used up: the delivery waits on");
        }
        Verdict::DeadLetter(why) => {
            warn!(%queue_id, config_id, attempt, status, reason, why = why.as_str(), "delivery failed for good");
        }
    }
}

/// Writes outcomes.
struct Settle {
    queue: Arc<dyn DeliveryQueue>,
    wakeup: Arc<Wakeup>,
}

#[async_trait]
impl ProcessBatch<Arc<Outcome>, Settled> for Settle {
    async fn process(&self, outcomes: &[Arc<Outcome>]) -> Result<Vec<Settled>, StoreError> {
        let attempts: Vec<&FinishedAttempt> = outcomes.iter().map(|outcome| &outcome.attempt).collect();
        let mut settled = self.queue.settle(&attempts).await.inspect_err(|error| {
            if error.passes() {
                warn!(
                    outcomes = outcomes.len(),
                    error = format!("{:#}", error.cause()),
                    "outcomes cannot be written while the database is away; trying again"
                );
            }
        })?;
        // if that cannot be found out now, all of them are in doubt until it can
        let found_out = self.recognize_own(outcomes, &mut settled).await;
        found_out.map_err(|error| StoreError::InDoubt(error.cause().clone()))?;
        let mut retries = false;
        for (attempt, settled) in attempts.iter().zip(&settled) {
            let status = match attempt.verdict {
                _ if *settled == Settled::LeaseLost => continue,
                Verdict::WaitsOn => continue,
                Verdict::RetryIn(_) | Verdict::Postponed => {
                    retries = true;
                    continue;
                }
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

impl Settle {
    /// A lease that is gone is no loss where an earlier try to write the outcome, which was not answered, used it up.
    async fn recognize_own(
        &self,
        outcomes: &[Arc<Outcome>],
        settled: &mut [Settled],
    ) -> Result<(), StoreError> {
        let in_question: Vec<&FinishedAttempt> = outcomes
            .iter()
            .zip(settled.iter())
            .filter(|(outcome, settled)| outcome.in_doubt && **settled == Settled::LeaseLost)
            .map(|(outcome, _)| &outcome.attempt)
            .collect();
        if in_question.is_empty() {
            return Ok(());
        }
        let recorded = self.queue.recorded(&in_question).await?;
        for (outcome, settled) in outcomes.iter().zip(settled) {
            if outcome.in_doubt && recorded.contains(&outcome.attempt.queue_id) {
                *settled = Settled::Written;
            }
        }
        Ok(())
    }
}
