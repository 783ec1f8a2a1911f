//! Wakes who waits for deliveries. Hints only: the polls are the truth.

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// Joins those who make deliveries ready with those who wait for them.
#[derive(Debug, Default)]
pub struct Wakeup {
    claimer: Notify,
    promoter: Notify,
    announcer: Notify,
}

impl Wakeup {
    /// Something was made ready here: wakes the claimer of this process, and lets other processes know.
    pub fn announce(&self) {
        self.claimer.notify_one();
        self.announcer.notify_one();
    }

    /// Something may be ready: wakes the claimer of this process.
    pub fn wake_claimer(&self) {
        self.claimer.notify_one();
    }

    /// Something was scheduled for later: the promoter looks when it is due.
    pub fn scheduled(&self) {
        self.promoter.notify_one();
    }

    /// Completes when the claimer should look. Arm it (`enable`), then look, then wait.
    pub fn woken(&self) -> Notified<'_> {
        self.claimer.notified()
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
