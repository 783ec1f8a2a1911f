//! `webhook-processor configs`: does what `/api/webhooks` does.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};

use super::output::{fields_table, plain, print_json, say, table};
use crate::contract::configs::ConfigView;
use crate::domain::access::Operator;
use crate::domain::circuit::CircuitParts;
use crate::domain::endpoint::{Endpoint, EndpointId};
use crate::domain::endpoint_settings::EndpointParts;
use crate::infrastructure::service::Application;

/// How many configs one query reads.
const PAGE: usize = 200;

#[derive(Subcommand)]
pub enum ConfigsCommand {
    /// Register a config.
    Register(ConfigArgs),
    /// List all configs.
    List,
    /// Show a config.
    Show {
        /// The config's id, or its name if no other config has that name.
        #[arg(value_name = "ID|NAME")]
        config: String,
    },
    /// Change the given settings of a config; the others stay as they are.
    Change {
        /// The config's id, or its name if no other config has that name.
        #[arg(value_name = "ID|NAME")]
        config: String,
        #[command(flatten)]
        change: ConfigArgs,
    },
    /// Enable a config: its deliveries are attempted.
    Enable {
        /// The config's id, or its name if no other config has that name.
        #[arg(value_name = "ID|NAME")]
        config: String,
    },
    /// Disable a config: its deliveries are accepted, and wait.
    Disable {
        /// The config's id, or its name if no other config has that name.
        #[arg(value_name = "ID|NAME")]
        config: String,
    },
    /// Open a config's circuit by hand: its deliveries wait, and no probe is sent, until close-circuit.
    OpenCircuit {
        /// The config's id, or its name if no other config has that name.
        #[arg(value_name = "ID|NAME")]
        config: String,
    },
    /// Close a config's circuit: its deliveries are attempted.
    CloseCircuit {
        /// The config's id, or its name if no other config has that name.
        #[arg(value_name = "ID|NAME")]
        config: String,
    },
    /// Probe a config's open circuit now, with the delivery that has waited longest. A failure uses up no attempt.
    Probe {
        /// The config's id, or its name if no other config has that name.
        #[arg(value_name = "ID|NAME")]
        config: String,
    },
    /// Delete a config: nothing more is accepted for it, and a running process cancels its open deliveries.
    Delete {
        /// The config's id, or its name if no other config has that name.
        #[arg(value_name = "ID|NAME")]
        config: String,
    },
}

#[derive(Args)]
pub struct ConfigArgs {
    /// A name for people. A new config needs one.
    #[arg(long)]
    name: Option<String>,
    /// URL for +credit events; an empty one removes it.
    #[arg(long, value_name = "URL")]
    postback_url: Option<String>,
    /// URL for -debit events; an empty one removes it.
    #[arg(long, value_name = "URL")]
    chargeback_url: Option<String>,
    /// A request header to send; may be repeated. The given headers replace all existing ones.
    #[arg(long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// Time limit of one attempt, in milliseconds: up to `HTTP_TIMEOUT` [new config: 30000]
    #[arg(long, value_name = "MS")]
    timeout_ms: Option<i64>,
    /// Attempts after the first: 0 to 6 [new config: 6]
    #[arg(long, value_name = "N")]
    max_retries: Option<i64>,
    /// Delay before the first retry, in milliseconds; it doubles for each further retry [new config: 1000]
    #[arg(long, value_name = "MS")]
    retry_base_ms: Option<i64>,
    /// Upper bound of that delay, in milliseconds: up to 86400000 [new config: 300000]
    #[arg(long, value_name = "MS")]
    retry_cap_ms: Option<i64>,
    /// Share by which a delay is made longer or shorter at random: from 0 to below 1 [new config: 0.25]
    #[arg(long, value_name = "SHARE")]
    retry_jitter: Option<f64>,
    /// Priority of events that do not have one: 0 (critical) to 3 (low) [new config: 2]
    #[arg(long, value_name = "N")]
    priority: Option<i64>,
    /// The most attempts under way at the same time: 1 to 10000, or none for no limit [new config: none]
    #[arg(long, value_name = "N", value_parser = limit)]
    max_in_flight: Option<Limit>,
    /// The most attempts that begin per second: 1 to 100000, or none for no limit [new config: none]
    #[arg(long, value_name = "N", value_parser = limit)]
    rate_limit_per_second: Option<Limit>,
    /// The circuit opens at this share of failed attempts: above 0, up to 1, or none to open it only by hand [new config: 0.8]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    circuit_failure_rate: Option<Share>,
    /// The window in which these attempts are counted, in milliseconds: 1000 to 3600000 [new config: 60000]
    #[arg(long, value_name = "MS")]
    circuit_window_ms: Option<i64>,
    /// The fewest attempts in the window for that share to count: 1 to 10000 [new config: 20]
    #[arg(long, value_name = "N")]
    circuit_attempts_min: Option<i64>,
    /// With fewer attempts, the circuit opens after so many failures in a row: 1 to 10000, or none for never [new config: 5]
    #[arg(long, value_name = "N", value_parser = limit)]
    circuit_failures_in_row: Option<Limit>,
    /// Time from the opening of the circuit to the first probe, in milliseconds; it doubles after each failed probe: from 100
    /// [new config: 5000]
    #[arg(long, value_name = "MS")]
    circuit_cooldown_ms: Option<i64>,
    /// Upper bound of that time, in milliseconds: up to 86400000 [new config: 300000]
    #[arg(long, value_name = "MS")]
    circuit_cooldown_cap_ms: Option<i64>,
}

/// A number, or none.
type Limit = Option<i64>;
/// A share, or none.
type Share = Option<f64>;

