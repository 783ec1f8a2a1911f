//! Records losses: attempts whose workers never reported how they ended.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::WorkerPool;
use super::restart::jittered;
use crate::domain::delivery::LeasedDelivery;

/// The name of this duty in logs and health checks.
const DUTY: &str = "recording losses of held configs";
/// How often the process looks for expired leases of held endpoints (disabled, or with a circuit that is not closed).
pub(super) const HELD_POLL: Duration = Duration::from_mins(2);
/// The wait before a loss is recorded. The worker may still know the outcome, if it could not write it while the store stood
/// still. Settles are tried again within two seconds.
const LOSS_GRACE: Duration = Duration::from_secs(3);
/// The wait if the loss ends the delivery: an outcome that becomes known after that could not be written.
const LAST_LOSS_GRACE: Duration = Duration::from_secs(10);

impl WorkerPool {
    /// Records after a while that the outcome of an attempt is unknown, unless it has become known. No slot is held meanwhile:
    /// there are never more of these tasks than leases of lost workers.
    pub(super) fn record_loss_soon(self: &Arc<Self>, delivery: LeasedDelivery) {
        let workers = self.clone();
        let grace = if delivery.attempt < delivery.max_retries { LOSS_GRACE } else { LAST_LOSS_GRACE };
        self.losses.spawn(async move {
            tokio::select! {
                () = workers.stop.cancelled() => {}
                () = sleep(grace) => {}
            }
            workers.deliver.work(delivery).await;
        });
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
