//! What goes wrong in a run, and when: decided by its seed alone.

use std::fmt;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

/// How many processes serve.
pub const PROCESSES: usize = 3;

/// One kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9`, and a new process a second later.
    Kill { process: usize },
    /// SIGTERM, and a new process.
    Stop { process: usize },
    /// SIGSTOP for so long.
    Pause { process: usize, length: Duration },
    /// The server is ended at once and started again.
    RestartDatabase,
    /// All sessions of the service are ended.
    EndSessions,
    /// The queue is locked for so long.
    LockQueue { length: Duration },
    /// The service may not connect for so long; its sessions are ended.
    WithdrawAccess { length: Duration },
    /// The service gets no more than two connections for so long; its sessions are ended.
    NoConnections { length: Duration },
    /// Commits wait for a replica that is not there.
    StallCommits { length: Duration },
    /// Connections to the database carry nothing for so long, and are cut then.
    StallDatabase { length: Duration },
    /// Connections to the database are cut.
    CutDatabase,
    /// What the database answers is lost, and connections are cut then: commits happen, and nobody learns of it.
    SwallowAnswers { length: Duration },
    /// Connections to the receiver carry nothing for so long, and are cut then.
    StallReceiver { length: Duration },
    /// Connections to the receiver are cut.
    CutReceiver,
    /// What the receiver answers is lost, and connections are cut then.
    SwallowReceipts { length: Duration },
}

impl Fault {
    fn random(rng: &mut StdRng) -> Self {
        let process = rng.random_range(0..PROCESSES);
        let mut millis = |from, to| Duration::from_millis(rng.random_range(from..to));
        let (short, long) = (millis(200, 4_000), millis(1_000, 9_000));
        match rng.random_range(0..18) {
            0 | 1 => Self::Kill { process },
            2 => Self::Stop { process },
            3 => Self::Pause { process, length: short },
            // longer than a lease
            4 => Self::Pause { process, length: Duration::from_secs(18) },
            5 => Self::RestartDatabase,
            6 => Self::EndSessions,
            7 => Self::LockQueue { length: long },
            8 => Self::WithdrawAccess { length: long },
            9 => Self::NoConnections { length: long },
            10 => Self::StallCommits { length: long },
            11 => Self::StallDatabase { length: long },
            12 => Self::CutDatabase,
            13 | 14 => Self::SwallowAnswers { length: short },
            15 => Self::StallReceiver { length: short },
            16 => Self::CutReceiver,
            _ => Self::SwallowReceipts { length: short },
        }
    }

    /// Whether an answer of the receiver may be lost for good by it: with its process, or on its way.
    pub fn may_lose_answers(self) -> bool {
        match self {
            Self::Kill { .. }
            | Self::CutReceiver
            | Self::StallReceiver { .. }
            | Self::SwallowReceipts { .. } => true,
            // the lease may end before the process goes on
            Self::Pause { length, .. } => length >= Duration::from_secs(10),
            Self::Stop { .. }
            | Self::RestartDatabase
            | Self::EndSessions
            | Self::LockQueue { .. }
            | Self::WithdrawAccess { .. }
            | Self::NoConnections { .. }
            | Self::StallCommits { .. }
            | Self::StallDatabase { .. }
            | Self::CutDatabase
            | Self::SwallowAnswers { .. } => false,
        }
    }
}

/// The faults of a run.
#[derive(Debug)]
pub struct Plan {
    /// Each after so long.
    pub faults: Vec<(Duration, Fault)>,
}

impl Plan {
    /// The plan of a seed.
    pub fn of(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let count = rng.random_range(4..=8);
        let mut faults: Vec<_> = (0..count)
            .map(|_| (Duration::from_millis(rng.random_range(1_500..12_000)), Fault::random(&mut rng)))
            .collect();
        faults.sort_by_key(|(at, _)| *at);
        Self { faults }
    }

    /// For how long events come in.
    pub fn length(&self) -> Duration {
        let last = self.faults.last().map_or(Duration::ZERO, |(at, _)| *at);
        last + Duration::from_secs(3)
    }

    /// Whether the plan has a fault after which nobody may know how an attempt ended.
    pub fn may_lose_answers(&self) -> bool {
        self.faults.iter().any(|(_, fault)| fault.may_lose_answers())
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (at, fault)) in self.faults.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{:.1} s {fault:?}", at.as_secs_f32())?;
        }
        Ok(())
    }
}
