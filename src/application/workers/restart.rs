//! Restarts loops that panic.

use std::time::Duration;

use rand::RngExt as _;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::error;

/// The wait before a loop that panicked is restarted.
const AFTER_PANIC: Duration = Duration::from_secs(1);

/// Runs a loop until it ends, and restarts it when it panics. Otherwise the process would go on without this loop, and
/// nobody would notice.
pub(super) async fn again_after_panics<F>(stop: &CancellationToken, mut begin: impl FnMut() -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    while let Err(cause) = tokio::spawn(begin()).await {
        error!(error = %cause, "a part of the workers ended unexpectedly; it begins again");
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(AFTER_PANIC) => {}
        }
    }
}

/// Makes a pause up to a tenth longer or shorter, so that processes do not fall into step.
pub(super) fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.9..1.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_loop_that_panics_begins_again() {
        let mut begun = 0;
        again_after_panics(&CancellationToken::new(), || {
            begun += 1;
            let panics = begun == 1;
            async move { assert!(!panics, "on purpose") }
        })
        .await;
        assert_eq!(begun, 2);
    }

    #[tokio::test]
    async fn a_loop_that_panicked_does_not_begin_again_once_the_process_stops() {
        let (stop, mut begun) = (CancellationToken::new(), 0);
        stop.cancel();
        again_after_panics(&stop, || {
            begun += 1;
            async { panic!("on purpose") }
        })
        .await;
        assert_eq!(begun, 1);
    }
}
