//! `enqueue`, `stats`, `show` and `replay`: they do what the routes under `/webhooks` do, without a running API.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::Args;
use futures_util::stream::{self, StreamExt as _};
use serde::Serialize;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use uuid::Uuid;

use super::configs::config_named;
use super::output::{fields_table, plain, print_json, progress, say, table};
use crate::application::manage_deliveries::Replay;
use crate::application::ports::{DeliveryFilter, StatisticsScope};
use crate::contract::deliveries::DeliveryView;
use crate::contract::events::{EventBody, ReceiptView};
use crate::contract::statistics::{StatisticsView, parse_window};
use crate::domain::access::Operator;
use crate::domain::delivery::{DeliveryStatus, QueueId};
use crate::domain::event::{Event, EventParts, parse_time};
use crate::domain::replay::ReplayTarget;
use crate::domain::url_params::UrlParams;
use crate::infrastructure::service::Application;

/// How many events of a file are being stored at the same time.
const FILE_AHEAD: usize = 1_000;
/// How many deliveries one query reads.
const PAGE: usize = 200;
/// How many deliveries are being replayed at the same time.
const REPLAYS_AT_ONCE: usize = 50;
/// Up to this many replays are listed; for more, only the totals are shown.
const REPLAYS_SHOWN_MAX: usize = 20;

#[derive(Args)]
pub struct EnqueueArgs {
    /// A file of events: one JSON object per line, as POST /webhooks accepts it; - reads standard input.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = [
            "event_type", "config_id", "event_id", "params", "priority", "scheduled_at", "correlation_id",
        ]
    )]
    file: Option<PathBuf>,
    /// The type of the event: +credit or -debit.
    #[arg(long = "type", value_name = "TYPE", allow_hyphen_values = true, required_unless_present = "file")]
    event_type: Option<String>,
    /// The config to deliver the event to: its id, or its name if no other config has that name.
    #[arg(long, visible_alias = "config", value_name = "ID|NAME", required_unless_present = "file")]
    config_id: Option<String>,
    /// Your id for the event. An id is accepted only once per config and type. Without one, an event that you send again, for
    /// example after an error, is a second event: a second payment.
    #[arg(long, value_name = "ID")]
    event_id: Option<String>,
    /// A query parameter to add to the URL; may be repeated.
    #[arg(long = "param", value_name = "NAME=VALUE")]
    params: Vec<String>,
    /// Priority: 0 (critical) to 3 (low). Without one, the config's priority applies.
    #[arg(long, value_name = "N")]
    priority: Option<i64>,
    /// Deliver not before this time, such as 2026-01-31T12:00:00Z; at most a year ahead.
    #[arg(long, value_name = "TIME")]
    scheduled_at: Option<String>,
    /// Your id for whatever caused the event. It is kept with the delivery.
    #[arg(long, value_name = "ID")]
    correlation_id: Option<String>,
}

pub async fn enqueue(args: EnqueueArgs, application: &Application, json: bool) -> anyhow::Result<()> {
    match &args.file {
        Some(path) if path.as_os_str() == "-" => enqueue_lines(tokio::io::stdin(), application, json).await,
        Some(path) => {
            let file =
                tokio::fs::File::open(path).await.with_context(|| format!("opening {}", path.display()))?;
            enqueue_lines(file, application, json).await
        }
        None => enqueue_one(args, application, json).await,
    }
}

async fn enqueue_one(args: EnqueueArgs, application: &Application, json: bool) -> anyhow::Result<()> {
    let params = args.params.iter().map(|param| {
        let (name, value) = param.split_once('=').context("--param must be written as NAME=VALUE")?;
        anyhow::Ok((name.to_owned(), value.to_owned()))
    });
    let config_id = config_named(&args.config_id.unwrap_or_default(), application).await?;
    let event = Event::parse(EventParts {
        event_type: args.event_type.unwrap_or_default(),
        event_id: args.event_id,
        config_id: config_id.get(),
        url_params: params.collect::<anyhow::Result<Vec<_>>>()?.into_iter().collect::<UrlParams>(),
        priority: args.priority,
        scheduled_at: args.scheduled_at,
        correlation_id: args.correlation_id,
        traceparent: None,
    })?;
    let receipt = application.api.enqueue.accept(&event).await?;
    let view = match receipt.stored {
        Some(stored) => ReceiptView::from(Arc::unwrap_or_clone(stored)),
        None => ReceiptView::duplicate_of(application.api.deliveries.show_first(receipt.queue_id).await?),
    };
    if json {
        return print_json(&view);
    }
    say(fields_table(&view)?)
}

