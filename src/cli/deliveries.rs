//! `enqueue`, `stats`, `show` and `replay`: the same as under `/webhooks`, without a running API.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use chrono::{DateTime, Utc};
use clap::Args;
use futures_util::StreamExt as _;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};

use super::output::{fields_table, plain, print_json, progress, say, table};
use crate::application::manage_deliveries::Replay;
use crate::application::ports::{DeliveryFilter, StatisticsScope};
use crate::domain::delivery::{DeliveryStatus, QueueId};
use crate::domain::endpoint::EndpointId;
use crate::domain::event::{Event, EventParts};
use crate::domain::url_params::UrlParams;
use crate::infrastructure::http::parse_window;
use crate::infrastructure::http::view::{DeliveryView, EventBody, ReceiptView, StatisticsView};
use crate::infrastructure::postgres::{Database, tell_ready};
use crate::infrastructure::service::Application;

/// How many events of a file are on their way to the database at a time.
const FILE_AHEAD: usize = 1_000;
/// How many deliveries are read at a time.
const PAGE: usize = 200;

#[derive(Args)]
pub struct EnqueueArgs {
    /// A file of events, one JSON object a line as POST /webhooks takes it; - for standard input.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["event_type", "config_id"])]
    file: Option<PathBuf>,
    /// +credit or -debit.
    #[arg(long = "type", value_name = "TYPE", allow_hyphen_values = true, required_unless_present = "file")]
    event_type: Option<String>,
    /// The config that the event is owed to.
    #[arg(long, value_name = "ID", required_unless_present = "file")]
    config_id: Option<i64>,
    /// Your name for the event: the same is accepted once.
    #[arg(long, value_name = "ID")]
    event_id: Option<String>,
    /// A query parameter; may be repeated.
    #[arg(long = "param", value_name = "NAME=VALUE")]
    params: Vec<String>,
    /// 0 (critical) to 3 (low).
    #[arg(long, value_name = "N")]
    priority: Option<i64>,
    /// Not before this time (RFC 3339).
    #[arg(long, value_name = "TIME")]
    scheduled_at: Option<String>,
    /// Your id for what led to the event.
    #[arg(long, value_name = "ID")]
    correlation_id: Option<String>,
}

pub async fn enqueue(
    args: EnqueueArgs,
    application: &Application,
    database: &Database,
    json: bool,
) -> anyhow::Result<()> {
    let accepted = match &args.file {
        Some(path) if path.as_os_str() == "-" => enqueue_lines(tokio::io::stdin(), application, json).await,
        Some(path) => {
            let file =
                tokio::fs::File::open(path).await.with_context(|| format!("opening {}", path.display()))?;
            enqueue_lines(file, application, json).await
        }
        None => enqueue_one(args, application, json).await,
    };
    // nothing in this process delivers, so others are told even of a part
    tell_ready(database, None).await?;
    accepted
}

async fn enqueue_one(args: EnqueueArgs, application: &Application, json: bool) -> anyhow::Result<()> {
    let params = args.params.iter().map(|param| {
        let (name, value) = param.split_once('=').context("--param must be written as NAME=VALUE")?;
        anyhow::Ok((name.to_owned(), value.to_owned()))
    });
    let event = Event::parse(EventParts {
        event_type: args.event_type.unwrap_or_default(),
        event_id: args.event_id,
        config_id: args.config_id.unwrap_or_default(),
        url_params: params.collect::<anyhow::Result<Vec<_>>>()?.into_iter().collect::<UrlParams>(),
        priority: args.priority,
        scheduled_at: args.scheduled_at,
        correlation_id: args.correlation_id,
        traceparent: None,
    })?;
    let receipt = application.api.enqueue.accept(&event).await?;
    let view = match receipt.stored {
        Some(stored) => ReceiptView::from(Arc::unwrap_or_clone(stored)),
        None => ReceiptView::duplicate_of(application.api.deliveries.show(receipt.queue_id).await?),
    };
    if json {
        return print_json(&view);
    }
    say(fields_table(&view)?)
}

