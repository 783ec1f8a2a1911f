//! The steps of upkeep. Each is a function of the schema, which ensures that no work is done twice.

use std::time::Duration;

use super::super::Database;
use super::super::within::{SCAN_LIMIT, within};
use crate::application::ports::StoreError;

/// How many days of archives are made ahead.
const ARCHIVE_DAYS_AHEAD: i32 = 7;
/// How many archives all processes together retire per hour. A wrong clock or a mistyped retention costs no more than these.
const RETIRED_PER_HOUR: i32 = 4;
/// For how many deliveries one statement deletes the keys. Few, because enqueues of the same events wait for it.
const ROWS_MAX: i32 = 2_000;
/// How many such statements run in a row. Counts wait for them.
const FORGETTING_STEPS: u32 = 50;
/// How many orphans one statement cancels. Many, because each statement walks over the open deliveries.
const ORPHANS_MAX: i32 = 20_000;
/// How many transactions one statement counts. Each settled at most a few hundred deliveries.
const COUNT_TRANSACTIONS: i64 = 2_000;
/// How long it may take to index an archive, or to renumber the transactions of all archives after a restore.
const REWRITE_LIMIT: Duration = Duration::from_mins(30);

/// The progress of forgetting retired archives.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Forgetting {
    /// How many keys of events and replays were deleted.
    pub keys: u64,
    /// The names of the archives that were dropped.
    pub dropped: Vec<String>,
    /// Whether more is left to do.
    pub left: bool,
}

impl Database {
    /// Ensures that there are archives for today and the days ahead. Returns how many were made.
    pub async fn ensure_archives(&self) -> Result<u64, StoreError> {
        let made = within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- upkeep.ensure_archives
            select webhook_ensure_archives($1) as "made!""#,
            ARCHIVE_DAYS_AHEAD
        )
        .fetch_one(&mut *connection))?;
        Ok(u64::from(made.unsigned_abs()))
    }

    /// Indexes the archives whose day is over. Returns how many.
    pub async fn index_closed_archives(&self) -> Result<u64, StoreError> {
        let mut total = 0;
        while within!(self.engine, REWRITE_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- upkeep.index_closed_archive
            select webhook_index_closed_archive() as "indexed!""#
        )
        .fetch_one(&mut *connection))?
        {
            total += 1;
        }
        Ok(total)
    }

    /// Detaches archives that are older than `retention` from the queue, a few per hour at most. Their deliveries can no longer be
    /// found, replayed or shown. Returns the names of the archives.
    pub async fn retire_archives(&self, retention: Duration) -> Result<Vec<String>, StoreError> {
        within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- upkeep.retire_archives
            select webhook_retire_archives($1 * interval '1 second', $2) as "archive!""#,
            retention.as_secs_f64(),
            RETIRED_PER_HOUR
        )
        .fetch_all(&mut *connection))
    }

    /// Deletes, in small steps, what was kept with the deliveries of retired archives: the keys of their events and replays, and
    /// their failed probes. Then drops the archives. Each step is a transaction. The number of steps is bounded.
    pub async fn forget_retired(&self) -> Result<Forgetting, StoreError> {
        let mut forgetting = Forgetting::default();
        for _ in 0..FORGETTING_STEPS {
            let step = within!(self.engine, SCAN_LIMIT, |connection| {
                sqlx::query!(
                r#"-- upkeep.forget_retired
                select archive as "archive!", keys as "keys!", dropped as "dropped!" from webhook_forget_retired($1)"#,
                ROWS_MAX
            )
            .fetch_optional(&mut *connection)
            })?;
            // nothing is left, or another process is doing it
            let Some(step) = step else { return Ok(forgetting) };
            forgetting.keys += step.keys.unsigned_abs();
            if step.dropped {
                forgetting.dropped.push(step.archive);
            }
        }
        Ok(Forgetting { left: true, ..forgetting })
    }

    /// Deletes the statistics of archives that were dropped. Returns the number of rows.
    pub async fn forget_statistics(&self) -> Result<u64, StoreError> {
        let forgotten = within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- upkeep.forget_statistics
            select webhook_forget_statistics() as "forgotten!""#
        )
        .fetch_one(&mut *connection))?;
        Ok(forgotten.unsigned_abs())
    }

    /// Counts the deliveries that were settled since the last count. Does nothing if another process is counting, or has counted
    /// within `recent`. Returns the number of deliveries.
    pub async fn count_statistics(&self, recent: Duration) -> Result<u64, StoreError> {
        let counted = self.count_what_was_settled(recent).await?;
        if counted > 0 {
            within!(self.engine, SCAN_LIMIT, |connection| sqlx::query!(
                "-- upkeep.summarize_archives
                select webhook_summarize_archives() as summarized"
            )
            .fetch_one(&mut *connection))?;
        }
        Ok(counted)
    }

    /// Merges old statistics into longer periods. Returns the number of merged rows.
    pub async fn coarsen_statistics(&self) -> Result<u64, StoreError> {
        let merged = within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- upkeep.coarsen_statistics
            select webhook_coarsen_statistics() as "merged!""#
        )
        .fetch_one(&mut *connection))?;
        Ok(merged.unsigned_abs())
    }

    /// Cancels a bounded number of open deliveries of deleted endpoints. Returns how many.
    pub async fn cancel_orphans(&self) -> Result<u64, StoreError> {
        let cancelled = within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- upkeep.cancel_orphans
            select webhook_cancel_orphans($1) as "cancelled!""#,
            ORPHANS_MAX
        )
        .fetch_one(&mut *connection))?
        .unsigned_abs();
        metrics::counter!("webhook_deliveries_total", "status" => "cancelled").increment(cancelled);
        Ok(cancelled)
    }

    async fn count_what_was_settled(&self, mut recent: Duration) -> Result<u64, StoreError> {
        let (mut total, mut step) = (0, COUNT_TRANSACTIONS);
        loop {
            let row = within!(self.engine, REWRITE_LIMIT, |connection| sqlx::query!(
                r#"-- upkeep.count_statistics
                select counted as "counted!", caught_up as "caught_up!"
                from webhook_count_statistics($1, $2 * interval '1 second')"#,
                step,
                recent.as_secs_f64(),
            )
            .fetch_optional(&mut *connection))?;
            // no row: another process counts, or has done so
            let Some(row) = row else { return Ok(total) };
            total += row.counted.unsigned_abs();
            // the process that has begun a count goes on
            recent = Duration::ZERO;
            if row.caught_up {
                return Ok(total);
            }
            // other databases of the cluster use transaction ids too, so empty ranges are crossed in ever longer steps
            step = if row.counted == 0 {
                step.saturating_mul(16).min(i64::from(i32::MAX))
            } else {
                COUNT_TRANSACTIONS
            };
        }
    }
}
