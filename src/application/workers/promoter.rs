//! The promoter: one loop per process that makes scheduled deliveries ready when they are due.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::WorkerPool;
use crate::application::backoff::Backoff;

/// The name of this duty in logs and health checks.
const DUTY: &str = "making ready what is due";
/// How many deliveries one statement makes ready.
const PROMOTE_MAX: usize = 1_000;
/// The longest that the promoter sleeps. Deliveries that other processes scheduled are noticed at the latest then.
const PROMOTE_POLL: Duration = Duration::from_millis(500);

/// Waits after a promotion that failed.
const PROMOTE_BACKOFF: Backoff = Backoff::new(PROMOTE_POLL, Duration::from_secs(5));

impl WorkerPool {
    pub(super) async fn promote_what_is_due(self: Arc<Self>, stop: CancellationToken) {
        let mut backoff = PROMOTE_BACKOFF;
        loop {
            let rescheduled = self.wakeup.rescheduled();
            let mut rescheduled = pin!(rescheduled);
            rescheduled.as_mut().enable();
            let pause = match self.queue.promote(PROMOTE_MAX).await {
                Ok(promotion) => {
                    backoff.reset();
                    self.duties.done(DUTY);
                    if promotion.promoted > 0 {
                        debug!(deliveries = promotion.promoted, "made ready");
                        self.wakeup.announce();
                    }
                    promotion.next_due_in.unwrap_or(PROMOTE_POLL).min(PROMOTE_POLL)
                }
                Err(cause) => {
                    self.duties.failed(DUTY, &cause);
                    backoff.pause()
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = rescheduled => {}
                () = sleep(pause) => {}
            }
        }
    }
}
