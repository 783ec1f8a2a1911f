//! Signals: the first asks the service to finish what is under way, the second ends the process at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

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
        let name = next().await;
        warn!(signal = name, "stopped at once; what was under way is attempted again when its lease ends");
        std::process::exit(EXIT_ABORTED);
    });
    Ok(stop)
}
