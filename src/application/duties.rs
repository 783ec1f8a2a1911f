//! Keeps track of failing duties: the work that a process repeats so that deliveries go on.
//!
//! A duty that keeps failing makes the process unready. It is logged, with ever longer pauses.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::backoff::Backoff;
use super::ports::StoreError;

/// Waits between two warnings about the same duty. A failure that ends before the first wait is over causes no warning.
const WARN_AGAIN: Backoff = Backoff::new(Duration::from_secs(10), Duration::from_mins(10));
/// A duty that has failed more than once, and for this long, keeps failing.
const KEEPS_FAILING_AFTER: Duration = Duration::from_secs(10);

/// The duties that fail at present.
#[derive(Debug, Default)]
pub struct Duties {
    failing: Mutex<BTreeMap<&'static str, Failing>>,
}

#[derive(Debug)]
struct Failing {
    since: Instant,
    failures: u32,
    error: String,
    warn_at: Instant,
    backoff: Backoff,
}

impl Failing {
    fn new(now: Instant) -> Self {
        let mut backoff = WARN_AGAIN;
        Self { since: now, failures: 0, error: String::new(), warn_at: now + backoff.pause(), backoff }
    }
}

impl Duties {
    /// Notes that the duty was done.
    pub fn done(&self, duty: &'static str) {
        if self.failing().remove(duty).is_some_and(|failing| failing.failures > 1) {
            info!(duty, "works again");
        }
    }

    /// Notes that the duty failed. The caller tries it again.
    pub fn failed(&self, duty: &'static str, cause: &StoreError) {
        let (mut all, now, error) = (self.failing(), Instant::now(), cause.report());
        let failing = all.entry(duty).or_insert_with(|| Failing::new(now));
        failing.failures += 1;
        let is_news = failing.failures == 1 && !cause.passes();
        if is_news || now >= failing.warn_at {
            let failing_for_s = (now - failing.since).as_secs();
            warn!(duty, error, failing_for_s, "failed, and is tried again");
            failing.warn_at = now + failing.backoff.pause();
        } else {
            debug!(duty, error, "failed, and is tried again");
        }
        failing.error = error;
    }

    /// The duties that keep failing, each with its last error.
    pub fn that_keep_failing(&self) -> Vec<(&'static str, String)> {
        let keeps_failing =
            |failing: &&Failing| failing.failures > 1 && failing.since.elapsed() >= KEEPS_FAILING_AFTER;
        let all = self.failing();
        let failing = all.iter().filter(|(_, failing)| keeps_failing(failing));
        failing.map(|(duty, failing)| (*duty, failing.error.clone())).collect()
    }

    fn failing(&self) -> MutexGuard<'_, BTreeMap<&'static str, Failing>> {
        // a panic elsewhere leaves plain data behind
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn backdate(duties: &Duties, duty: &'static str) {
        duties.failing().get_mut(duty).unwrap().since -= KEEPS_FAILING_AFTER;
    }

    #[test]
    fn a_duty_keeps_failing_if_it_failed_for_a_while_and_more_than_once_until_it_is_done() {
        let (duties, cause) =
            (Duties::default(), StoreError::Unexpected(Arc::new(anyhow::anyhow!("broken"))));
        duties.failed("promotion", &cause);
        duties.failed("statistics", &cause);
        assert_eq!(duties.that_keep_failing(), []);
        backdate(&duties, "promotion");
        assert_eq!(duties.that_keep_failing(), [], "it may have been an accident");
        duties.failed("promotion", &cause);
        assert_eq!(duties.that_keep_failing(), [("promotion", "the database refused: broken".to_owned())]);
        duties.done("promotion");
        assert_eq!(duties.that_keep_failing(), []);
    }
}
