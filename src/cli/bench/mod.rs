//! `webhook-processor bench`: what this machine can do, part by part and together, on a PostgreSQL of its own. Not a
//! test: it fails nothing.
//!
//! Runs take turns in rounds, so that what else happens on the machine meets all kinds of run alike; medians are told.

mod drain;
mod enqueue;
mod figures;
mod latency;
mod load;
mod program;
mod rig;
mod scale;

use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use self::drain::Ceiling;
use self::figures::{Figure, Section, Sections, Unit};
use self::rig::Rig;
use super::output::{print_json, progress, say, table};
use crate::infrastructure::settings::Settings;

#[derive(Args)]
pub struct BenchArgs {
    /// Deliveries of each run.
    #[arg(long, default_value_t = 40_000)]
    deliveries: usize,
    /// Runs of each kind; their median is told.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Connections that enqueue at the same time.
    #[arg(long, default_value_t = 50)]
    connections: usize,
    /// Only these groups of figures; by default all but soak and peers.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Group>,
}

/// Figures that are measured together, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// The whole against its ceiling.
    Drain,
    /// Accepting events, one by one and many.
    Enqueue,
    /// From the call to the request, alone and beside a bad neighbour.
    Latency,
    /// The drain with much of something.
    Scale,
}

impl Group {
    /// How many runs its progress counts.
    fn runs(self, args: &BenchArgs) -> usize {
        match self {
            Self::Drain => drain::RUNS * args.rounds,
            Self::Enqueue => enqueue::RUNS * args.rounds,
            Self::Latency => latency::RUNS * args.rounds,
            Self::Scale => scale::LOADS + scale::RUNS * args.rounds,
        }
    }

    async fn measure(self, rig: &Rig, args: &BenchArgs) -> anyhow::Result<Vec<Figure>> {
        match self {
            Self::Drain => drain::measure(rig, args).await,
            Self::Enqueue => enqueue::measure(rig, args).await,
            Self::Latency => latency::measure(rig, args).await,
            Self::Scale => scale::measure(rig, args).await,
        }
    }
}

pub async fn run(
    args: BenchArgs,
    settings: &Settings,
    stop: CancellationToken,
    json: bool,
) -> anyhow::Result<()> {
    let groups = if args.only.is_empty() { vec![Group::Drain, Group::Enqueue] } else { args.only.clone() };
    let runs: usize = groups.iter().map(|group| group.runs(&args)).sum();
    let rig = Rig::start(settings, progress(Some(runs as u64), "runs")).await?;
    for group in groups {
        let figures = tokio::select! {
            figures = group.measure(&rig, &args) => figures?,
            () = stop.cancelled() => bail!("stopped"),
        };
        for f in figures { println!("{} {} {} {:?}", f.name, f.unit.write(f.value), f.goal_text(), f.is_met()); }
    }
    rig.close().await
}
