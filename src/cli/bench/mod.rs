//! `webhook-processor bench`: what this machine can do, part by part and together, on a PostgreSQL of its own. Not a
//! test: it fails nothing.
//!
//! Runs take turns in rounds, so that what else happens on the machine meets all kinds of run alike; medians are told.

mod chart;
mod drain;
mod enqueue;
mod figures;
mod latency;
mod load;
mod machine;
mod memory;
mod peers;
mod program;
mod report;
mod rig;
mod scale;
mod soak;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use chrono::Utc;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use self::drain::Ceiling;
use self::figures::{Figure, Section, Sections};
use self::peers::Peer;
use self::rig::Rig;
use super::output::{print_json, progress};
use crate::infrastructure::settings::Settings;

#[derive(Args)]
pub struct BenchArgs {
    /// Deliveries of each run; what is larger or smaller is a multiple of it.
    #[arg(long, default_value_t = 40_000, value_parser = clap::value_parser!(u32).range(1_000..))]
    deliveries: u32,
    /// Runs of each kind; their median is told.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Connections that enqueue at the same time.
    #[arg(long, default_value_t = 50)]
    connections: usize,
    /// Only these groups of figures, comma-separated; by default all but soak and peers.
    #[arg(long, value_delimiter = ',', value_name = "GROUP")]
    only: Vec<Group>,
    /// How long the soak lasts.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    minutes: u32,
    /// Another queue to measure beside ours; docs/benchmarks.md tells what the command must do. May be repeated.
    #[arg(long = "peer", value_name = "NAME=COMMAND")]
    peers: Vec<Peer>,
    /// The repository in which to write bench/figures.json, docs/benchmarks.md and its chart.
    #[arg(long, value_name = "DIR")]
    write: Option<PathBuf>,
}

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
    const DEFAULT: [Self; 5] = [Self::Drain, Self::Enqueue, Self::Latency, Self::Scale, Self::Memory];

    /// How many runs its progress counts.
    fn runs(self, args: &BenchArgs) -> usize {
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
    async fn measure(self, rig: &Rig, args: &BenchArgs) -> anyhow::Result<(Vec<Figure>, Vec<String>)> {
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
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

impl BenchArgs {
    fn groups(&self) -> Vec<Group> {
        let mut groups = if self.only.is_empty() { Group::DEFAULT.to_vec() } else { self.only.clone() };
        groups.sort_unstable();
        groups.dedup();
        groups
    }

    fn deliveries(&self) -> usize {
        self.deliveries as usize
    }

    fn rounds(&self) -> usize {
        self.rounds as usize
    }

    fn minutes(&self) -> usize {
        self.minutes as usize
    }
}

pub async fn run(
    args: BenchArgs,
    settings: &Settings,
    stop: CancellationToken,
    json: bool,
) -> anyhow::Result<()> {
    let runs: usize = args.groups().into_iter().map(|group| group.runs(&args)).sum();
    let runs = runs + if args.groups().contains(&Group::Drain) { 0 } else { drain::CEILING_RUNS };
    let rig = Rig::start(settings, progress(Some(runs as u64), "runs")).await?;
    let mut sections = Sections::new();
    let measured = tokio::select! {
        measured = measure(&rig, &args, &mut sections) => measured,
        () = stop.cancelled() => Err(anyhow!("stopped")),
    };
    rig.close().await?;

    // what was measured before something failed is told all the same
    if json {
        print_json(&sections)?;
    } else {
        let root = args.write.as_deref().unwrap_or(Path::new("."));
        report::print(&sections, &report::committed(root))?;
    }
    measured?;
    if let Some(root) = &args.write {
        report::write(root, sections)?;
    }
    Ok(())
}

async fn measure(rig: &Rig, args: &BenchArgs, sections: &mut Sections) -> anyhow::Result<()> {
    let versions = machine::versions(rig).await?;
    let mut ceiling = None;
    for group in args.groups() {
        rig.bar.set_message(group.name());
        let (figures, remarks) = Box::pin(group.measure(rig, args))
            .await
            .with_context(|| format!("measuring {}", group.name()))?;
        // what rates are compared by, from one run to the next
        let ceiling = match (ceiling, figures.iter().find(|figure| figure.name == drain::CEILING)) {
            (Some(known), _) => known,
            (None, Some(figure)) => *ceiling.insert(figure.value),
            (None, None) => *ceiling.insert(Ceiling::measure(rig, args.deliveries()).await?.both()),
        };
        let section = Section {
            date: Utc::now().format("%-d %B %Y").to_string(),
            machine: machine::machine(),
            versions: versions.clone(),
            command: machine::command(),
            ceiling: figures::rounded(ceiling),
            figures,
            remarks,
        };
        sections.insert(group, section);
    }
    Ok(())
}
