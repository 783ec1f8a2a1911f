//! Deliveries as people and other programs see them: look-ups, lists, counts, changes on request.

use std::collections::HashSet;
use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use serde::Deserialize;
use sqlx::postgres::PgRow;
use sqlx::types::{Json, Uuid};
use sqlx::{Connection as _, FromRow, PgConnection, Postgres, QueryBuilder, Row as _};

use super::errors::{inconsistent, lacks_archive, undecodable};
use super::operators::{change_row, record};
use super::within::{scan, within};
use super::{Database, REQUEST_LIMIT, from_micros};
use crate::application::ports::{
    Backlog, Change, DeliveryFilter, DeliveryRecords, Durations, Statistics, StatisticsScope, StoreError,
};
use crate::domain::attempt::Attempt;
use crate::domain::delivery::{Delivery, DeliveryState, DeliveryStatus, Priority, QueueId};
use crate::domain::durations::DurationCounts;
use crate::domain::endpoint::EndpointId;
use crate::domain::error_kind::ErrorKind;
use crate::domain::evidence::Evidence;
use crate::domain::held::HeldBy;
use crate::domain::retry::RETRIES_MAX;

#[async_trait]
impl DeliveryRecords for Database {
    async fn find(&self, queue_id: QueueId) -> Result<Option<Delivery>, StoreError> {
        within!(self.requests, REQUEST_LIMIT, |connection| find_on(&mut connection, queue_id))
    }

    async fn list(&self, filter: &DeliveryFilter, limit: usize) -> Result<Vec<Delivery>, StoreError> {
        let _turn = self.scans.acquire().await.expect("the semaphore is never closed");
        scan!(self, |connection| list_on(connection, filter, limit))
    }

    async fn replays_of(&self, queue_ids: &[QueueId]) -> Result<Vec<(QueueId, QueueId)>, StoreError> {
        let names: Vec<String> = queue_ids.iter().map(ToString::to_string).collect();
        let rows = scan!(self, |connection| sqlx::query!(
            "-- records.replays_of
            select event_id, queue_id from webhook_event_keys
            where event_type = 'replay' and event_id = any($1)",
            &names,
        )
        .fetch_all(&mut *connection))?;
        let replays = rows.into_iter().map(|row| {
            let replayed = row.event_id.parse().expect("it is one of the ids that were asked for");
            (replayed, QueueId::new(row.queue_id))
        });
        Ok(replays.collect())
    }

    async fn make_ready(&self, queue_id: QueueId, change: &Change<'_>) -> Result<bool, StoreError> {
        within!(self.requests, REQUEST_LIMIT, |connection| change_row(
            &mut connection,
            sqlx::query!(
                "-- records.make_ready
                update webhook_queue_open
                set ready_since = now(), next_retry_at = now(), updated_at = now()
                where queue_id = $1 and status = 'pending' and ready_since is null",
                queue_id.get()
            ),
            change,
            queue_id,
        ))
    }

    async fn cancel(&self, queue_id: QueueId, reason: &str, change: &Change<'_>) -> Result<bool, StoreError> {
        let cancelled = match self.cancel_once(queue_id, reason, change).await {
            Err(error) if lacks_archive(&error) => {
                self.ensure_archives().await?;
                self.cancel_once(queue_id, reason, change).await?
            }
            result => result?,
        };
        metrics::counter!("webhook_deliveries_total", "status" => "cancelled")
            .increment(cancelled.unsigned_abs());
        Ok(cancelled == 1)
    }

