//! The queue's hot path. Its statements call functions of the schema, which pin their plans; see the migrations.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::types::Uuid;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tracing::warn;

use super::errors::{inconsistent, lacks_archive};
use super::floors::{Floor, Found, Line};
use super::operators::record;
use super::within::{SCAN_LIMIT, within};
use super::{Database, ENGINE_LIMIT, from_micros, micros};
use crate::application::ports::{
    Change, Claim, Claimed, DeliveryQueue, Incoming, Promotion, Settled, StoreError, Stored, UnusedLease,
};
use crate::application::workers::ledger::Rooms;
use crate::domain::access::Action;
use crate::domain::delivery::{
    FinishedAttempt, Lease, LeasedDelivery, NewDelivery, Priority, QueueId, Work, WorkerId,
};
use crate::domain::endpoint::EndpointId;
use crate::domain::error_kind::ErrorKind;
use crate::domain::retry::{DeadLetterReason, Verdict};

#[async_trait]
impl DeliveryQueue for Database {
    async fn enqueue(&self, deliveries: &[Incoming<'_>]) -> Result<Vec<Stored>, StoreError> {
        let mut sorted = deliveries.to_vec();
        // sorted, so that two enqueues with the same events never wait for each other in a circle
        sorted.sort_unstable_by_key(|i| {
            let d = i.delivery;
            (d.config_id, d.event_type, d.replay_of, &d.event_id)
        });
        let exceptions = within!(self.engine, ENGINE_LIMIT, |connection| store(&mut connection, &sorted))?;
        let stored = |incoming: &Incoming<'_>| {
            exceptions.get(&incoming.delivery.queue_id.get()).copied().unwrap_or(STORED)
        };
        let stored: Vec<_> = deliveries.iter().map(stored).collect();
        // a batch of duplicates only reads, so it does not show that writes work
        if stored.iter().any(|stored| matches!(stored, Stored::New { .. })) {
            self.writability.note_write();
        }
        Ok(stored)
    }

    async fn release(&self, leases: &[UnusedLease]) -> Result<Vec<QueueId>, StoreError> {
        let ids: Vec<Uuid> = leases.iter().map(|lease| lease.queue_id.get()).collect();
        let workers: Vec<&str> = leases.iter().map(|lease| lease.worker_id.as_str()).collect();
        let locked_ats: Vec<Option<DateTime<Utc>>> = leases.iter().map(|lease| lease.locked_at).collect();
        let released = within!(self.engine, ENGINE_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- queue.release
            select webhook_release($1, $2, $3) as "queue_id!""#,
            &ids,
            &workers as &[&str],
            &locked_ats as &[Option<DateTime<Utc>>],
        )
        .fetch_all(&mut *connection))?;
        Ok(released.into_iter().map(QueueId::new).collect())
    }

    async fn release_lost_claims(&self, workers: &[WorkerId], kept: &[QueueId]) -> Result<u64, StoreError> {
        let workers: Vec<&str> = workers.iter().map(WorkerId::as_str).collect();
        let kept: Vec<Uuid> = kept.iter().map(|queue_id| queue_id.get()).collect();
        let released = within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- queue.release_lost_claims
            select webhook_release_lost_claims($1, $2) as "released!""#,
            &workers as &[&str],
            &kept,
        )
        .fetch_one(&mut *connection))?;
        Ok(released.unsigned_abs())
    }

    async fn claim(&self, claim: &Claim) -> Result<Claimed, StoreError> {
        let floors = self.floors().for_claim();
        let (found, deliveries): (Vec<Found>, _) =
            self.take_leases(claim, &floors, Endpoints::Open).await?.into_iter().unzip();
        let look_again = self.floors().learn(&floors, claim.worker_ids.len(), &claim.rooms, &found);
        Ok(Claimed { deliveries, look_again })
    }

    async fn take_over_held(
        &self,
        worker: &WorkerId,
        lease_term: Duration,
        limit: usize,
    ) -> Result<Vec<LeasedDelivery>, StoreError> {
        let claim = Claim {
            worker_ids: vec![worker.clone(); limit],
            lease_term,
            after: None,
            rooms: Rooms { limit, share: limit, listed: vec![] },
        };
        let taken = self.take_leases(&claim, &[], Endpoints::Held).await?;
        Ok(taken.into_iter().map(|(_, delivery)| delivery).collect())
    }

    async fn settle(&self, attempts: &[&FinishedAttempt]) -> Result<Vec<Settled>, StoreError> {
        let written = match self.settle_once(attempts).await {
            Err(error) if lacks_archive(&error) => {
                self.ensure_archives().await?;
                self.settle_once(attempts).await?
            }
            result => result?,
        };
        let settled = attempts.iter().map(|attempt| {
            if written.contains(&written_key(attempt)) { Settled::Written } else { Settled::LeaseLost }
        });
        Ok(settled.collect())
    }

    async fn can_settle(&self) -> Result<(), StoreError> {
        self.writability
            .checked()
            .await
            .map_err(|sentence| StoreError::Unavailable(Arc::new(anyhow::anyhow!(sentence))))
    }

    async fn recorded(&self, attempts: &[&FinishedAttempt]) -> Result<Vec<QueueId>, StoreError> {
        let ids: Vec<Uuid> = attempts.iter().map(|attempt| attempt.queue_id.get()).collect();
        let rows = within!(self.engine, ENGINE_LIMIT, |connection| {
            sqlx::query!(
            r#"-- queue.recorded
            select queue_id as "queue_id!", attempt as "attempt!", http_status, error, duration_ms
            from webhook_attempts
            where queue_id = any($1) and (delivery_completed_at >= now() - interval '1 day' or delivery_completed_at is null)"#,
            &ids,
        )
        .fetch_all(&mut *connection)
        })?;
        let is_recorded = |attempt: &&&FinishedAttempt| {
            rows.iter().any(|row| {
                row.queue_id == attempt.queue_id.get()
                    && row.attempt == i32::from(attempt.number)
                    && row.duration_ms == duration_ms(attempt)
                    && row.http_status == http_status(attempt)
                    && row.error == attempt.outcome.error()
            })
        };
        Ok(attempts.iter().filter(is_recorded).map(|attempt| attempt.queue_id).collect())
    }

    async fn reroute(&self, delivery: &NewDelivery, reason: &str) -> Result<Option<Stored>, StoreError> {
        match self.reroute_once(delivery, reason).await {
            Err(error) if lacks_archive(&error) => {
                self.ensure_archives().await?;
                self.reroute_once(delivery, reason).await
            }
            result => result,
        }
    }

    async fn promote(&self, limit: usize) -> Result<Promotion, StoreError> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let row = within!(self.engine, ENGINE_LIMIT, |connection| sqlx::query!(
            r#"-- queue.promote
            select promoted as "promoted!", next_due_us from webhook_promote($1)"#,
            limit
        )
        .fetch_one(&mut *connection))?;
        let promoted = usize::try_from(row.promoted).unwrap_or_default();
        Ok(Promotion { promoted, next_due_in: row.next_due_us.map(from_micros) })
    }
}

