//! Writes the outcomes of attempts, a batch per transaction.

use std::sync::Arc;

use async_trait::async_trait;
use tracing::warn;

use super::batching::ProcessBatch;
use super::ports::{DeliveryQueue, Settled, StoreError};
use super::wakeup::Wakeup;
use crate::domain::delivery::FinishedAttempt;
use crate::domain::retry::Verdict;

/// How an attempt ended, to be written.
pub(super) struct Outcome {
    pub(super) attempt: FinishedAttempt,
    /// An earlier try to write it was not answered. It may have succeeded.
    pub(super) in_doubt: bool,
}

/// Settles a batch of outcomes.
pub(super) struct Settle {
    pub(super) queue: Arc<dyn DeliveryQueue>,
    pub(super) wakeup: Arc<Wakeup>,
}

#[async_trait]
impl ProcessBatch<Arc<Outcome>, Settled> for Settle {
    async fn process(&self, outcomes: &[Arc<Outcome>]) -> Result<Vec<Settled>, StoreError> {
        let attempts: Vec<&FinishedAttempt> = outcomes.iter().map(|outcome| &outcome.attempt).collect();
        let mut settled = self.queue.settle(&attempts).await.inspect_err(|error| {
            if error.passes() {
                warn!(
                    outcomes = outcomes.len(),
                    error = error.report(),
                    "outcomes cannot be written while the database is away; trying again"
                );
            }
        })?;
        // if this cannot be found out now, all of these outcomes stay in doubt
        let found_out = self.recognize_own(outcomes, &mut settled).await;
        found_out.map_err(|error| StoreError::InDoubt(error.cause().clone()))?;
        let mut retries = false;
        for (attempt, settled) in attempts.iter().zip(&settled) {
            if *settled == Settled::LeaseLost {
                continue;
            }
            if let Some(status) = attempt.verdict.final_status() {
                metrics::counter!("webhook_deliveries_total", "status" => status.as_str()).increment(1);
            }
            retries |= matches!(attempt.verdict, Verdict::RetryIn(_) | Verdict::Postponed);
        }
        if retries {
            self.wakeup.scheduled();
        }
        Ok(settled)
    }
}

impl Settle {
    /// A lease may be gone because an earlier, unanswered try to write the outcome succeeded. That is not a loss.
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
