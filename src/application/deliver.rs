//! The work on one leased delivery: send the request, judge how it ended, have the outcome written.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;
use tracing::{debug, error, info, warn};

use super::backoff::Backoff;
use super::batching::{BatchError, Batcher, Linger};
use super::circuits::Circuits;
use super::directory::EndpointDirectory;
use super::ports::{DeliveryQueue, ProbeLease, Sender, Settled, StoreError, UnusedLease};
use super::settling::{Outcome, Settle};
use super::wakeup::Wakeup;
use super::workers::ledger::Ledger;
use crate::domain::attempt::AttemptOutcome;
use crate::domain::delivery::{AttemptTimes, FinishedAttempt, LeasedDelivery, Work};
use crate::domain::endpoint::Endpoint;
use crate::domain::millis;
use crate::domain::retry::Verdict;

/// The most outcomes that one transaction writes.
const BATCH_MAX: usize = 500;
/// Far more than the leases of one process can fill: workers hold theirs until they are settled.
const BUFFER_KIB_MAX: usize = 1024 * 1024;
/// How many times the settle batcher yields to all other tasks. An answer that has arrived passes through the task of its
/// connection and the task of its attempt before it is an outcome.
const LINGER_TURNS: usize = 3;
/// A batch of fewer outcomes than this fraction of all leases waits for more, unless a delivery waits for a lease.
const LINGER_PART: usize = 32;
/// The longest wait of such a batch.
const LINGER_MAX: Duration = Duration::from_millis(5);
/// Waits between tries to read from the store or to write to it.
const STORE_BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));

/// The time that a lease leaves after the latest attempt, to write its outcome.
const SETTLE_TIME: Duration = Duration::from_secs(7);

pub struct Deliver {
    directory: Arc<EndpointDirectory>,
    queue: Arc<dyn DeliveryQueue>,
    sender: Arc<dyn Sender>,
    outcomes: Batcher<Arc<Outcome>, Settled>,
    circuits: Circuits,
    ledger: Arc<Ledger>,
    wakeup: Arc<Wakeup>,
    /// An attempt begins at most this long after its claim.
    start_max: Duration,
    lease_term: Duration,
}

#[derive(Debug, Clone, Copy)]
pub struct AttemptLimits {
    pub lease_term: Duration,
    /// The longest that one attempt takes.
    pub attempt_max: Duration,
}

/// When a worker's lease on a delivery is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseEnd {
    /// The lease was used up, given back, or lost.
    Now,
    /// The lease lasts until its time is over, because the outcome of the attempt could not be written.
    ByItself,
}

struct Ended {
    outcome: AttemptOutcome,
    times: AttemptTimes,
}