/// The endpoints to take leases from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Endpoints {
    /// Endpoints whose deliveries may be attempted.
    Open,
    /// Held endpoints. Only expired leases are taken there.
    Held,
}

impl Database {
    async fn take_leases(
        &self,
        claim: &Claim,
        floors: &[Floor],
        endpoints: Endpoints,
    ) -> Result<Vec<(Found, LeasedDelivery)>, StoreError> {
        let workers: Vec<&str> = claim.worker_ids.iter().map(WorkerId::as_str).collect();
        let (listed, rooms): (Vec<i64>, Vec<i32>) = claim
            .rooms
            .listed
            .iter()
            .map(|(endpoint, room)| (endpoint.get(), i32::try_from(*room).unwrap_or(i32::MAX)))
            .unzip();
        let (floor_keys, floors): (Vec<i64>, Vec<DateTime<Utc>>) =
            floors.iter().map(|floor| (floor.key(), floor.ready_since)).unzip();
        // taken before the leases begin, so that no attempt gets more time than its lease has
        let claimed_at = Instant::now();
        let rows = within!(self.engine, ENGINE_LIMIT, |connection| {
            sqlx::query!(
            r#"-- queue.claim
            select queue_id as "queue_id!", config_id as "config_id!", config_revision as "config_revision!",
                   event_id as "event_id!", webhook_url as "webhook_url!",
                   traceparent, retry_count as "retry_count!", max_retries as "max_retries!", worker_id as "worker_id!",
                   locked_at as "locked_at!", abandoned_at, waited_us as "waited_us!",
                   priority as "priority!", ready_since as "ready_since!",
                   probe as "probe!", in_flight_limited as "in_flight_limited!", starts_in_us
            from webhook_claim($1, $2 * interval '1 microsecond', $3, $4, $5, $6, $7, $8, $9)"#,
            &workers as &[&str],
            // the SQL operator takes a double, which holds a lease term exactly
            claim.lease_term.as_secs_f64() * 1e6,
            claim.after.map_or(0, EndpointId::get),
            endpoints == Endpoints::Held,
            i32::try_from(claim.rooms.share).unwrap_or(i32::MAX),
            &listed,
            &rooms,
            &floor_keys,
            &floors,
        )
        .fetch_all(&mut *connection)
        })?;
        let answered_at = Instant::now();
        let taken = rows.into_iter().map(|row| {
            let config_id = EndpointId::from_stored(row.config_id);
            let priority = Priority::parse("priority", row.priority.into()).map_err(inconsistent)?;
            let found = Found {
                line: Line { endpoint: config_id, priority },
                ready_since: row.ready_since,
                is_limited: row.in_flight_limited || row.starts_in_us.is_some(),
            };
            let work = match row.abandoned_at {
                Some(at) => {
                    Work::RecordLoss { leased_for: (row.locked_at - at).to_std().unwrap_or_default() }
                }
                None => Work::Attempt {
                    waited: from_micros(row.waited_us),
                    // late rather than early: the database counted from a moment before it answered
                    starts_at: row.starts_in_us.map(|us| answered_at + from_micros(us)),
                },
            };
            let delivery = LeasedDelivery {
                queue_id: QueueId::new(row.queue_id),
                lease: Lease { worker_id: WorkerId::from_stored(&row.worker_id), locked_at: row.locked_at },
                config_id,
                config_revision: row.config_revision,
                event_id: row.event_id,
                webhook_url: row.webhook_url,
                traceparent: row.traceparent,
                attempt: u8::try_from(row.retry_count).map_err(inconsistent)?,
                max_retries: u8::try_from(row.max_retries).map_err(inconsistent)?,
                priority,
                probe: row.probe,
                in_flight_limited: row.in_flight_limited,
                claimed_at,
                work,
            };
            Ok((found, delivery))
        });
        taken.collect()
    }