    async fn statistics(&self, scope: &StatisticsScope) -> Result<Statistics, StoreError> {
        let config_id = scope.config_id.map(EndpointId::get);
        let window = scope.window.map(|window| window.as_secs_f64());
        let _turn = self.scans.acquire().await.expect("the semaphore is never closed");
        let facts = scan!(self, |connection| {
            sqlx::query!(
            r#"-- records.statistics
            select counted_from, fact as "fact!", duration_ms as "duration_ms!", occurrences as "occurrences!",
                   duration_total_ms as "duration_total_ms!", oldest_us
            from webhook_statistics_and_holds($1, $2 * interval '1 second')"#,
            config_id,
            window,
        )
        .fetch_all(&mut *connection)
        })?;
        let mut statistics =
            Statistics { from: facts.first().and_then(|fact| fact.counted_from), ..Statistics::default() };
        let mut durations = DurationCounts::default();
        for fact in facts {
            let occurrences = fact.occurrences.unsigned_abs();
            match fact.fact.parse().map_err(inconsistent)? {
                Fact::Open(OpenState::Ready) => {
                    statistics.pending += occurrences;
                    statistics.oldest_ready_age = fact.oldest_us.map(from_micros);
                }
                Fact::Open(OpenState::Scheduled) => statistics.pending += occurrences,
                Fact::Open(OpenState::Held(by)) => {
                    statistics.pending += occurrences;
                    statistics.held.add(by, occurrences, fact.oldest_us.map(from_micros));
                }
                Fact::Open(OpenState::Processing) => statistics.processing += occurrences,
                Fact::Ended(status) => *statistics.ended.entry(status).or_default() += occurrences,
                Fact::Error(kind) => *statistics.errors.entry(kind).or_default() += occurrences,
                Fact::Attempt { is_retry } => {
                    statistics.attempts += occurrences;
                    if is_retry {
                        statistics.retries += occurrences;
                    }
                    // the attempt of a lost worker has no duration
                    if let Ok(duration_ms) = u64::try_from(fact.duration_ms) {
                        durations.add(duration_ms, occurrences, fact.duration_total_ms.unsigned_abs());
                    }
                }
            }
        }
        statistics.duration_ms = (|| {
            Some(Durations {
                avg: durations.mean()?,
                p50: durations.percentile(50)?,
                p95: durations.percentile(95)?,
                p99: durations.percentile(99)?,
            })
        })();
        Ok(statistics)
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        let _turn = self.scans.acquire().await.expect("the semaphore is never closed");
        let rows = scan!(self, |connection| {
            sqlx::query!(
            r#"-- records.backlog
            select state as "state!", deliveries as "deliveries!", oldest_us from webhook_open_deliveries(null)"#
        )
        .fetch_all(&mut *connection)
        })?;
        let mut backlog = Backlog::default();
        for row in rows {
            let deliveries = row.deliveries.unsigned_abs();
            match row.state.parse().map_err(inconsistent)? {
                OpenState::Ready => backlog.ready = deliveries,
                OpenState::Scheduled => backlog.scheduled = deliveries,
                OpenState::Processing => backlog.processing = deliveries,
                OpenState::Held(by) => backlog.held.add(by, deliveries, row.oldest_us.map(from_micros)),
            }
        }
        Ok(backlog)
    }

    async fn oldest_ready_age(&self) -> Result<Option<Duration>, StoreError> {
        let age = scan!(self, |connection| sqlx::query_scalar!(
            "-- records.oldest_ready_age
            select webhook_oldest_ready_us(null)"
        )
        .fetch_one(&mut *connection))?;
        Ok(age.map(from_micros))
    }
}

/// What a row of `webhook_statistics_and_holds` counts.
#[derive(Debug, Clone, Copy)]
enum Fact {
    Open(OpenState),
    Ended(DeliveryStatus),
    Attempt { is_retry: bool },
    Error(ErrorKind),
}

/// What an open delivery waits for, as `webhook_open_deliveries` names it.
#[derive(Debug, Clone, Copy)]
enum OpenState {
    Ready,
    Scheduled,
    Processing,
    Held(HeldBy),
}

/// The database counted something that this program does not know. It must not be counted as something else.
#[derive(Debug, thiserror::Error)]
#[error("the statistics count \"{0}\", which this program does not know")]
struct UnknownFact(String);

impl FromStr for Fact {
    type Err = UnknownFact;

