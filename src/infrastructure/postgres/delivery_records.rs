//! Deliveries as people and other programs see them: look-ups, lists, counts, and changes that were asked for.

use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::Deserialize;
use sqlx::postgres::PgRow;
use sqlx::types::{Json, Uuid};
use sqlx::{FromRow, Postgres, QueryBuilder, Row as _};

use super::{Database, REQUEST_LIMIT, from_micros, lacks_archive, scan, within};
use crate::application::ports::{
    Backlog, DeliveryFilter, DeliveryRecords, Durations, Statistics, StatisticsScope, StoreError, Upkeep as _,
};
use crate::domain::attempt::Attempt;
use crate::domain::delivery::{Delivery, DeliveryStatus, QueueId};
use crate::domain::endpoint::EndpointId;
use crate::domain::retry::RETRIES_MAX;
use crate::domain::statistics::DurationCounts;

#[async_trait]
impl DeliveryRecords for Database {
    async fn find(&self, queue_id: QueueId) -> Result<Option<Delivery>, StoreError> {
        let row: Option<DeliveryRow> = within!(self.requests, REQUEST_LIMIT, |connection| sqlx::query_as(
            "-- records.find
select q.*, webhook_failed_probes(q.queue_id) as probes from webhook_queue q where q.queue_id = $1"
        )
        .bind(queue_id.get())
        .fetch_optional(&mut *connection))?;
        Ok(row.map(|row| row.0))
    }

    async fn list(&self, filter: &DeliveryFilter, limit: usize) -> Result<Vec<Delivery>, StoreError> {
        let _turn = self.scans.acquire().await.expect("the semaphore is never closed");
        let mut query = list_query(filter, limit);
        let rows: Vec<DeliveryRow> =
            scan!(self, |connection| query.build_query_as().fetch_all(&mut *connection))?;
        Ok(rows.into_iter().map(|row| row.0).collect())
    }

    async fn make_ready(&self, queue_id: QueueId) -> Result<bool, StoreError> {
        let done = within!(self.requests, REQUEST_LIMIT, |connection| sqlx::query!(
            "-- records.make_ready
            update webhook_queue_open
            set ready_since = now(), next_retry_at = now(), updated_at = now()
            where queue_id = $1 and status = 'pending' and ready_since is null",
            queue_id.get()
        )
        .execute(&mut *connection))?;
        Ok(done.rows_affected() == 1)
    }

