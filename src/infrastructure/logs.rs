//! The log of a process, on standard error.

use std::io::IsTerminal as _;
use std::str::FromStr;

use anyhow::Context as _;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object per line.
    Json,
    /// `key=value` pairs.
    Logfmt,
}

impl FromStr for LogFormat {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "pretty" => Ok(Self::Pretty),
            "json" => Ok(Self::Json),
            "logfmt" => Ok(Self::Logfmt),
            _ => Err(()),
        }
    }
}

/// Sends log lines to standard error, so that a command's output stays clean.
pub fn log_to_stderr(level: &str, format: LogFormat) -> anyhow::Result<()> {
    // A single level applies to this program. Its libraries log only warnings and errors, with two exceptions that are left
    // out: a receiver's certificate, about which the line of the attempt says more, and a broken connection that is replaced
    // when it is given back.
    let directives = if level.contains(['=', ',']) {
        level.to_owned()
    } else {
        format!(
            "warn,rustls_platform_verifier=off,sqlx_core::pool::connection=error,webhook_processor={level}"
        )
    };
    let filter: EnvFilter = directives.parse().context("LOG_LEVEL")?;
    let layer = match format {
        LogFormat::Pretty => fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .boxed(),
        // without the list of spans, which would repeat the innermost one
        LogFormat::Json => {
            fmt::layer().json().flatten_event(true).with_span_list(false).with_writer(std::io::stderr).boxed()
        }
        LogFormat::Logfmt => tracing_logfmt::builder().layer().with_writer(std::io::stderr).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(layer).try_init().context("starting the log")
}
