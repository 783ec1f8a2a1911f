//! What a figure was measured on, for whoever compares it with another.

use std::fs;

use sqlx::Connection as _;

use super::Rig;

/// Processors, memory and kernel, if the system reports them.
pub fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let model = field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let kib =
        field("/proc/meminfo", "MemTotal").and_then(|total| total.strip_suffix(" kB")?.parse::<u64>().ok());
    let memory = kib.map(|kib| format!(", {} GiB of memory", (kib + (1 << 19)) >> 20));
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release: Vec<_> = release.trim().split('.').take(2).collect();
    format!(
        "{cores} cores of {model}{}, Linux {}; they also run PostgreSQL, the receiver and what sends requests",
        memory.unwrap_or_default(),
        release.join(".")
    )
}

/// The value of the first line of a file that has this name.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'))?;
    Some(value.trim().to_owned())
}

/// PostgreSQL and the program that is measured, which is built with this one.
pub async fn versions(rig: &Rig) -> anyhow::Result<String> {
    let mut connection = rig.connect().await?;
    let server: String =
        sqlx::query_scalar("select current_setting('server_version')").fetch_one(&mut connection).await?;
    connection.close().await?;
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    Ok(format!("PostgreSQL {server}, webhook-processor {} ({build} build)", env!("CARGO_PKG_VERSION")))
}

/// The command that is running, as it can be repeated.
pub fn command() -> String {
    let quoted = |argument: String| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=,./".contains(c);
        if argument.chars().all(is_plain) {
            argument
        } else {
            format!("'{}'", argument.replace('\'', r"'\''"))
        }
    };
    let arguments =
        std::env::args_os().skip(1).map(|argument| quoted(argument.to_string_lossy().into_owned()));
    ["webhook-processor-bench".to_owned()].into_iter().chain(arguments).collect::<Vec<_>>().join(" ")
}