fn limit(text: &str) -> Result<Limit, std::num::ParseIntError> {
    (text != "none").then(|| text.parse()).transpose()
}

fn share(text: &str) -> Result<Share, std::num::ParseFloatError> {
    (text != "none").then(|| text.parse()).transpose()
}

impl ConfigArgs {
    fn into_parts(self) -> anyhow::Result<EndpointParts> {
        let headers = self.headers.iter().map(|header| {
            let (name, value) =
                header.split_once(':').context("--header must be written as 'Name: value'")?;
            anyhow::Ok((name.trim().to_owned(), value.trim().to_owned()))
        });
        let headers = headers.collect::<anyhow::Result<BTreeMap<_, _>>>()?;
        let url = |url: Option<String>| url.map(|url| (!url.is_empty()).then_some(url));
        Ok(EndpointParts {
            name: self.name,
            postback_url: url(self.postback_url),
            chargeback_url: url(self.chargeback_url),
            headers: (!headers.is_empty()).then_some(headers),
            timeout_ms: self.timeout_ms,
            max_retries: self.max_retries,
            retry_base_ms: self.retry_base_ms,
            retry_cap_ms: self.retry_cap_ms,
            retry_jitter: self.retry_jitter,
            priority: self.priority,
            max_in_flight: self.max_in_flight,
            rate_limit_per_second: self.rate_limit_per_second,
            circuit: CircuitParts {
                state: None,
                failure_rate: self.circuit_failure_rate,
                window_ms: self.circuit_window_ms,
                attempts_min: self.circuit_attempts_min,
                failures_in_row: self.circuit_failures_in_row,
                cooldown_ms: self.circuit_cooldown_ms,
                cooldown_cap_ms: self.circuit_cooldown_cap_ms,
            },
            enabled: None,
        })
    }
}

/// Finds a config by `text`, which is its id, or its name if no other config has that name.
pub async fn config_named(text: &str, application: &Application) -> anyhow::Result<EndpointId> {
    if let Ok(number) = text.parse() {
        return Ok(EndpointId::parse("config", number)?);
    }
    let ids: Vec<EndpointId> = all(application)
        .await?
        .into_iter()
        .filter(|endpoint| endpoint.settings.name == text)
        .map(|endpoint| endpoint.id)
        .collect();
    match ids[..] {
        [] => bail!("there is no config named {text:?}; webhook-processor configs list shows them"),
        [id] => Ok(id),
        [..] => {
            let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
            bail!("{} configs are named {text:?}: give an id instead, {}", ids.len(), ids.join(" or "))
        }
    }
}

pub async fn run(
    command: ConfigsCommand,
    application: &Application,
    by: &Operator,
    json: bool,
) -> anyhow::Result<()> {
    let endpoints = &application.api.endpoints;
    let id = async |config: String| config_named(&config, application).await;
    let enabled = |enabled| EndpointParts { enabled: Some(enabled), ..EndpointParts::default() };
    let circuit = |state: &str| EndpointParts {
        circuit: CircuitParts { state: Some(state.to_owned()), ..CircuitParts::default() },
        ..EndpointParts::default()
    };
    let endpoint = match command {
        ConfigsCommand::List => return list(application, json).await,
        ConfigsCommand::Delete { config } => {
            let id = id(config).await?;
            endpoints.delete(id, by).await?;
            if json {
                return print_json(&serde_json::json!({"deleted": id.get()}));
            }
            return say(format!("config {id} was deleted"));
        }
        ConfigsCommand::Register(args) => endpoints.register(args.into_parts()?, by).await?,
        ConfigsCommand::Show { config } => endpoints.show(id(config).await?).await?,
        ConfigsCommand::Change { config, change } => {
            endpoints.change(id(config).await?, change.into_parts()?, by).await?
        }
        ConfigsCommand::Enable { config } => endpoints.change(id(config).await?, enabled(true), by).await?,
        ConfigsCommand::Disable { config } => endpoints.change(id(config).await?, enabled(false), by).await?,
        ConfigsCommand::OpenCircuit { config } => {
            endpoints.change(id(config).await?, circuit("open"), by).await?
        }
        ConfigsCommand::Probe { config } => endpoints.probe(id(config).await?, by).await?,
        ConfigsCommand::CloseCircuit { config } => {
            endpoints.change(id(config).await?, circuit("closed"), by).await?
        }
    };
    let view = ConfigView::new(endpoint, endpoints.timeout_max());
    if json {
        return print_json(&view);
    }
    say(fields_table(&view)?)
}

async fn all(application: &Application) -> anyhow::Result<Vec<Endpoint>> {
    let mut endpoints: Vec<Endpoint> = Vec::new();
    loop {
        let page = application.api.endpoints.list(endpoints.last().map(|last| last.id), PAGE).await?;
        let ended = page.len() < PAGE;
        endpoints.extend(page);
        if ended {
            return Ok(endpoints);
        }
    }
}

async fn list(application: &Application, json: bool) -> anyhow::Result<()> {
    let timeout_max = application.api.endpoints.timeout_max();
    let views: Vec<ConfigView> =
        all(application).await?.into_iter().map(|endpoint| ConfigView::new(endpoint, timeout_max)).collect();
    if json {
        return print_json(&views);
    }
    let columns = ["id", "name", "postback_url", "chargeback_url", "priority", "enabled"];
    let mut rows = table(&[&columns[..], &["circuit"]].concat());
    for view in &views {
        let view = serde_json::to_value(view)?;
        rows.add_row(
            columns.map(|column| &view[column]).into_iter().chain([&view["circuit"]["state"]]).map(plain),
        );
    }
    say(rows)
}
