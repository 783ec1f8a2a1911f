//! Losses: attempts whose workers never reported how they ended.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::WorkerPool;
use super::restart::jittered;
use crate::domain::delivery::LeasedDelivery;

/// What this is called in logs and health checks.
const DUTY: &str = "recording losses of held configs";
/// How often leases are looked for that have expired at endpoints that are disabled, or whose circuit is not closed.
pub(super) const HELD_POLL: Duration = Duration::from_mins(2);
/// How long a loss is kept back before it is recorded: the worker that was thought lost may know the outcome after all, and
/// could not write it while the store stood still. Settles are tried again within two seconds.
const LOSS_GRACE: Duration = Duration::from_secs(3);
/// The same where the loss ends the delivery: what is known later could not be written any more.
const LAST_LOSS_GRACE: Duration = Duration::from_secs(10);

impl WorkerPool {
    /// Records that the outcome of an attempt is unknown, unless it becomes known within a while. No slot is held meanwhile:
    /// there are never more of these than leases of workers that were lost.
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

    /// Nothing claims from an endpoint that is held, so the leases that expire there are settled here.
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
