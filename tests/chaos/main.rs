//! `make chaos`: several processes, thousands of events, and faults at random. Afterwards the receiver's log and the audit must
//! agree, and nothing that was acknowledged may be missing.
//!
//! A seed decides which faults come when. It is printed, and `SEEDS=7` plays seed 7 again.

mod audit;
mod faults;
mod load;
mod proxy;
mod receiver;
mod rig;

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rand::RngExt as _;

use self::faults::Plan;
use self::rig::Rig;

/// How long a run may take to become quiet after its last fault: all leases have ended then, and all retries are made.
const QUIET_WITHIN: Duration = Duration::from_mins(4);

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run_all())
}

async fn run_all() -> anyhow::Result<()> {
    let limit = match std::env::var("MINUTES") {
        Ok(minutes) => Some(Duration::from_mins(minutes.parse().context("MINUTES must be a number")?)),
        Err(_) => None,
    };
    let seeds = match std::env::var("SEEDS") {
        Ok(seeds) => seeds
            .split([',', ' '])
            .filter(|seed| !seed.is_empty())
            .map(|seed| seed.parse().with_context(|| format!("SEEDS: {seed:?} is no number")))
            .collect::<anyhow::Result<Vec<u64>>>()?,
        Err(_) => (1..=10).collect(),
    };
    let begun = Instant::now();
    let random = std::iter::from_fn(|| Some(rand::rng().random::<u32>().into()));
    let seeds: Box<dyn Iterator<Item = u64>> = match limit {
        Some(_) => Box::new(random),
        None => Box::new(seeds.into_iter()),
    };
    let (mut runs, mut total, mut failed) = (0, audit::Figures::default(), Vec::new());
    for seed in seeds {
        if limit.is_some_and(|limit| begun.elapsed() >= limit) {
            break;
        }
        runs += 1;
        match run(seed).await {
            Ok(figures) => total += figures,
            Err(error) => {
                println!("  BROKEN: {error:#}");
                failed.push(seed);
            }
        }
    }
    println!("{runs} seeds in {:.0} s: {total}", begun.elapsed().as_secs_f64());
    ensure!(failed.is_empty(), "promises were broken; play them again with SEEDS={failed:?}");
    Ok(())
}

/// One run. Its files stay where they are if it fails.
async fn run(seed: u64) -> anyhow::Result<audit::Figures> {
    let plan = Plan::of(seed);
    println!("seed {seed}: {plan}");
    let begun = Instant::now();
    let rig = Rig::start(seed).await.context("starting")?;
    let sampling = rig.sample_audit();
    let sent = tokio::spawn(load::send(rig.addresses(), rig.config_id, plan.length()));
    let figures = async {
        rig.suffer(&plan).await?;
        rig.heal().await?;
        let sent = sent.await?;
        rig.wait_until_quiet(QUIET_WITHIN).await?;
        rig.check(&plan, &sent, sampling.finish().await?).await
    };
    match figures.await {
        Ok(figures) => {
            rig.remove().await?;
            println!("  {:.0} s: {figures}", begun.elapsed().as_secs_f64());
            Ok(figures)
        }
        Err(error) => Err(error.context(format!("logs and data are kept in {}", rig.keep().display()))),
    }
}
