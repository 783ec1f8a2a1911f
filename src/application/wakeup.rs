//! Wakes who waits for deliveries. Hints only: the polls are the truth.

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// Joins those who make deliveries ready with those who wait for them.
#[derive(Debug, Default)]
pub struct Wakeup {
    claimers: Notify,
    promoter: Notify,
    announcer: Notify,
}

impl Wakeup {
    /// Something was made ready here: wakes a claimer of this process, and lets other processes know.
    pub fn announce(&self) {
        self.claimers.notify_one();
        self.announcer.notify_one();
    }

    /// Something may be ready: wakes a claimer of this process. One that finds more than it can take wakes the next.
    pub fn wake_claimer(&self) {
        self.claimers.notify_one();
    }

    /// Something was scheduled for later: the promoter looks when it is due.
    pub fn scheduled(&self) {
        self.promoter.notify_one();
    }

    /// Completes when a claimer should look. Arm it (`enable`), then look, then wait.
    pub fn woken(&self) -> Notified<'_> {
        self.claimers.notified()
    }

    /// Completes when the promoter should look.
    pub fn rescheduled(&self) -> Notified<'_> {
        self.promoter.notified()
    }

    /// Completes when something was made ready here since the last time.
    pub fn announced(&self) -> Notified<'_> {
        self.announcer.notified()
    }
}