    async fn settle_once(&self, attempts: &[&FinishedAttempt]) -> Result<Written, StoreError> {
        within!(self.engine, ENGINE_LIMIT, |connection| settle_all(&mut connection, attempts))
    }

    async fn reroute_once(&self, delivery: &NewDelivery, reason: &str) -> Result<Option<Stored>, StoreError> {
        let rerouted = within!(self.engine, ENGINE_LIMIT, |connection| async {
            let mut transaction = connection.begin().await?;
            let row = sqlx::query!(
                r#"-- queue.reroute
            select first_queue_id, first_cancelled
            from webhook_reroute($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)"#,
                delivery.replay_of.map(QueueId::get),
                reason,
                delivery.queue_id.get(),
                delivery.event_type.as_str(),
                delivery.event_id,
                delivery.config_id.get(),
                delivery.config_revision,
                delivery.webhook_url,
                delivery.url_params,
                i16::from(delivery.priority.get()),
                i16::from(delivery.max_retries),
                delivery.scheduled_at,
                delivery.correlation_id,
                delivery.traceparent,
            )
            .fetch_optional(&mut *transaction)
            .await?;
            let rerouted = row.map(|row| match (row.first_queue_id, row.first_cancelled) {
                (Some(first), cancelled) => {
                    Stored::Duplicate { first: QueueId::new(first), cancelled: cancelled.unwrap_or_default() }
                }
                (None, None) => STORED,
                (None, Some(_)) => Stored::EndpointChanged,
            });
            if rerouted == Some(STORED) {
                record_replay(&mut transaction, delivery).await?;
            }
            transaction.commit().await?;
            Ok(rerouted)
        })?;
        Ok(rerouted)
    }
}

fn duration_ms(attempt: &FinishedAttempt) -> Option<i32> {
    attempt.times.duration().map(|duration| i32::try_from(duration.as_millis()).unwrap_or(i32::MAX))
}

fn http_status(attempt: &FinishedAttempt) -> Option<i16> {
    attempt.outcome.status().map(|status| i16::try_from(status).unwrap_or(i16::MAX))
}

/// The result for a delivery that [`insert`] does not list.
const STORED: Stored = Stored::New { locked_at: None };