    fn from_str(name: &str) -> Result<Self, UnknownFact> {
        Ok(match name {
            "attempt" => Self::Attempt { is_retry: false },
            "retry" => Self::Attempt { is_retry: true },
            other => match (other.strip_prefix("error_"), other.parse::<DeliveryStatus>()) {
                (Some(kind), _) => Self::Error(kind.parse().map_err(|_| UnknownFact(name.to_owned()))?),
                (None, Ok(status)) if status.is_terminal() => Self::Ended(status),
                // what waits is counted by what it waits for
                (None, Ok(_) | Err(_)) => Self::Open(other.parse()?),
            },
        })
    }
}

impl FromStr for OpenState {
    type Err = UnknownFact;

    fn from_str(name: &str) -> Result<Self, UnknownFact> {
        Ok(match name {
            "ready" => Self::Ready,
            "scheduled" => Self::Scheduled,
            "processing" => Self::Processing,
            "paused" => Self::Held(HeldBy::PausedConfig),
            "circuit_open" => Self::Held(HeldBy::OpenCircuit),
            "limited" => Self::Held(HeldBy::Limit),
            _ => return Err(UnknownFact(name.to_owned())),
        })
    }
}

impl Database {
    async fn cancel_once(
        &self,
        queue_id: QueueId,
        reason: &str,
        change: &Change<'_>,
    ) -> Result<i64, StoreError> {
        within!(self.requests, REQUEST_LIMIT, |connection| async {
            let mut transaction = connection.begin().await?;
            let cancelled = sqlx::query_scalar!(
                r#"-- records.cancel
                select count(*) as "count!" from webhook_cancel(array[$1::uuid], $2)"#,
                queue_id.get(),
                reason
            )
            .fetch_one(&mut *transaction)
            .await?;
            if cancelled > 0 {
                record(&mut transaction, change, queue_id).await?;
            }
            transaction.commit().await?;
            Ok(cancelled)
        })
    }
}

/// A delivery ends at most this long before the time in its id, which comes from another clock.
const ENDS_BEFORE_MAX: TimeDelta = TimeDelta::days(1);
/// Most deliveries end within this time. Others cost a second look.
const ENDS_WITHIN: TimeDelta = TimeDelta::days(8);
/// If the deliveries of an event ended in more separate periods than this, the whole time in between is searched.
const PERIODS_MAX: usize = 16;
/// How many failed probes a delivery shows.
const PROBES_SHOWN: i32 = 20;

/// From the start on, before the end.
type Period = Range<DateTime<Utc>>;

/// The time in which a delivery with this id very probably ended, if it has ended. A UUIDv7 holds the time when it was made.
/// `None` for other ids.
fn probable_end(queue_id: Uuid) -> Option<Period> {
    if queue_id.get_version_num() != 7 {
        return None;
    }
    let (milliseconds, _) = queue_id.as_u64_pair();
    let made = DateTime::from_timestamp_millis(i64::try_from(milliseconds >> 16).ok()?)?;
    Some(made - ENDS_BEFORE_MAX..made + ENDS_WITHIN)
}

/// Leaves out the archives of other times. The statement must not be persistent. Only a plan made for these very times neither
/// reads nor locks the other archives, of which there may be thousands.
fn push_open_or_ended_within(query: &mut QueryBuilder<Postgres>, periods: &[Period]) {
    query.push(" and (q.completed_at is null");
    for period in periods {
        query.push(" or q.completed_at >= ").push_bind(period.start);
        query.push(" and q.completed_at < ").push_bind(period.end);
    }
    query.push(")");
}

/// Restricts to terminal deliveries that ended outside of `periods`.
fn push_ended_without(query: &mut QueryBuilder<Postgres>, periods: &[Period]) {
    query.push(" and q.completed_at is not null");
    for period in periods {
        query.push(" and (q.completed_at < ").push_bind(period.start);
        query.push(" or q.completed_at >= ").push_bind(period.end).push(")");
    }
}

