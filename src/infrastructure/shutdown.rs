//! Signals: the first one asks the service to finish its attempts, the second one ends the process at once.

use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// A signal that follows within this time counts as the same request.
const SAME_REQUEST: Duration = Duration::from_millis(500);
/// The exit code of a process that a second signal ended.
const EXIT_ABORTED: i32 = 130;

/// A token that is cancelled by SIGTERM or SIGINT.
pub fn stop_on_signal() -> anyhow::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        let mut next =
            async || tokio::select! { _ = terminate.recv() => "SIGTERM", _ = interrupt.recv() => "SIGINT" };
        let name = next().await;
        info!(signal = name, "stopping: attempts under way may end; a second signal ends them");
        token.cancel();
        // some programs send the same signal twice in a row, to the process and to its group
        let asked = Instant::now();
        let name = loop {
            let name = next().await;
            if asked.elapsed() >= SAME_REQUEST {
                break name;
            }
        };
        warn!(signal = name, "stopped at once; what was under way is attempted again when its lease ends");
        std::process::exit(EXIT_ABORTED);
    });
    Ok(stop)
}
