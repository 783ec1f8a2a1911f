//! Processes of `webhook-processor`, as they run in production; killed when they go out of scope.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::load::Connection;
use super::store::Store;

/// How long a process may take to start.
const START_MAX: Duration = Duration::from_secs(30);

pub struct Program {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Program {
    /// A receiver, which says where it listens.
    pub fn receiver() -> anyhow::Result<Self> {
        let mut command = command(&["receiver", "--port", "0", "--quiet"])?;
        let mut child = command.stdout(Stdio::piped()).spawn().context("starting a receiver")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("it is piped")).read_line(&mut line)?;
        let address = line.trim().strip_prefix("listening on http://");
        let address = address.context("the receiver does not say where it listens")?.parse()?;
        Ok(Self { child, address })
    }

    /// `serve`, `api` or `worker` on a database, on a port that was free a moment ago.
    pub async fn service(role: &str, store: &Store) -> anyhow::Result<Self> {
        let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = command(&[role])?;
        command.env("LISTEN_ADDR", address.to_string());
        command.env("DATABASE_URL", &store.url).env_remove("LISTEN_DATABASE_URL");
        command.env("EGRESS_ALLOW", "127.0.0.0/8").env("LOG_LEVEL", "warn");
        let mut program =
            Self { child: command.spawn().with_context(|| format!("starting {role}"))?, address };
        let begun = Instant::now();
        // it listens before its API has anything to answer with
        while !program.get("/health/ready").await.is_ok_and(|health| health["status"] == "ok") {
            ensure!(program.child.try_wait()?.is_none(), "{role} has ended");
            ensure!(begun.elapsed() < START_MAX, "{role} does not start");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(program)
    }

    /// Asks it for a JSON document; what is none is null.
    pub async fn get(&self, path: &str) -> anyhow::Result<serde_json::Value> {
        let mut connection = Connection::open(self.address).await?;
        Ok(serde_json::from_slice(connection.get(path).await?).unwrap_or_default())
    }

    /// How many requests have come to it: a receiver.
    pub async fn received(&self) -> anyhow::Result<u64> {
        self.get("/received").await?["requests"].as_u64().context("the receiver does not count")
    }

    /// Resident memory, now and at its highest, in megabytes (10^6 bytes).
    pub fn memory_mb(&self) -> anyhow::Result<Memory> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib: Option<u32> = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse().ok());
            kib.map(|kib| f64::from(kib) * 1024.0 / 1e6).with_context(|| format!("{path} has no {name}"))
        };
        Ok(Memory { now: field("VmRSS:")?, highest: field("VmHWM:")? })
    }
}

pub struct Memory {
    pub now: f64,
    pub highest: f64,
}

/// The program that lies beside this one, with what it logs shown as our own.
fn command(arguments: &[&str]) -> anyhow::Result<Command> {
    let this = std::env::current_exe().context("finding this program")?;
    let program = this.with_file_name("webhook-processor").with_extension(std::env::consts::EXE_EXTENSION);
    let build = if cfg!(debug_assertions) { "cargo build" } else { "cargo build --release" };
    ensure!(program.exists(), "there is no {} to measure: build it by `{build}`", program.display());
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
    Ok(command)
}

impl Drop for Program {
    fn drop(&mut self) {
        // it may have ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_missing_is_named_with_the_command_that_builds_it() {
        // tests lie in a directory of their own
        let error = command(&["serve"]).unwrap_err().to_string();
        assert!(error.starts_with("there is no /"), "{error}");
        assert!(error.contains("/webhook-processor to measure: build it by `cargo build"), "{error}");
    }
}