    async fn cancel(&self, queue_id: QueueId, reason: &str) -> Result<bool, StoreError> {
        let cancelled = match self.cancel_once(queue_id, reason).await {
            Err(error) if lacks_archive(&error) => {
                self.ensure_archives().await?;
                self.cancel_once(queue_id, reason).await?
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
        let facts = scan!(self, |connection| sqlx::query!(
            r#"-- records.statistics
                    select counted_from, fact as "fact!", duration_ms as "duration_ms!",
                           occurrences as "occurrences!", duration_total_ms as "duration_total_ms!"
                    from webhook_statistics_of($1, $2 * interval '1 second')"#,
            config_id,
            window,
        )
        .fetch_all(&mut *connection))?;
        let oldest_ready_age = self.oldest_ready_age_of(scope.config_id).await?;
        let mut statistics = Statistics {
            from: facts.first().and_then(|fact| fact.counted_from),
            oldest_ready_age_ms: oldest_ready_age.map(millis),
            ..Statistics::default()
        };
        let mut durations = DurationCounts::default();
        for fact in facts {
            let occurrences = fact.occurrences.unsigned_abs();
            match fact.fact.as_str() {
                "pending" => statistics.pending += occurrences,
                "processing" => statistics.processing += occurrences,
                "completed" => statistics.completed += occurrences,
                "failed" => statistics.failed += occurrences,
                "cancelled" => statistics.cancelled += occurrences,
                attempt => {
                    statistics.attempts += occurrences;
                    if attempt == "retry" {
                        statistics.retries += occurrences;
                    }
                    // an attempt that was lost with its worker has no duration
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
        let row = scan!(self, |connection| {
            sqlx::query!(
            r#"-- records.backlog
            select ready as "ready!", scheduled as "scheduled!", processing as "processing!" from webhook_backlog()"#
        )
        .fetch_one(&mut *connection)
        })?;
        Ok(Backlog {
            ready: row.ready.unsigned_abs(),
            scheduled: row.scheduled.unsigned_abs(),
            processing: row.processing.unsigned_abs(),
        })
    }

    async fn oldest_ready_age(&self) -> Result<Option<Duration>, StoreError> {
        self.oldest_ready_age_of(None).await
    }
}

impl Database {
    async fn cancel_once(&self, queue_id: QueueId, reason: &str) -> Result<i64, StoreError> {
        within!(self.requests, REQUEST_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- records.cancel
            select count(*) as "count!" from webhook_cancel(array[$1::uuid], $2)"#,
            queue_id.get(),
            reason
        )
        .fetch_one(&mut *connection))
    }

    async fn oldest_ready_age_of(
        &self,
        config_id: Option<EndpointId>,
    ) -> Result<Option<Duration>, StoreError> {
        let age = scan!(self, |connection| sqlx::query_scalar!(
            "-- records.oldest_ready_age
            select webhook_oldest_ready_us($1)",
            config_id.map(EndpointId::get),
        )
        .fetch_one(&mut *connection))?;
        Ok(age.map(from_micros))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Newest first: the order of the key, since ids are made in the order of time.
fn list_query(filter: &DeliveryFilter, limit: usize) -> QueryBuilder<Postgres> {
    let mut query = QueryBuilder::new(
        "-- records.list\nselect q.*, webhook_failed_probes(q.queue_id) as probes from webhook_queue q where q.deleted_at is null",
    );
    if let Some(status) = filter.status {
        // which partitions there are to look into follows from the second half
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
        query
            .push(" and queue_id = any(array(select webhook_deliveries_of_event(")
            .push_bind(event_id.clone())
            .push(")))");
    }
    if let Some(from) = filter.from {
        query.push(" and created_at >= ").push_bind(from);
        // nothing ends before it begins, so older archives can be left out
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

/// A row of `webhook_queue` as a delivery: seven groups of columns become a list of attempts.
struct DeliveryRow(Delivery);

impl FromRow<'_, PgRow> for DeliveryRow {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        let status: String = row.try_get("status")?;
        let status: DeliveryStatus = status.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
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
            });
        }
        let Json(probes): Json<Vec<ProbeRow>> = row.try_get("probes")?;
        attempts.extend(probes.into_iter().map(Attempt::from));
        attempts.sort_by_key(|attempt| attempt.started_at);
        Ok(Self(Delivery {
            queue_id: QueueId::new(row.try_get("queue_id")?),
            event_type: row.try_get("event_type")?,
            event_id: row.try_get("event_id")?,
            config_id: EndpointId::from_stored(row.try_get("config_id")?),
            webhook_url: row.try_get("webhook_url")?,
            url_params,
            status,
            status_reason: row.try_get("status_reason")?,
            priority: row.try_get("priority")?,
            retry_count: row.try_get("retry_count")?,
            max_retries: row.try_get("max_retries")?,
            next_retry_at: if status.is_terminal() { None } else { row.try_get("next_retry_at")? },
            correlation_id: row.try_get("correlation_id")?,
            traceparent: row.try_get("traceparent")?,
            replay_of: row.try_get::<Option<Uuid>, _>("replay_of")?.map(QueueId::new),
            created_at: row.try_get("created_at")?,
            completed_at: row.try_get("completed_at")?,
            attempts,
        }))
    }
}

/// A failed probe, as `webhook_failed_probes` tells it.
#[derive(Deserialize)]
struct ProbeRow {
    attempt: u8,
    started_at: DateTime<Utc>,
    completed_at: DateTime<Utc>,
    duration_ms: Option<i32>,
    http_status: Option<i16>,
    response_body: Option<String>,
    error: Option<String>,
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
        }
    }
}