/// Stores deliveries, and records who asked for those that are replays, in one transaction.
async fn store(
    connection: &mut PgConnection,
    deliveries: &[Incoming<'_>],
) -> sqlx::Result<HashMap<Uuid, Stored>> {
    if deliveries.iter().all(|incoming| incoming.delivery.replayed_by.is_none()) {
        // one statement needs no explicit transaction
        return insert(connection, deliveries).await;
    }
    let mut transaction = connection.begin().await?;
    let exceptions = insert(&mut transaction, deliveries).await?;
    for Incoming { delivery, .. } in deliveries {
        let stored = exceptions.get(&delivery.queue_id.get()).unwrap_or(&STORED);
        if matches!(stored, Stored::New { .. }) {
            record_replay(&mut transaction, delivery).await?;
        }
    }
    transaction.commit().await?;
    Ok(exceptions)
}

/// Records who asked for a replay, if it is one.
async fn record_replay(connection: &mut PgConnection, delivery: &NewDelivery) -> sqlx::Result<()> {
    let (Some(operator), Some(replayed)) = (&delivery.replayed_by, delivery.replay_of) else { return Ok(()) };
    let made = json!({ "queue_id": delivery.queue_id.get() });
    record(connection, &Change::new(operator, Action::ReplayDelivery).to(made), replayed).await
}

/// Stores deliveries. Lists those that are leased and those that were not stored.
async fn insert(
    connection: &mut PgConnection,
    deliveries: &[Incoming<'_>],
) -> sqlx::Result<HashMap<Uuid, Stored>> {
    macro_rules! column {
        (|$delivery:ident| $value:expr) => {
            deliveries.iter().map(|incoming| incoming.delivery).map(|$delivery| $value).collect::<Vec<_>>()
        };
    }
    let (workers, leases): (Vec<Option<&str>>, Vec<Option<i64>>) = deliveries
        .iter()
        .map(|incoming| incoming.lease.map(|wanted| (wanted.worker_id.as_str(), micros(wanted.term))).unzip())
        .unzip();
    let rows = sqlx::query!(
        r#"-- queue.enqueue
        select queue_id as "queue_id!", first_queue_id, locked_at, first_cancelled
        from webhook_enqueue($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)"#,
        &column!(|d| d.queue_id.get()),
        &column!(|d| d.event_type.as_str()) as &[&str],
        &column!(|d| d.event_id.as_str()) as &[&str],
        &column!(|d| d.named),
        &column!(|d| d.config_id.get()),
        &column!(|d| d.config_revision),
        &column!(|d| d.webhook_url.as_str()) as &[&str],
        &column!(|d| d.url_params.as_str()) as &[&str],
        &column!(|d| i16::from(d.priority.get())),
        &column!(|d| i16::from(d.max_retries)),
        &column!(|d| d.scheduled_at) as &[Option<DateTime<Utc>>],
        &column!(|d| d.correlation_id.as_deref()) as &[Option<&str>],
        &column!(|d| d.traceparent.as_deref()) as &[Option<&str>],
        &column!(|d| d.replay_of.map(QueueId::get)) as &[Option<Uuid>],
        &workers as &[Option<&str>],
        &leases as &[Option<i64>],
    )
    .fetch_all(connection)
    .await?;
    let told = rows.into_iter().map(|row| {
        let stored = match (row.first_queue_id, row.locked_at) {
            (Some(first), _) => Stored::Duplicate {
                first: QueueId::new(first),
                cancelled: row.first_cancelled.unwrap_or_default(),
            },
            (None, None) => Stored::EndpointChanged,
            (None, locked_at) => Stored::New { locked_at },
        };
        (row.queue_id, stored)
    });
    Ok(told.collect())
}

/// What an attempt means for its delivery. One statement writes all attempts with the same number and ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Ending {
    Retry,
    Terminal,
    WaitsOn,
}

/// Writes attempts in one transaction. Returns the deliveries whose lease was still held.
async fn settle_all(connection: &mut PgConnection, attempts: &[&FinishedAttempt]) -> sqlx::Result<Written> {
    // a known outcome is written before a loss of the same attempt
    let mut groups: BTreeMap<(u8, bool, Ending), Vec<&FinishedAttempt>> = BTreeMap::new();
    for &attempt in attempts {
        let ending = match attempt.verdict {
            Verdict::RetryIn(_) => Ending::Retry,
            Verdict::WaitsOn | Verdict::Postponed => Ending::WaitsOn,
            _ => Ending::Terminal,
        };
        let lost = attempt.times.duration().is_none();
        groups.entry((attempt.number, lost, ending)).or_default().push(attempt);
    }
    let gone: Vec<&FinishedAttempt> = attempts
        .iter()
        .copied()
        .filter(|attempt| attempt.verdict == Verdict::DeadLetter(DeadLetterReason::EndpointGone))
        .collect();

    // most batches are one statement, which needs no explicit transaction
    if groups.len() == 1 && gone.is_empty() {
        let ((number, _, ending), group) = groups.pop_first().expect("there is one");
        return settle_group(connection, number, ending, group).await;
    }
    let mut transaction = connection.begin().await?;
    let mut written = Written::new();
    for ((number, _, ending), group) in groups {
        written.extend(settle_group(&mut transaction, number, ending, group).await?);
    }
    // an attempt that lost its lease must not disable the endpoint
    let gone = gone.into_iter().filter(|attempt| written.contains(&written_key(attempt)));
    let mut disabled = 0;
    let (gone, urls): (Vec<i64>, Vec<&str>) =
        gone.map(|attempt| (attempt.config_id.get(), attempt.webhook_url.as_str())).unzip();
    if !gone.is_empty() {
        let done = sqlx::query!(
            "-- queue.disable_gone_endpoints
            update webhook_configs c
            set enabled = false, disabled_reason = $3,
                updated_at = greatest(clock_timestamp(), c.updated_at + interval '1 microsecond')
            where c.enabled and exists (
              select from unnest($1::bigint[], $2::text[]) as gone (id, url)
              where gone.id = c.id
                -- an URL that the endpoint had before says nothing about the one that it has now
                and (webhook_is_at(gone.url, c.postback_url) or webhook_is_at(gone.url, c.chargeback_url)))",
            &gone,
            &urls as &[&str],
            DeadLetterReason::EndpointGone.as_str(),
        )
        .execute(&mut *transaction)
        .await?;
        disabled = done.rows_affected();
    }
    transaction.commit().await?;
    if disabled > 0 {
        let config_ids: BTreeSet<i64> = gone.into_iter().collect();
        warn!(?config_ids, "a receiver answered 410 Gone: its config is disabled, and its deliveries wait");
    }
    Ok(written)
}

async fn settle_group(
    connection: &mut PgConnection,
    number: u8,
    ending: Ending,
    mut attempts: Vec<&FinishedAttempt>,
) -> sqlx::Result<Written> {
    macro_rules! column {
        (|$attempt:ident| $value:expr) => {
            attempts.iter().map(|$attempt| $value).collect::<Vec<_>>()
        };
    }
    // sorted, so that two settles never wait for each other in a circle (deadlock)
    attempts.sort_unstable_by_key(|attempt| attempt.queue_id);
    let now = Instant::now();
    let statement = match ending {
        Ending::Retry => format!(
            "-- queue.settle\nselect * from webhook_settle_{number}_retry($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"
        ),
        Ending::Terminal => format!(
            "-- queue.settle\nselect * from webhook_settle_{number}_terminal($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)"
        ),
        Ending::WaitsOn => {
            "-- queue.settle\nselect * from webhook_settle_probe($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"
                .to_owned()
        }
    };
    // the only variable part of the text is a number from 0 to 6
    let query = sqlx::query_scalar::<_, Uuid>(AssertSqlSafe(statement))
        .bind(column!(|a| a.queue_id.get()))
        .bind(column!(|a| a.lease.worker_id.as_str()))
        .bind(column!(|a| a.lease.locked_at))
        .bind(column!(|a| micros(a.times.age(now))))
        .bind(column!(|a| micros(a.times.length())))
        .bind(column!(|a| duration_ms(a)))
        .bind(column!(|a| http_status(a)))
        .bind(column!(|a| a.outcome.body()))
        .bind(column!(|a| a.outcome.error()));
    let query = match ending {
        Ending::Retry => query.bind(column!(|a| match a.verdict {
            Verdict::RetryIn(delay) => micros(delay),
            _ => unreachable!("grouped by verdict"),
        })),
        Ending::WaitsOn => query.bind(column!(|a| a.verdict == Verdict::Postponed)),
        Ending::Terminal => query
            .bind(column!(|a| a.verdict.final_status().expect("grouped by verdict").as_str()))
            .bind(column!(|a| a.verdict.final_reason())),
    };
    let query = query.bind(column!(|a| a.outcome.error_kind().map(ErrorKind::as_str))).bind(column!(|a| {
        let evidence = a.outcome.evidence();
        evidence.map(|evidence| serde_json::to_string(&evidence).expect("it is plain text and numbers"))
    }));
    let written: HashSet<Uuid> = query.fetch_all(connection).await?.into_iter().collect();
    Ok(attempts
        .into_iter()
        .filter(|attempt| written.contains(&attempt.queue_id.get()))
        .map(written_key)
        .collect())
}

/// The leases whose attempts were written. A delivery may have two in one batch: a known outcome and a loss.
type Written = HashSet<(Uuid, DateTime<Utc>)>;

fn written_key(attempt: &FinishedAttempt) -> (Uuid, DateTime<Utc>) {
    (attempt.queue_id.get(), attempt.lease.locked_at)
}
