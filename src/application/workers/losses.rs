//! Records losses: attempts whose workers never reported how they ended.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::WorkerPool;
use super::lost_answers::LOOK_AGAIN_MAX;
use super::restart::jittered;
use crate::domain::delivery::LeasedDelivery;

/// The name of this duty in logs and health checks.
const DUTY: &str = "recording losses of held configs";
/// How often the process looks for expired leases of held endpoints (disabled, or with a circuit that is not closed).
pub(super) const HELD_POLL: Duration = Duration::from_mins(2);
/// The wait before a loss is recorded. The worker may still know the outcome, if it could not write it while the store stood
/// still; settles are tried again within two seconds. Or no attempt was made, because the answer that granted the lease was lost;
/// then the next look gives the lease back.
const LOSS_GRACE: Duration = Duration::from_secs(6);
const _: () = assert!(LOSS_GRACE.as_millis() > LOOK_AGAIN_MAX.as_millis());
/// The wait if the loss ends the delivery: an outcome that becomes known after that could not be written.
const LAST_LOSS_GRACE: Duration = Duration::from_secs(10);

impl WorkerPool {
    /// Records after a while that the outcome of an attempt is unknown, unless it has become known. No slot is held meanwhile:
    /// there are never more of these tasks than leases of lost workers.
    pub(super) fn record_loss_soon(self: &Arc<Self>, delivery: LeasedDelivery) {
        let workers = self.clone();
        self.losses.spawn(async move {
            if workers.outcome_could_be_written(&delivery).await {
                workers.deliver.work(delivery).await;
            }
        });
    }

    /// Waits until a worker that knows the outcome would have written it. Returns `false` if that was not possible until the lease
    /// of the takeover ended, or until the process stops; then the loss is left to the next takeover. A loss may be written
    /// although an outcome is not: on a full disk, a row that is changed finds room in its page, and an archive cannot grow.
    async fn outcome_could_be_written(&self, delivery: &LeasedDelivery) -> bool {
        let grace = if delivery.attempt < delivery.max_retries { LOSS_GRACE } else { LAST_LOSS_GRACE };
        let (mut before, mut waits) = (self.queue.can_settle().await, false);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = sleep(grace) => {}
            }
            let now = self.queue.can_settle().await;
            if before.is_ok() && now.is_ok() {
                return true;
            }
            if let Err(cause) = &now
                && !waits
            {
                waits = true;
                info!(queue_id = %delivery.queue_id, error = cause.report(),
                    "an attempt's loss is not recorded while its outcome could not be written either");
            }
            let lease_is_over = delivery.claimed_at.elapsed() >= self.settings.lease_term;
            if lease_is_over || now.is_err() && self.stop.is_cancelled() {
                return false;
            }
            before = now;
        }
    }

    /// Settles the leases that expire at held endpoints, which claims skip.
    pub(super) async fn record_held_losses(self: Arc<Self>, stop: CancellationToken) {
        let limit = self.settings.batch_size;
        while let Some(worker) = self.slots.first_worker() {
            match self.queue.take_over_held(&worker, self.settings.lease_term, limit).await {
                Ok(lost) => {
                    self.duties.done(DUTY);
                    let more_may_wait = !lost.is_empty() && !stop.is_cancelled();
                    for delivery in lost {
                        self.record_loss_soon(delivery);
                    }
                    if more_may_wait {
                        continue;
                    }
                }
                Err(cause) => self.duties.failed(DUTY, &cause),
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(jittered(HELD_POLL)) => {}
            }
        }
    }
}
