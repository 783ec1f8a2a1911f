//! Keeps the private server running while a service uses it.

use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::{EmbeddedOptions, EmbeddedPostgres};
use crate::infrastructure::postgres::Database;

/// How often the private server is checked.
const CHECK_EVERY: Duration = Duration::from_secs(2);

/// Starts the server again whenever it has died, until `stop`.
pub(in crate::infrastructure) async fn keep_running(
    options: EmbeddedOptions,
    database: Database,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(CHECK_EVERY) => {}
        }
        if database.is_migrated().await.is_ok() {
            continue;
        }
        // if the server runs after all, this joins it
        let started = tokio::select! {
            () = stop.cancelled() => return,
            started = EmbeddedPostgres::start(&options) => started,
        };
        match started {
            // this process uses the server anyway, so this only releases the second hold
            Ok(second_hold) => match second_hold.stop().await {
                Ok(_) => warn!("the private PostgreSQL did not answer, and was started again if it had died"),
                Err(error) => {
                    warn!(error = format!("{error:#}"), "the private PostgreSQL is in a strange state");
                }
            },
            Err(error) => error!(
                error = format!("{error:#}"),
                "the private PostgreSQL has died and cannot be started; trying again"
            ),
        }
    }
}
