//! The groups of figures, one file for each: its runs, its goals.

pub mod ceiling;
mod drain;
mod enqueue;
mod latency;
mod memory;
pub mod peers;
mod scale;
mod soak;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::BenchArgs;
use crate::report::figures::Figure;
use crate::rig::Rig;

/// Figures that are measured together, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// Claim, GET, settle and audit, against their ceiling
    Drain,
    /// Accepting events, one by one and in streams, against plain inserts
    Enqueue,
    /// From the call to the request, alone and beside an endpoint that never answers
    Latency,
    /// The drain with much of something: history, schedules, endpoints, processes
    Scale,
    /// Resident memory under load
    Memory,
    /// Half the drain rate for many minutes
    Soak,
    /// Other queues, named by --peer
    Peers,
}

impl Group {
    /// All that need neither much time nor other programs.
    pub const DEFAULT: [Self; 5] = [Self::Drain, Self::Enqueue, Self::Latency, Self::Scale, Self::Memory];

    /// How many runs its progress counts.
    pub fn runs(self, args: &BenchArgs) -> usize {
        match self {
            Self::Drain => drain::RUNS * args.rounds(),
            Self::Enqueue => enqueue::RUNS * args.rounds(),
            Self::Latency => latency::RUNS * args.rounds(),
            Self::Scale => scale::LOADS + scale::RUNS * args.rounds(),
            Self::Memory => memory::RUNS * args.rounds(),
            Self::Soak => soak::runs(args),
            Self::Peers => peers::runs(args),
        }
    }

    /// The figures, and what else is to be said of them.
    pub async fn measure(self, rig: &Rig, args: &BenchArgs) -> anyhow::Result<(Vec<Figure>, Vec<String>)> {
        let figures = match self {
            Self::Drain => drain::measure(rig, args).await?,
            Self::Enqueue => enqueue::measure(rig, args).await?,
            Self::Latency => latency::measure(rig, args).await?,
            Self::Scale => scale::measure(rig, args).await?,
            Self::Memory => memory::measure(rig, args).await?,
            Self::Soak => soak::measure(rig, args).await?,
            Self::Peers => return peers::measure(rig, args).await,
        };
        Ok((figures, vec![]))
    }

    /// As the command line names it.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}