/// Accepts a stream of lines. Tells of each that is refused, and fails at the end if there was one.
async fn enqueue_lines(
    input: impl AsyncRead + Unpin,
    application: &Application,
    json: bool,
) -> anyhow::Result<()> {
    let lines = lines_of(input);
    let bar = progress(None, "events");
    let (mut stored, mut duplicates, mut refused, mut number) = (0_u64, 0_u64, 0_u64, 0_u64);
    let accepted = lines.map(|line| async {
        let line = line?;
        if line.trim().is_empty() {
            return Ok(None);
        }
        let result = match EventBody::from_json(&line).and_then(|body| Ok(body.into_event(None)?)) {
            Ok(event) => application.api.enqueue.accept_of_many(&event).await.map_err(anyhow::Error::from),
            Err(error) => Err(error),
        };
        std::io::Result::Ok(Some(result))
    });
    let mut accepted = std::pin::pin!(accepted.buffered(FILE_AHEAD));
    while let Some(result) = accepted.next().await {
        number += 1;
        match result.context("reading the events")? {
            None => continue,
            Some(Ok(receipt)) if receipt.is_duplicate() => duplicates += 1,
            Some(Ok(_)) => stored += 1,
            Some(Err(error)) => {
                refused += 1;
                bar.suspend(|| eprintln!("line {number}: {error:#}"));
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if json {
        print_json(&json!({"accepted": stored, "duplicates": duplicates, "refused": refused}))?;
    } else {
        say(format!("{stored} accepted, {duplicates} accepted before, {refused} refused"))?;
    }
    if refused > 0 {
        bail!("{refused} events were refused");
    }
    Ok(())
}

fn lines_of(input: impl AsyncRead + Unpin) -> impl futures_util::Stream<Item = std::io::Result<String>> {
    let lines = BufReader::new(input).lines();
    futures_util::stream::unfold(lines, |mut lines| async {
        lines.next_line().await.transpose().map(|line| (line, lines))
    })
}

#[derive(Args)]
pub struct StatsArgs {
    /// Terminal deliveries of this long, such as 1h or 7d; all that are kept, if not given.
    #[arg(long)]
    window: Option<String>,
    /// Of this config.
    #[arg(long, value_name = "ID")]
    config_id: Option<i64>,
}

pub async fn stats(args: &StatsArgs, application: &Application, json: bool) -> anyhow::Result<()> {
    let scope = StatisticsScope {
        window: args.window.as_deref().map(parse_window).transpose()?,
        config_id: args.config_id.map(|number| EndpointId::parse("config_id", number)).transpose()?,
    };
    let view = StatisticsView::from(application.api.deliveries.statistics(&scope).await?);
    if json {
        return print_json(&view);
    }
    say(fields_table(&view)?)
}

#[derive(Args)]
pub struct ShowArgs {
    /// Its `queue_id`.
    queue_id: String,
}

pub async fn show(args: &ShowArgs, application: &Application, json: bool) -> anyhow::Result<()> {
    let view = DeliveryView::from(application.api.deliveries.show(args.queue_id.parse::<QueueId>()?).await?);
    if json {
        return print_json(&view);
    }
    let mut delivery = serde_json::to_value(&view)?;
    let attempts = delivery.as_object_mut().and_then(|object| object.remove("attempts")).unwrap_or_default();
    say(fields_table(&delivery)?)?;
    let columns = ["attempt", "started_at", "duration_ms", "http_status", "error", "response_body"];
    let mut rows = table(&columns);
    for attempt in attempts.as_array().into_iter().flatten() {
        rows.add_row(columns.map(|column| plain(&attempt[column])));
    }
    say(rows)
}

#[derive(Args)]
pub struct ReplayArgs {
    /// Deliveries to send again.
    #[arg(value_name = "QUEUE_ID", required_unless_present = "failed")]
    queue_ids: Vec<String>,
    /// All dead letters that match, instead. What was replayed before is not sent again.
    #[arg(long, conflicts_with = "queue_ids")]
    failed: bool,
    /// Of this config.
    #[arg(long, value_name = "ID", requires = "failed")]
    config_id: Option<i64>,
    /// Accepted at this time or later (RFC 3339).
    #[arg(long, value_name = "TIME", requires = "failed")]
    from: Option<DateTime<Utc>>,
    /// Accepted before this time (RFC 3339).
    #[arg(long, value_name = "TIME", requires = "failed")]
    to: Option<DateTime<Utc>>,
    /// Only count them.
    #[arg(long, requires = "failed")]
    dry_run: bool,
}

impl ReplayArgs {
    /// Whether nothing is to be sent.
    pub fn only_counts(&self) -> bool {
        self.dry_run
    }
}

pub async fn replay(args: ReplayArgs, application: &Application, json: bool) -> anyhow::Result<()> {
    let ids = if args.failed {
        let filter = DeliveryFilter {
            status: Some(DeliveryStatus::Failed),
            config_id: args.config_id.map(|number| EndpointId::parse("config_id", number)).transpose()?,
            from: args.from,
            to: args.to,
            ..DeliveryFilter::default()
        };
        dead_letters(filter, application).await?
    } else {
        args.queue_ids.iter().map(|text| text.parse()).collect::<Result<Vec<QueueId>, _>>()?
    };
    if args.dry_run {
        if json {
            return print_json(&json!({"dead_letters": ids.len()}));
        }
        return say(format!(
            "{} dead letters match; those replayed before would not be sent again",
            ids.len()
        ));
    }
    let bar = progress(Some(ids.len() as u64), "replays");
    let mut replays = Vec::new();
    let mut refused = 0_u64;
    for id in ids {
        match application.api.deliveries.replay(id).await {
            Ok(replay) => replays.push(json!({
                "queue_id": replay.delivery().queue_id.get(),
                "replay_of": id.get(),
                "replayed_before": matches!(replay, Replay::Before(_)),
            })),
            Err(error) => {
                refused += 1;
                bar.suspend(|| eprintln!("{id}: {:#}", anyhow::Error::from(error)));
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if json {
        print_json(&replays)?;
    } else {
        let columns = ["queue_id", "replay_of", "replayed_before"];
        let mut rows = table(&columns);
        for replay in &replays {
            rows.add_row(columns.map(|column| plain(&replay[column])));
        }
        say(rows)?;
    }
    if refused > 0 {
        bail!("{refused} deliveries were not replayed");
    }
    Ok(())
}

/// The dead letters that match, oldest first.
async fn dead_letters(mut filter: DeliveryFilter, application: &Application) -> anyhow::Result<Vec<QueueId>> {
    let mut ids = Vec::new();
    loop {
        let page = application.api.deliveries.list(&filter, PAGE).await?;
        ids.extend(page.iter().map(|delivery| delivery.queue_id));
        filter.before = page.last().map(|last| last.queue_id);
        if page.len() < PAGE {
            ids.reverse();
            return Ok(ids);
        }
    }
}