/// Why nothing was sent under a lease. The delivery is attempted later, under another lease.
struct NotNow(&'static str);

impl Deliver {
    /// Starts the batcher that writes outcomes. `ledger` counts the leases of the workers.
    pub fn start(
        directory: Arc<EndpointDirectory>,
        queue: Arc<dyn DeliveryQueue>,
        circuits: Circuits,
        sender: Arc<dyn Sender>,
        wakeup: Arc<Wakeup>,
        ledger: Arc<Ledger>,
        limits: AttemptLimits,
    ) -> Self {
        let enough = ledger.leases_max() / LINGER_PART;
        let linger = Linger { turns: LINGER_TURNS, enough, time_max: LINGER_MAX };
        let settle = Settle { queue: queue.clone(), wakeup: wakeup.clone() };
        let outcomes = Batcher::start_lingering(settle, BATCH_MAX, BUFFER_KIB_MAX, linger);
        let start_max = limits.lease_term.saturating_sub(limits.attempt_max + SETTLE_TIME);
        Self {
            directory,
            queue,
            sender,
            outcomes,
            circuits,
            ledger,
            wakeup,
            start_max,
            lease_term: limits.lease_term,
        }
    }

    /// Attempts the delivery, or records the loss of an earlier attempt. Returns when the outcome is written, or when the lease
    /// is lost or given back.
    pub async fn work(&self, delivery: LeasedDelivery) -> LeaseEnd {
        let (queue_id, config_id) = (delivery.queue_id, delivery.config_id);
        let endpoint = match self.endpoint_of(&delivery).await {
            Ok(Some(endpoint)) => endpoint,
            Ok(None) => {
                error!(%queue_id, config_id = config_id.get(), "the config of a delivery is missing");
                return LeaseEnd::ByItself;
            }
            Err(cause) => {
                error!(%queue_id, config_id = config_id.get(), error = cause.report(),
                    "a delivery is not attempted, because its config cannot be read; it is tried again");
                if cause.passes() {
                    return self.give_back(&delivery).await;
                }
                // its lease keeps it from being claimed again at once
                return LeaseEnd::ByItself;
            }
        };
        let ended = match delivery.work {
            Work::RecordLoss { leased_for } => Ok(Ended {
                outcome: AttemptOutcome::Unknown,
                times: AttemptTimes::Lost { found: delivery.claimed_at, leased_for },
            }),
            Work::Attempt { waited, .. } => self.attempt(&delivery, waited, &endpoint).await,
        };
        match ended {
            Ok(ended) => self.conclude(delivery, ended, &endpoint).await,
            Err(NotNow(reason)) => {
                warn!(%queue_id, config_id = config_id.get(), reason, "a delivery is not attempted yet");
                self.give_back(&delivery).await
            }
        }
    }

    /// Sends the request, unless it is too late for that under this lease.
    async fn attempt(
        &self,
        delivery: &LeasedDelivery,
        waited: Duration,
        endpoint: &Endpoint,
    ) -> Result<Ended, NotNow> {
        let started = Instant::now();
        if started - delivery.claimed_at > self.start_max {
            return Err(NotNow("its lease may end too soon"));
        }
        if delivery.attempt == 0 {
            let since_due = waited + (started - delivery.claimed_at);
            metrics::histogram!("webhook_first_attempt_delay_seconds").record(since_due);
        }
        let outcome = self.sender.send(delivery, endpoint).await;
        let outcome = outcome.ok_or(NotNow("this process stood still for too long"))?;
        Ok(Ended { outcome, times: AttemptTimes::Measured { started, ended: Instant::now() } })
    }

    /// Judges how an attempt ended, informs the endpoint's circuit, and writes the outcome.
    async fn conclude(&self, delivery: LeasedDelivery, ended: Ended, endpoint: &Endpoint) -> LeaseEnd {
        let claimed_at = delivery.claimed_at;
        let lease = ProbeLease { began: delivery.lease.locked_at, term: self.lease_term };
        let probe = delivery.probe.then_some(lease);
        let finished = judged(delivery, ended, endpoint);
        report(&finished);
        if let AttemptOutcome::NotSent { error: fault, .. } = &finished.outcome
            && finished.verdict == Verdict::WaitsOn
        {
            // before the outcome is written, because the delivery is tried again at once after that
            self.circuits.hold(&finished, fault).await;
        }
        let outcome = Arc::new(Outcome { attempt: finished, in_doubt: false });
        // The circuit is informed before the outcome is written: after that the delivery may be attempted again, which an open
        // circuit must prevent. There are two exceptions. If the lease may be over, the outcome may not count, and then it says
        // nothing about the receiver. During a probe nothing else is attempted, so its outcome need not wait for the circuit.
        let counts_at_once = probe.is_none() && claimed_at.elapsed() < self.lease_term;
        if counts_at_once {
            self.circuits.note(endpoint, &outcome.attempt, probe).await;
        }
        let Some(settled) = self.write(outcome.clone()).await else { return LeaseEnd::ByItself };
        if settled == Settled::Written && !counts_at_once {
            self.circuits.note(endpoint, &outcome.attempt, probe).await;
        }
        LeaseEnd::Now
    }

    /// Writes an outcome, however long the store is away: if a known outcome were forgotten, the receiver would be called
    /// again. Returns `None` if it could not be written.
    async fn write(&self, mut outcome: Arc<Outcome>) -> Option<Settled> {
        let FinishedAttempt { queue_id, config_id, number: attempt, .. } = outcome.attempt;
        let (mut backoff, mut bare) = (STORE_BACKOFF, false);
        loop {
            let bytes = outcome.attempt.outcome.text_bytes() + 256;
            let settled = if self.ledger.is_wanted(config_id) {
                self.outcomes.process_when_room(outcome.clone(), bytes).await
            } else {
                self.outcomes.process_unhurried(outcome.clone(), bytes).await
            };
            let cause = match settled {
                Ok(Settled::Written) => return Some(Settled::Written),
                Ok(Settled::LeaseLost) if matches!(outcome.attempt.outcome, AttemptOutcome::Unknown) => {
                    debug!(%queue_id, config_id = config_id.get(), attempt,
                        "no loss is recorded: its outcome has become known, or another worker has taken the delivery over");
                    return Some(Settled::LeaseLost);
                }
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
                // `Settle` has logged this once for the whole batch
                StoreError::Unavailable(_) => sleep(backoff.pause()).await,
                StoreError::InDoubt(_) => {
                    if !outcome.in_doubt {
                        outcome = Arc::new(Outcome { attempt: outcome.attempt.clone(), in_doubt: true });
                    }
                    sleep(backoff.pause()).await;
                }
                StoreError::Refused(_) if !bare => {
                    error!(%queue_id, config_id = config_id.get(), attempt, error = cause.report(),
                        "the outcome of an attempt was refused; it is written without its text");
                    bare = true;
                    let mut attempt = outcome.attempt.clone();
                    attempt.outcome = attempt.outcome.without_text();
                    outcome = Arc::new(Outcome { attempt, in_doubt: outcome.in_doubt });
                }
                StoreError::Refused(_) => {
                    error!(%queue_id, config_id = config_id.get(), attempt, error = cause.report(),
                        "the outcome of an attempt cannot be written; it is unknown when the lease ends");
                    return None;
                }
                StoreError::Unexpected(_) => {
                    error!(%queue_id, config_id = config_id.get(), attempt, error = cause.report(),
                        "the outcome of an attempt could not be written; trying again");
                    sleep(backoff.pause()).await;
                }
            }
        }
    }

    /// Gives back the lease of a delivery that was not attempted. If that fails, the lease expires.
    async fn give_back(&self, delivery: &LeasedDelivery) -> LeaseEnd {
        let unused = UnusedLease {
            queue_id: delivery.queue_id,
            worker_id: delivery.lease.worker_id.clone(),
            locked_at: Some(delivery.lease.locked_at),
        };
        match self.queue.release(&[unused]).await {
            Ok(_) => self.wakeup.announce(),
            // nothing was sent, so a later look for lost answers may give the lease back, too
            Err(cause) => {
                warn!(queue_id = %delivery.queue_id, error = cause.report(),
                    "a lease could not be given back; the delivery waits until it ends");
            }
        }
        LeaseEnd::Now
    }

    /// Reads the delivery's endpoint. While the store is away, it waits as long as the lease allows.
    async fn endpoint_of(&self, delivery: &LeasedDelivery) -> Result<Option<Arc<Endpoint>>, StoreError> {
        let mut backoff = STORE_BACKOFF;
        loop {
            match self.directory.at(delivery.config_id, delivery.config_revision).await {
                Err(StoreError::Unavailable(_) | StoreError::InDoubt(_))
                    if delivery.claimed_at.elapsed() < self.start_max =>
                {
                    sleep(backoff.pause()).await;
                }
                result => return result,
            }
        }
    }
}

/// Decides by the endpoint's retry policy what an attempt means for its delivery.
fn judged(delivery: LeasedDelivery, Ended { outcome, times }: Ended, endpoint: &Endpoint) -> FinishedAttempt {
    let policy = &endpoint.settings.retry;
    let (number, max_retries, rng) = (delivery.attempt, delivery.max_retries, &mut rand::rng());
    let verdict = if !endpoint.is_at(&delivery.webhook_url) {
        policy.judge_elsewhere(number, max_retries, &outcome, rng)
    } else if delivery.probe {
        policy.judge_probe(number, max_retries, &outcome, rng)
    } else {
        policy.judge(number, max_retries, &outcome, rng)
    };
    FinishedAttempt {
        queue_id: delivery.queue_id,
        lease: delivery.lease,
        config_id: delivery.config_id,
        webhook_url: delivery.webhook_url,
        number,
        times,
        outcome,
        verdict,
    }
}

/// Counts an attempt and logs how it ended. A receiver's failure is not an error of ours.
fn report(finished: &FinishedAttempt) {
    let outcome = match (&finished.outcome, finished.verdict) {
        (_, Verdict::Completed) => "success",
        (AttemptOutcome::Answered(_), _) => "http_error",
        (AttemptOutcome::Unanswered { .. }, _) => "no_answer",
        (AttemptOutcome::NotSent { .. }, _) => "not_sent",
        (AttemptOutcome::Unknown, _) => "unknown",
    };
    metrics::counter!("webhook_attempts_total", "outcome" => outcome).increment(1);
    if let Some(kind) = finished.outcome.error_kind() {
        metrics::counter!("webhook_attempt_errors_total", "kind" => kind.as_str()).increment(1);
    }
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
