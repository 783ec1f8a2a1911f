//! What tests stand on.

pub mod postgres;
pub mod process;
pub mod receiver;
pub mod service;

use std::time::Duration;

/// How long a test waits for a state before it gives up. Generous: it only matters where something is broken.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Waits until `look` finds something, and answers it.
pub async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let waiting = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("waited in vain: {what}"))
}
