//! The benchmark: measures what this machine can do, on a PostgreSQL of its own. It is not a test: no figure makes it fail.
//!
//! It is not part of the program that it measures. To measure a whole process, it starts the program that lies beside it; to
//! measure a single part, it calls the library.
//!
//! Different kinds of run take turns in rounds, so that other load on the machine affects all of them alike. Medians are
//! reported.

mod groups;
mod report;
mod rig;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, anyhow};
use chrono::Utc;
use clap::Parser;
use tikv_jemallocator::Jemalloc;
use webhook_processor::cli::block_on;
use webhook_processor::cli::output::{print_json, progress};
use webhook_processor::infrastructure::logs::log_to_stderr;
use webhook_processor::infrastructure::settings::Settings;
use webhook_processor::infrastructure::shutdown::stop_on_signal;

use crate::groups::Group;
use crate::groups::ceiling::{self, Ceiling};
use crate::groups::peers::Peer;
use crate::report::figures::{Section, Sections, rounded};
use crate::report::record;
use crate::rig::Rig;

/// The same as in the measured program, because workers also run in this one.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// Measures this machine: the sender, the queue, and both together, on a PostgreSQL of its own.
///
/// It measures the `webhook-processor` in its own directory; `cargo build --release` builds both.
#[derive(Parser)]
#[command(name = "webhook-processor-bench", version, about)]
pub struct BenchArgs {
    /// Print JSON instead of tables, for other programs.
    #[arg(long)]
    json: bool,
    /// Deliveries per run; larger and smaller runs scale with it.
    #[arg(long, default_value_t = 40_000, value_parser = clap::value_parser!(u32).range(1_000..))]
    deliveries: u32,
    /// Runs per kind; the median is reported.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The number of connections that enqueue at the same time.
    #[arg(long, default_value_t = 50)]
    connections: usize,
    /// Measure only these groups of figures, comma-separated; by default all except for soak and peers.
    #[arg(long, value_delimiter = ',', value_name = "GROUP")]
    only: Vec<Group>,
    /// Duration of the soak, in minutes.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    minutes: u32,
    /// Another queue to compare with; docs/benchmarks.md describes what the command must do. May be repeated.
    #[arg(long = "peer", value_name = "NAME=COMMAND")]
    peers: Vec<Peer>,
    /// The repository in which bench/figures.json, docs/benchmarks.md and its chart are written.
    #[arg(long, value_name = "DIR")]
    write: Option<PathBuf>,
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

fn main() -> ExitCode {
    match block_on(run(BenchArgs::parse())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("webhook-processor-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: BenchArgs) -> anyhow::Result<()> {
    let settings = Settings::load()?;
    let level = if std::env::var_os("LOG_LEVEL").is_some() { settings.log_level.as_str() } else { "warn" };
    log_to_stderr(level, settings.log_format)?;
    let stop = stop_on_signal()?;
    let runs: usize = args.groups().into_iter().map(|group| group.runs(&args)).sum();
    let runs = runs + if args.groups().contains(&Group::Drain) { 0 } else { ceiling::RUNS };
    let rig = Rig::start(&settings, progress(Some(runs as u64), "runs")).await?;
    let mut sections = Sections::new();
    let measured = tokio::select! {
        measured = measure(&rig, &args, &mut sections) => measured,
        () = stop.cancelled() => Err(anyhow!("stopped")),
    };
    rig.close().await?;

    // if a measurement fails, the figures before it are still shown
    if args.json {
        print_json(&sections)?;
    } else {
        let root = args.write.as_deref().unwrap_or(Path::new("."));
        report::print(&sections, &record::committed(root))?;
    }
    measured?;
    if let Some(root) = &args.write {
        record::write(root, sections)?;
    }
    Ok(())
}

async fn measure(rig: &Rig, args: &BenchArgs, sections: &mut Sections) -> anyhow::Result<()> {
    let versions = rig::machine::versions(rig).await?;
    let mut ceiling = None;
    for group in args.groups() {
        rig.bar.set_message(group.name());
        let (figures, remarks) = Box::pin(group.measure(rig, args))
            .await
            .with_context(|| format!("measuring {}", group.name()))?;
        // rates of different runs are compared relative to this ceiling
        let ceiling = match (ceiling, figures.iter().find(|figure| figure.name == ceiling::BOTH)) {
            (Some(known), _) => known,
            (None, Some(figure)) => *ceiling.insert(figure.value),
            (None, None) => *ceiling.insert(Ceiling::measure(rig, args.deliveries()).await?.both()),
        };
        let section = Section {
            date: Utc::now().format("%-d %B %Y").to_string(),
            machine: rig::machine::machine(),
            versions: versions.clone(),
            command: rig::machine::command(),
            ceiling: rounded(ceiling),
            figures,
            remarks,
        };
        sections.insert(group, section);
    }
    Ok(())
}
