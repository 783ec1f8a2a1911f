//! The command line: one command, from its arguments to its end.

#![warn(missing_docs)]

mod configs;
mod deliveries;
mod health;
mod keys;
pub mod output;
mod receiver;

use std::fmt::Write as _;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use tokio_util::sync::CancellationToken;

use crate::domain::access::{Operator, REASON_CHARS_MAX, Way};
use crate::domain::invalid::bounded_text;
use crate::infrastructure::logs::log_to_stderr;
use crate::infrastructure::metrics::record_metrics;
use crate::infrastructure::postgres::tell_ready;
use crate::infrastructure::process::user_name;
use crate::infrastructure::ready_database::{Purpose, ReadyDatabase};
use crate::infrastructure::service::{self, Application, Role};
use crate::infrastructure::settings::{SETTINGS, Settings};
use crate::infrastructure::shutdown::stop_on_signal;

/// The webhook engine that teams trust with money, on the PostgreSQL that they already run.
///
/// Events come in over HTTP or from the command line. Each is stored before it is acknowledged and delivered by workers
/// with retries. Every attempt is recorded for audit by SQL. Without DATABASE_URL, a private PostgreSQL is started from
/// the server programs on this machine, in .data/postgres.
#[derive(Parser)]
#[command(version, about, after_long_help = settings_help(), arg_required_else_help = true)]
pub struct Cli {
    /// Print JSON instead of tables, for other programs.
    #[arg(long, global = true)]
    json: bool,
    /// Why: recorded with what a command changes, in `webhook_operator_actions`.
    #[arg(long, global = true, value_name = "TEXT")]
    reason: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the API and the workers.
    Serve,
    /// Run the API without workers.
    Api,
    /// Run workers without the API; LISTEN_ADDR serves only health and metrics.
    Worker,
    /// Bring the database's schema up to date.
    Migrate,
    /// Accept one event, or a file of them.
    Enqueue(deliveries::EnqueueArgs),
    /// Count deliveries and attempts.
    Stats(deliveries::StatsArgs),
    /// Show a delivery with its attempts.
    Show(deliveries::ShowArgs),
    /// Send terminal deliveries again, as new ones that refer to them.
    Replay(deliveries::ReplayArgs),
    /// Manage configs: where deliveries go, and how.
    #[command(subcommand)]
    Configs(configs::ConfigsCommand),
    /// Manage API keys: who may use the API, and what for.
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// Run a local test receiver that counts and prints what arrives.
    Receiver(receiver::ReceiverArgs),
    /// Ask a running process for /health/live; exits 0 if it answers.
    #[command(hide = true)]
    Health,
}

/// The settings, below `--help`.
fn settings_help() -> String {
    let mut help = String::from("Settings, from the environment, then .env, then these defaults:\n");
    for setting in &SETTINGS {
        let default = if setting.default.is_empty() { "unset" } else { setting.default };
        writeln!(help, "  {} [{default}]\n          {}", setting.name, setting.meaning)
            .expect("a String takes it");
    }
    help
}

/// Runs a command to its end.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    block_on(dispatch(cli))
}

/// Runs work to its end, on a runtime of its own.
pub fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    let ended = runtime.block_on(work);
    // a blocking call, such as a look-up of a name, may still occupy a thread; its result is not needed
    runtime.shutdown_background();
    ended
}

async fn dispatch(cli: Cli) -> anyhow::Result<()> {
    let json = cli.json;
    match cli.command {
        Command::Receiver(args) => receiver::run(args, json).await,
        command => with_settings(command, cli.reason, json).await,
    }
}

async fn with_settings(command: Command, reason: Option<String>, json: bool) -> anyhow::Result<()> {
    let settings = Settings::load()?;
    if let Some(reason) = &reason {
        bounded_text("--reason", reason, REASON_CHARS_MAX)?;
    }
    // a command for people says on standard output what it did; its log shows only warnings and errors
    let is_service = matches!(command, Command::Serve | Command::Api | Command::Worker);
    let level = if is_service || std::env::var_os("LOG_LEVEL").is_some() {
        settings.log_level.as_str()
    } else {
        "warn"
    };
    log_to_stderr(level, settings.log_format)?;
    let stop = stop_on_signal()?;
    let role = match command {
        Command::Serve => Role::Serve,
        Command::Api => Role::Api,
        Command::Worker => Role::Worker,
        Command::Health => return health::run(&settings).await,
        command => return with_database(command, reason, &settings, json, stop).await,
    };
    service::run(&settings, role, record_metrics()?, stop).await
}

/// Runs a command that works on the database directly. It stops on a signal.
async fn with_database(
    command: Command,
    reason: Option<String>,
    settings: &Settings,
    json: bool,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let purpose = purpose(&command, settings);
    let ready = tokio::select! {
        ready = ReadyDatabase::open_for(settings, purpose) => ready?,
        () = stop.cancelled() => bail!("stopped"),
    };
    let application = Application::new(&ready.database, settings);
    let by = Arc::new(Operator { name: user_name(), way: Way::CommandLine, reason });
    let work = async {
        match command {
            Command::Migrate if json => output::print_json(&serde_json::json!({"migrated": true})),
            Command::Migrate => output::say("the schema is up to date"),
            Command::Enqueue(args) => deliveries::enqueue(args, &application, json).await,
            Command::Stats(args) => deliveries::stats(&args, &application, json).await,
            Command::Show(args) => deliveries::show(&args, &application, json).await,
            Command::Replay(args) => deliveries::replay(args, &application, &by, json).await,
            Command::Configs(command) => configs::run(command, &application, &by, json).await,
            Command::Keys(command) => keys::run(command, &application, &by, json).await,
            Command::Serve | Command::Api | Command::Worker | Command::Receiver(_) | Command::Health => {
                unreachable!("dispatched before")
            }
        }
    };
    let ended = tokio::select! {
        ended = work => ended,
        () = stop.cancelled() => bail!("stopped"),
    };
    // nothing in this process delivers, so others are told, even of a part
    let told = if purpose == Purpose::Write { tell_ready(&ready.database, None).await } else { Ok(()) };
    ready.close().await;
    ended?;
    Ok(told?)
}

/// What a command needs the database for. Only `migrate` and the services change the schema of a database that others use. On a
/// private database, a newcomer may begin with a config.
fn purpose(command: &Command, settings: &Settings) -> Purpose {
    use configs::ConfigsCommand;
    use keys::KeysCommand;
    match command {
        Command::Migrate => Purpose::Migrate,
        Command::Configs(ConfigsCommand::Register(_)) | Command::Keys(KeysCommand::Create { .. })
            if settings.database.is_none() =>
        {
            Purpose::Migrate
        }
        Command::Stats(_)
        | Command::Keys(KeysCommand::List)
        | Command::Show(_)
        | Command::Configs(ConfigsCommand::List | ConfigsCommand::Show { .. }) => Purpose::Read,
        Command::Replay(replay) if replay.only_counts() => Purpose::Read,
        _ => Purpose::Write,
    }
}