async fn find_on(connection: &mut PgConnection, queue_id: QueueId) -> sqlx::Result<Option<Delivery>> {
    let queue_id = queue_id.get();
    let looked_for = || {
        let mut query = QueryBuilder::new(
            "-- records.find
select q.*, (select max(p.number) from webhook_probes p where p.queue_id = q.queue_id) as failed_probes,
       (select json_agg(p) from (select * from webhook_probes p where p.queue_id = q.queue_id
                                 order by p.number desc limit ",
        );
        query.push(PROBES_SHOWN).push(") as p) as probes\nfrom webhook_queue q where q.queue_id = ");
        query.push_bind(queue_id);
        query
    };
    let mut query = looked_for();
    if let Some(period) = probable_end(queue_id) {
        let periods = [period];
        push_open_or_ended_within(&mut query, &periods);
        // An unnamed statement is prepared in one message and run in the next. A pooler sends both to the same server only
        // within a transaction.
        let mut transaction = connection.begin().await?;
        let row =
            query.build_query_as::<DeliveryRow>().persistent(false).fetch_optional(&mut *transaction).await?;
        transaction.commit().await?;
        if row.is_some() {
            return Ok(row.map(|row| row.0));
        }
        query = looked_for();
        push_ended_without(&mut query, &periods);
    }
    // this reads all other archives in any case, so a generic plan saves the planning
    let row = query.build_query_as::<DeliveryRow>().fetch_optional(connection).await?;
    Ok(row.map(|row| row.0))
}

async fn list_on(
    connection: &mut PgConnection,
    filter: &DeliveryFilter,
    limit: usize,
) -> sqlx::Result<Vec<Delivery>> {
    let located = match &filter.event_id {
        Some(event_id) => Some(locate(connection, event_id).await?),
        None => None,
    };
    let mut query = list_query(filter, located.as_ref(), limit);
    let rows = query.build_query_as::<DeliveryRow>().persistent(false).fetch_all(connection).await?;
    Ok(rows.into_iter().map(|row| row.0).collect())
}

struct Located {
    ids: Vec<Uuid>,
    periods: Vec<Period>,
}

/// Finds out when the deliveries of an event ended: most from the periods that follow from their ids, the others by a look into
/// all archives.
async fn locate(connection: &mut PgConnection, event_id: &str) -> sqlx::Result<Located> {
    let ids: Vec<Uuid> = sqlx::query_scalar(
        "-- records.deliveries_of_event
select webhook_deliveries_of_event($1)",
    )
    .bind(event_id)
    .fetch_all(&mut *connection)
    .await?;
    let mut periods = merged(ids.iter().copied().filter_map(probable_end).collect());
    let mut query = ends_query(&ids);
    push_open_or_ended_within(&mut query, &periods);
    let near: Vec<(Uuid, Option<DateTime<Utc>>)> =
        query.build_query_as().persistent(false).fetch_all(&mut *connection).await?;
    let near: HashSet<Uuid> = near.into_iter().map(|(id, _)| id).collect();
    let missing: Vec<Uuid> = ids.iter().copied().filter(|id| !near.contains(id)).collect();
    if !missing.is_empty() {
        let mut query = ends_query(&missing);
        push_ended_without(&mut query, &periods);
        let elsewhere: Vec<(Uuid, DateTime<Utc>)> =
            query.build_query_as().fetch_all(&mut *connection).await?;
        periods.extend(elsewhere.into_iter().map(|(_, end)| end..end + TimeDelta::seconds(1)));
    }
    // a delivery that was open a moment ago may have ended since
    let now = Utc::now();
    periods.push(now - ENDS_BEFORE_MAX..now + ENDS_BEFORE_MAX);
    Ok(Located { ids, periods: merged(periods) })
}

fn ends_query(ids: &[Uuid]) -> QueryBuilder<Postgres> {
    let mut query = QueryBuilder::new(
        "-- records.locate\nselect q.queue_id, q.completed_at from webhook_queue q where q.queue_id = any(",
    );
    query.push_bind(ids.to_vec()).push(")");
    query
}

/// Merges overlapping periods, in order; into a single one if more than [`PERIODS_MAX`] remain.
fn merged(mut periods: Vec<Period>) -> Vec<Period> {
    periods.sort_by_key(|period| period.start);
    let mut merged: Vec<Period> = Vec::new();
    for period in periods {
        match merged.last_mut() {
            Some(last) if period.start <= last.end => last.end = last.end.max(period.end),
            Some(_) | None => merged.push(period),
        }
    }
    if let [first, .., last] = merged.as_slice()
        && merged.len() > PERIODS_MAX
    {
        return vec![first.start..last.end];
    }
    merged
}

/// The order is newest first. That is the order of the key, because ids sort by time.
fn list_query(filter: &DeliveryFilter, located: Option<&Located>, limit: usize) -> QueryBuilder<Postgres> {
    let mut query = QueryBuilder::new(
        "-- records.list
select q.*, (select max(p.number) from webhook_probes p where p.queue_id = q.queue_id) as failed_probes, null::json as probes
from webhook_queue q where q.deleted_at is null",
    );
    if let Some(status) = filter.status {
        // the second condition lets PostgreSQL leave partitions out
        query.push(" and status = ").push_bind(status.as_str());
        query.push(if status.is_terminal() {
            " and completed_at is not null"
        } else {
            " and completed_at is null"
        });
    }
    if let Some(config_id) = filter.config_id {
        query.push(" and config_id = ").push_bind(config_id.get());
    }
    if let Some(event_type) = filter.event_type {
        query.push(" and event_type = ").push_bind(event_type.as_str());
    }
    if let Some(event_id) = &filter.event_id {
        query.push(" and event_id = ").push_bind(event_id.clone());
    }
    if let Some(Located { ids, periods }) = located {
        query.push(" and queue_id = any(").push_bind(ids.clone()).push(")");
        push_open_or_ended_within(&mut query, periods);
    }
    if let Some(from) = filter.from {
        query.push(" and created_at >= ").push_bind(from);
        // a delivery ends after it was accepted, so older archives are left out
        query.push(" and (completed_at >= ").push_bind(from).push(" or completed_at is null)");
    }
    if let Some(to) = filter.to {
        query.push(" and created_at < ").push_bind(to);
    }
    if let Some(before) = filter.before {
        query.push(" and queue_id < ").push_bind(before.get());
    }
    query.push(" order by queue_id desc limit ").push_bind(i64::try_from(limit).unwrap_or(i64::MAX));
    query
}

/// A row of `webhook_queue` as a delivery. Its seven groups of columns become a list of attempts.
struct DeliveryRow(Delivery);

impl FromRow<'_, PgRow> for DeliveryRow {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        let Json(url_params) = row.try_get("url_params")?;
        let mut attempts = Vec::new();
        for number in 0..=RETRIES_MAX {
            let column = |name: &str| format!("retry_{number}_{name}");
            let Some(started_at) = row.try_get(column("started_at").as_str())? else { break };
            attempts.push(Attempt {
                number,
                probe: false,
                started_at,
                completed_at: row.try_get(column("completed_at").as_str())?,
                duration_ms: row.try_get(column("duration_ms").as_str())?,
                http_status: row.try_get(column("http_status").as_str())?,
                response_body: row.try_get(column("response_body").as_str())?,
                error: row.try_get(column("error").as_str())?,
                error_kind: row
                    .try_get::<Option<&str>, _>(column("error_kind").as_str())?
                    .map(str::parse)
                    .transpose()
                    .map_err(undecodable)?,
                evidence: row
                    .try_get::<Option<Json<Evidence>>, _>(column("evidence").as_str())?
                    .map(|Json(evidence)| evidence)
                    .unwrap_or_default(),
            });
        }
        let probes: Option<Json<Vec<ProbeRow>>> = row.try_get("probes")?;
        attempts.extend(probes.into_iter().flat_map(|Json(probes)| probes).map(Attempt::from));
        attempts.sort_by_key(|attempt| attempt.started_at);
        Ok(Self(Delivery {
            queue_id: QueueId::new(row.try_get("queue_id")?),
            event_type: row.try_get("event_type")?,
            event_id: row.try_get("event_id")?,
            config_id: EndpointId::from_stored(row.try_get("config_id")?),
            webhook_url: row.try_get("webhook_url")?,
            url_params,
            state: state_of(row)?,
            priority: Priority::parse("priority", row.try_get::<i16, _>("priority")?.into())
                .map_err(undecodable)?,
            retry_count: u8::try_from(row.try_get::<i16, _>("retry_count")?).map_err(undecodable)?,
            max_retries: u8::try_from(row.try_get::<i16, _>("max_retries")?).map_err(undecodable)?,
            correlation_id: row.try_get("correlation_id")?,
            traceparent: row.try_get("traceparent")?,
            replay_of: row.try_get::<Option<Uuid>, _>("replay_of")?.map(QueueId::new),
            created_at: row.try_get("created_at")?,
            failed_probes: row.try_get::<Option<i32>, _>("failed_probes")?.unwrap_or_default().unsigned_abs(),
            attempts,
        }))
    }
}

