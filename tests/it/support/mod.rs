//! What tests stand on.

pub mod cluster;
pub mod disk;
pub mod name_server;
pub mod postgres;
pub mod process;
pub mod raw_receiver;
pub mod receiver;
pub mod service;

use std::time::Duration;

/// How long a test waits for a state before it gives up. Generous: it only matters where something is broken.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Waits until `look` finds something, and returns it.
pub async fn eventually<T>(what: &str, look: impl AsyncFnMut() -> Option<T>) -> T {
    look_for(look).await.unwrap_or_else(|| panic!("waited in vain: {what}"))
}

/// Waits until `look` finds something, but no longer than [`PATIENCE`].
pub async fn look_for<T>(mut look: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let waiting = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.ok()
}