/// Accepts a stream of lines. Reports each refused line, and fails at the end if there was one.
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
        let result = match event_of(&line) {
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

fn event_of(line: &str) -> anyhow::Result<Event> {
    Ok(EventBody::from_json(line.as_bytes())?.into_event(None)?)
}

fn lines_of(input: impl AsyncRead + Unpin) -> impl futures_util::Stream<Item = std::io::Result<String>> {
    let lines = BufReader::new(input).lines();
    futures_util::stream::unfold(lines, |mut lines| async {
        lines.next_line().await.transpose().map(|line| (line, lines))
    })
}

#[derive(Args)]
pub struct StatsArgs {
    /// Count terminal deliveries of this period, such as 1h or 7d; without it, all that are kept.
    #[arg(long)]
    window: Option<String>,
    /// Count only this config's deliveries.
    #[arg(long, visible_alias = "config", value_name = "ID|NAME")]
    config_id: Option<String>,
}

pub async fn stats(args: &StatsArgs, application: &Application, json: bool) -> anyhow::Result<()> {
    let config_id = match &args.config_id {
        None => None,
        Some(text) => {
            let id = config_named(text, application).await?;
            application.api.endpoints.ensure_known(id).await?;
            Some(id)
        }
    };
    let scope = StatisticsScope { window: args.window.as_deref().map(parse_window).transpose()?, config_id };
    let view = StatisticsView::from(application.api.deliveries.statistics(&scope).await?);
    if json {
        return print_json(&view);
    }
    say(fields_table(&view)?)
}

#[derive(Args)]
pub struct ShowArgs {
    /// The delivery's `queue_id`.
    queue_id: String,
}

pub async fn show(args: &ShowArgs, application: &Application, json: bool) -> anyhow::Result<()> {
    let delivery = application.api.deliveries.show(args.queue_id.parse::<QueueId>()?).await?;
    let mut view = DeliveryView::from(delivery);
    if json {
        return print_json(&view);
    }
    // shown exactly as it was sent: read as a number, 100.10 would become 100.1, and 1e400 cannot be read as one
    let url_params = std::mem::replace(&mut view.url_params, serde_json::value::RawValue::NULL.to_owned());
    let mut delivery = serde_json::to_value(&view)?;
    delivery["url_params"] = url_params.get().into();
    let attempts = delivery.as_object_mut().and_then(|object| object.remove("attempts")).unwrap_or_default();
    say(fields_table(&delivery)?)?;
    let columns = [
        "attempt",
        "probe",
        "started_at",
        "duration_ms",
        "http_status",
        "error_kind",
        "error",
        "response_body",
    ];
    let mut rows = table(&columns);
    for attempt in attempts.as_array().into_iter().flatten() {
        rows.add_row(columns.map(|column| plain(&attempt[column])));
    }
    say(rows)
}

#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
#[derive(Args)]
pub struct ReplayArgs {
    /// The deliveries to send again.
    #[arg(value_name = "QUEUE_ID", required_unless_present = "selection")]
    queue_ids: Vec<String>,
    /// Replay all matching dead letters instead. Those that were replayed before are not sent again.
    #[arg(long, conflicts_with = "queue_ids", group = "selection")]
    failed: bool,
    /// Replay all matching deliveries that are waiting instead, if their config has another URL now.
    #[arg(long, conflicts_with = "queue_ids", requires = "current_url", group = "selection")]
    waiting: bool,
    #[command(flatten)]
    which: SelectionArgs,
    /// Use the config's current URL instead of the one that was requested. Then waiting deliveries can be replayed, too: they
    /// are cancelled.
    #[arg(long)]
    current_url: bool,
    /// Only count the deliveries; send nothing.
    #[arg(long, requires = "selection")]
    dry_run: bool,
}

impl ReplayArgs {
    /// Whether this is a dry run.
    pub fn only_counts(&self) -> bool {
        self.dry_run
    }
}

/// Which dead letters or waiting deliveries to replay.
#[derive(Args)]
struct SelectionArgs {
    /// Only deliveries to this config.
    #[arg(long, visible_alias = "config", value_name = "ID|NAME", requires = "selection")]
    config_id: Option<String>,
    /// Only deliveries of this event type: +credit or -debit.
    #[arg(long, value_name = "TYPE", allow_hyphen_values = true, requires = "selection")]
    event_type: Option<String>,
    /// Only deliveries accepted at this time or later, such as 2026-01-31T12:00:00Z.
    #[arg(long, value_name = "TIME", requires = "selection")]
    from: Option<String>,
    /// Only deliveries accepted before this time.
    #[arg(long, value_name = "TIME", requires = "selection")]
    to: Option<String>,
    /// The most deliveries to send, oldest first. Those that were replayed before do not count.
    #[arg(long, value_name = "N", requires = "selection")]
    limit: Option<usize>,
}

impl SelectionArgs {
    async fn into_filter(
        self,
        status: DeliveryStatus,
        application: &Application,
    ) -> anyhow::Result<DeliveryFilter> {
        let config_id = match self.config_id {
            None => None,
            Some(text) => Some(config_named(&text, application).await?),
        };
        Ok(DeliveryFilter {
            status: Some(status),
            config_id,
            event_type: self.event_type.as_deref().map(str::parse).transpose()?,
            from: self.from.as_deref().map(|text| parse_time("from", text)).transpose()?,
            to: self.to.as_deref().map(|text| parse_time("to", text)).transpose()?,
            ..DeliveryFilter::default()
        })
    }
}

/// A replay, with the delivery that it repeats.
#[derive(Serialize)]
struct Replayed {
    queue_id: Uuid,
    replay_of: Uuid,
    replayed_before: bool,
}

pub async fn replay(
    args: ReplayArgs,
    application: &Application,
    by: &Arc<Operator>,
    json: bool,
) -> anyhow::Result<()> {
    let deliveries = &application.api.deliveries;
    let limit = args.which.limit.unwrap_or(usize::MAX);
    let status = if args.waiting { DeliveryStatus::Pending } else { DeliveryStatus::Failed };
    let mut ids = if args.failed || args.waiting {
        all_that_match(args.which.into_filter(status, application).await?, application).await?
    } else {
        args.queue_ids.iter().map(|text| text.parse()).collect::<Result<Vec<QueueId>, _>>()?
    };
    let before = deliveries.replays_of(&ids).await?;
    let mut to_send = 0;
    ids.retain(|id| {
        if before.contains_key(id) {
            return true;
        }
        to_send += 1;
        to_send <= limit
    });
    let to_send = to_send.min(limit);
    if args.dry_run {
        if json {
            return print_json(
                &json!({"matching": ids.len(), "to_send": to_send, "replayed_before": before.len()}),
            );
        }
        return say(format!(
            "{} {} match: {to_send} would be sent again, {} were replayed before",
            ids.len(),
            if args.waiting { "waiting deliveries" } else { "dead letters" },
            before.len()
        ));
    }
    let target = if args.current_url { ReplayTarget::CurrentUrl } else { ReplayTarget::SameUrl };
    let bar = progress(Some(ids.len() as u64), "replays");
    let (mut replays, mut refused) = (Vec::with_capacity(ids.len()), 0_u64);
    let mut work = stream::iter(ids)
        .map(async |id| {
            if let Some(first) = before.get(&id) {
                return (id, Ok((*first, true)));
            }
            let replayed = deliveries.replay(id, target, by).await;
            (id, replayed.map(|replay| (replay.delivery().queue_id, matches!(replay, Replay::Before(_)))))
        })
        .buffered(REPLAYS_AT_ONCE);
    while let Some((id, replayed)) = work.next().await {
        match replayed {
            Ok((queue_id, replayed_before)) => {
                replays.push(Replayed { queue_id: queue_id.get(), replay_of: id.get(), replayed_before });
            }
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
        say_replays(&replays, refused)?;
    }
    if refused > 0 {
        bail!("{refused} deliveries were not replayed");
    }
    Ok(())
}

/// Prints the totals, and each replay if there are few.
fn say_replays(replays: &[Replayed], refused: u64) -> anyhow::Result<()> {
    if (1..=REPLAYS_SHOWN_MAX).contains(&replays.len()) {
        let mut rows = table(&["queue_id", "replay_of", "replayed_before"]);
        for Replayed { queue_id, replay_of, replayed_before } in replays {
            rows.add_row([queue_id.to_string(), replay_of.to_string(), replayed_before.to_string()]);
        }
        say(rows)?;
    }
    let before = replays.iter().filter(|replay| replay.replayed_before).count();
    say(format!("{} sent, {before} sent before, {refused} refused", replays.len() - before))
}

/// The matching deliveries, oldest first. Of those that wait, the ones whose config has another URL now.
async fn all_that_match(
    mut filter: DeliveryFilter,
    application: &Application,
) -> anyhow::Result<Vec<QueueId>> {
    let deliveries = &application.api.deliveries;
    let mut ids = Vec::new();
    loop {
        let page = deliveries.list(&filter, PAGE).await?;
        for delivery in &page {
            if delivery.state.status() != DeliveryStatus::Pending || deliveries.is_elsewhere(delivery).await?
            {
                ids.push(delivery.queue_id);
            }
        }
        filter.before = page.last().map(|last| last.queue_id);
        if page.len() < PAGE {
            ids.reverse();
            return Ok(ids);
        }
    }
}
