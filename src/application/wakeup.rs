//! Wakes the loops that wait for deliveries. A wakeup is only a hint: polls find what it missed.

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// Connects the code that makes deliveries ready with the loops that wait for them.
#[derive(Debug, Default)]
pub struct Wakeup {
    claimer: Notify,
    promoter: Notify,
    announcer: Notify,
}

impl Wakeup {
    /// Something was made ready here. Wakes the claimer of this process and notifies other processes.
    pub fn announce(&self) {
        self.claimer.notify_one();
        self.announcer.notify_one();
    }

    /// Something may be ready. Wakes the claimer of this process.
    pub fn wake_claimer(&self) {
        self.claimer.notify_one();
    }

    /// Something was scheduled for later. Wakes the promoter, which looks up when it is due.
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

    /// Completes when something was made ready here since the last call.
    pub fn announced(&self) -> Notified<'_> {
        self.announcer.notified()
    }
}