/// The state from the status and the columns that the table's constraints demand for it.
fn state_of(row: &PgRow) -> sqlx::Result<DeliveryState> {
    let status: DeliveryStatus = row.try_get::<&str, _>("status")?.parse().map_err(undecodable)?;
    let (due, ended) = (row.try_get("next_retry_at")?, row.try_get("completed_at")?);
    DeliveryState::of(status, due, ended, row.try_get("status_reason")?).map_err(undecodable)
}

/// A failed probe, as a row of `webhook_probes` in JSON.
#[derive(Deserialize)]
struct ProbeRow {
    attempt: u8,
    started_at: DateTime<Utc>,
    completed_at: DateTime<Utc>,
    duration_ms: Option<i32>,
    http_status: Option<i16>,
    response_body: Option<String>,
    error: Option<String>,
    error_kind: Option<ErrorKind>,
    evidence: Option<Evidence>,
}

impl From<ProbeRow> for Attempt {
    fn from(row: ProbeRow) -> Self {
        Self {
            number: row.attempt,
            probe: true,
            started_at: row.started_at,
            completed_at: Some(row.completed_at),
            duration_ms: row.duration_ms,
            http_status: row.http_status,
            response_body: row.response_body,
            error: row.error,
            error_kind: row.error_kind,
            evidence: row.evidence.unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(day: i64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + TimeDelta::days(day)
    }

    #[test]
    fn an_id_of_version_7_tells_when_its_delivery_has_probably_ended() {
        // 2022-02-22T19:22:22Z, the example of RFC 9562, A.6
        let id = Uuid::from_u128(0x017F_22E2_79B0_7CC3_98C4_DC0C_0C07_398F);
        let made = DateTime::from_timestamp(1_645_557_742, 0).unwrap();
        assert_eq!(probable_end(id), Some(made - TimeDelta::days(1)..made + TimeDelta::days(8)));
        assert_eq!(probable_end(Uuid::new_v4()), None);
        let latest = Uuid::from_u128(0xFFFF_FFFF_FFFF_7FFF_BFFF_FFFF_FFFF_FFFF);
        assert!(probable_end(latest).is_some(), "an id may tell any time");
    }

    #[test]
    fn periods_that_touch_are_one_and_many_become_one() {
        let days = |days: &[(i64, i64)]| days.iter().map(|&(from, to)| at(from)..at(to)).collect::<Vec<_>>();
        assert_eq!(merged(days(&[(5, 7), (1, 3), (3, 4), (6, 9), (2, 3)])), days(&[(1, 4), (5, 9)]));
        assert_eq!(merged(vec![]), vec![]);
        let many: Vec<_> = (0..=16).map(|n| (n * 10, n * 10 + 1)).collect();
        assert_eq!(merged(days(&many)), days(&[(0, 161)]));
    }
}
