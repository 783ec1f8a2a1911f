//! Finds out why a pool has no connection, by a direct connection now and then.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use super::access::Access;
use super::pool::ACQUIRE_LIMIT;

/// The shortest time between two looks for the reason why there is no connection.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// How long a reason is shown after it was found.
const REASON_HOLDS: Duration = Duration::from_secs(20);

/// Why there is no connection.
#[derive(Debug)]
pub(super) struct Reason {
    access: Access,
    found: Mutex<Finding>,
}

#[derive(Debug, Default)]
struct Finding {
    asked_at: Option<Instant>,
    sentence: Option<(Instant, String)>,
}

impl Reason {
    pub(super) fn new(access: Access) -> Arc<Self> {
        Arc::new(Self { access, found: Mutex::default() })
    }

    /// The last reason, if it was found in the last 20 seconds.
    pub(super) fn recent(&self) -> Option<String> {
        let found = self.found();
        let recent = found.sentence.as_ref().filter(|(at, _)| at.elapsed() < REASON_HOLDS);
        recent.map(|(_, sentence)| sentence.clone())
    }

    /// Remembers a reason that was found here or elsewhere.
    pub(super) fn remember(&self, sentence: String) {
        let now = Instant::now();
        *self.found() = Finding { asked_at: Some(now), sentence: Some((now, sentence)) };
    }

    /// Looks for the reason and logs it, unless that was done a moment ago.
    pub(super) fn find_out(self: &Arc<Self>, connections_max: u32) {
        {
            let mut found = self.found();
            if found.asked_at.is_some_and(|at| at.elapsed() < ASK_EVERY) {
                return;
            }
            found.asked_at = Some(Instant::now());
        }
        let this = self.clone();
        tokio::spawn(async move {
            let sentence = match this.access.try_to_connect().await {
                Err(trouble) => trouble.to_string(),
                Ok(()) => format!(
                    "no connection became free within {ACQUIRE_LIMIT:?}: all {connections_max} of a pool are in use, or were lost a \
                     moment ago; see webhook_pool_connections, DATABASE_MAX_CONNECTIONS, and what keeps the database busy"
                ),
            };
            warn!("{sentence}");
            this.remember(sentence);
        });
    }

    fn found(&self) -> MutexGuard<'_, Finding> {
        // a panic elsewhere leaves plain data behind
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
