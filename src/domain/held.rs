//! Held deliveries: due, but not to be claimed. Counted by what holds them.

use std::time::Duration;

/// Deliveries that are due but may not be claimed, by what holds them. Each is counted once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Their config is disabled.
    pub paused: u64,
    /// Their config's circuit is open or half open.
    pub circuit_open: u64,
    /// `max_in_flight` or `rate_limit_per_second` of their config is exhausted.
    pub limited: u64,
    /// How long the oldest held delivery has been due; `None` if none is held.
    pub oldest_age: Option<Duration>,
}

/// Why a due delivery is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldBy {
    /// The config is disabled.
    PausedConfig,
    /// The circuit is open or half open.
    OpenCircuit,
    /// `max_in_flight` or `rate_limit_per_second` is exhausted.
    Limit,
}

impl Held {
    /// The number of held deliveries, whatever the reason.
    pub fn total(&self) -> u64 {
        self.paused + self.circuit_open + self.limited
    }

    /// Adds `count` deliveries. The oldest has been due for `age`.
    pub fn add(&mut self, by: HeldBy, count: u64, age: Option<Duration>) {
        match by {
            HeldBy::PausedConfig => self.paused += count,
            HeldBy::OpenCircuit => self.circuit_open += count,
            HeldBy::Limit => self.limited += count,
        }
        self.oldest_age = self.oldest_age.max(age);
    }
}
