//! Other queues at the same work: the same receiver, the same payload, the same server of PostgreSQL, in turn with ours.
//!
//! A peer is a command. It finds `DATABASE_URL` (an empty database of its own), `RECEIVER_URL` (what to GET for each
//! job) and `DELIVERIES` in its environment, enqueues, prints `ready`, waits for a line on its standard input, drains,
//! and prints what it is and how long that took as one line of JSON.

use std::fs::File;
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::drain::drain_fresh;
use crate::BenchArgs;
use crate::report::figures::{Figure, Samples, Unit, float};
use crate::rig::Rig;
use crate::rig::payload::new_delivery;

/// How long a peer may take, from its start to its end.
const RUN_MAX: Duration = Duration::from_mins(10);
/// Our rate among those of the peers.
pub const OURS: &str = "webhook-processor";
/// Before the name of a peer: our rate against its.
const AGAINST: &str = "ours against ";
/// What our rate is to be, against those of these.
const GOALS: [(&str, f64); 3] = [("graphile-worker", 1.3), ("bullmq", 2.0), ("pg-boss", 3.5)];

/// `NAME=COMMAND`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    name: String,
    command: String,
}

impl FromStr for Peer {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((name, command)) if !name.is_empty() && !command.is_empty() => {
                Ok(Self { name: name.to_owned(), command: command.to_owned() })
            }
            _ => Err("must be NAME=COMMAND"),
        }
    }
}

/// What a peer says of its run.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Report {
    /// With its version.
    peer: String,
    settings: String,
    deliveries: usize,
    seconds: f64,
}

pub fn runs(args: &BenchArgs) -> usize {
    (1 + args.peers.len()) * args.rounds()
}

/// The figures, and what the peers say of themselves.
pub async fn measure(rig: &Rig, args: &BenchArgs) -> anyhow::Result<(Vec<Figure>, Vec<String>)> {
    ensure!(!args.peers.is_empty(), "name peers by --peer NAME=COMMAND");
    let mut samples = Samples::default();
    let mut remarks: Vec<String> = Vec::new();
    for _ in 0..args.rounds() {
        let ours = drain_fresh(rig, args.deliveries()).await?;
        samples.add(OURS, Unit::PerSecond, ours);
        for peer in &args.peers {
            let report =
                run(rig, peer, args.deliveries()).await.with_context(|| format!("the peer {}", peer.name))?;
            rig.bar.inc(1);
            let rate = float(report.deliveries) / report.seconds;
            samples.add(peer.name.as_str(), Unit::PerSecond, rate);
            samples.add(format!("{AGAINST}{}", peer.name), Unit::Ratio, ours / rate);
            let remark = format!("{}: {}", report.peer, report.settings);
            if !remarks.contains(&remark) {
                remarks.push(remark);
            }
        }
    }
    let figures = samples.into_figures(|figure| {
        let peer = figure.name.strip_prefix(AGAINST);
        match GOALS.iter().find(|(name, _)| peer == Some(name)) {
            Some((_, goal)) => figure.at_least(*goal),
            None => figure,
        }
    });
    Ok((figures, remarks))
}

async fn run(rig: &Rig, peer: &Peer, deliveries: usize) -> anyhow::Result<Report> {
    let database = rig.create_database("").await?;
    let received = rig.receiver.received().await?;
    let log = rig.file("peer.log");
    let mut command = Command::new("sh");
    command.args(["-c", &peer.command]);
    command.env("DATABASE_URL", rig.url(&database));
    // as ours are delivered, with the same parameters
    command.env("RECEIVER_URL", new_delivery(&rig.endpoint).webhook_url);
    command.env("DELIVERIES", deliveries.to_string());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&log)?);
    let mut process = Process(command.process_group(0).spawn().context("starting it")?);
    let ended = timeout(RUN_MAX, process.converse()).await;
    drop(process);
    let report = match ended.unwrap_or_else(|_| bail!("it has not ended after {} s", RUN_MAX.as_secs())) {
        Ok(report) => report,
        Err(error) => bail!("{error:#}\n{}", std::fs::read_to_string(log)?.trim()),
    };
    rig.drop_database(&database).await?;
    let received = rig.receiver.received().await? - received;
    ensure!(report.deliveries == deliveries, "it reports {} deliveries, not {deliveries}", report.deliveries);
    ensure!(received >= deliveries as u64, "the receiver got {received} requests of {deliveries}");
    ensure!(report.seconds > 0.0, "it reports no time");
    Ok(report)
}

/// A peer at work, with all the processes that it starts.
struct Process(Child);

impl Process {
    async fn converse(&mut self) -> anyhow::Result<Report> {
        let mut lines = BufReader::new(self.0.stdout.take().expect("it is piped")).lines();
        let ready = lines.next_line().await?.unwrap_or_default();
        ensure!(ready == "ready", "it says {ready:?} instead of \"ready\"");
        let mut input = self.0.stdin.take().expect("it is piped");
        input.write_all(b"go\n").await?;
        let report = lines.next_line().await?.context("it ended without a report")?;
        let report = serde_json::from_str(&report).with_context(|| format!("its report is {report:?}"))?;
        let status = self.0.wait().await?;
        ensure!(status.success(), "it ended with {status}");
        Ok(report)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let id = self.0.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(id) = id {
            // all of it may have ended already
            let _ = kill_process_group(id, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_a_name_and_a_command() {
        let peer: Peer = "pg-boss=FAST=1 node bench/peers/pg-boss.mjs".parse().unwrap();
        assert_eq!(
            (peer.name.as_str(), peer.command.as_str()),
            ("pg-boss", "FAST=1 node bench/peers/pg-boss.mjs")
        );
        assert!("pg-boss".parse::<Peer>().is_err());
        assert!("=x".parse::<Peer>().is_err());
    }
}
