//! Archives, statistics and clearing up: functions of the schema, called from time to time.

use std::time::Duration;

use async_trait::async_trait;

use super::{Database, SCAN_LIMIT, within};
use crate::application::ports::{StoreError, Upkeep};

/// How many days of archives are made ahead.
const ARCHIVE_DAYS_AHEAD: i32 = 7;
/// How many event keys, or failed probes, are forgotten at a time.
const ROWS_MAX: i32 = 10_000;
/// How many orphans are cancelled at a time: each time costs a walk over the open deliveries.
const ORPHANS_MAX: i32 = 20_000;
/// How many transactions are counted at a time; each settled at most a few hundred deliveries.
const COUNT_TRANSACTIONS: i64 = 2_000;
/// How long it may take to index an archive, or to number the transactions of all archives anew after a restore.
const REWRITE_LIMIT: Duration = Duration::from_mins(30);

/// Forgets what is older than `$retention`, `ROWS_MAX` rows at a time; answers how many. A macro, because the text of a
/// checked query must be a literal.
macro_rules! forget_in_steps {
    ($database:expr, $retention:expr, $statement:literal) => {{
        let mut total = 0;
        loop {
            let forgotten = within!($database.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
                $statement,
                $retention.as_secs_f64(),
                ROWS_MAX
            )
            .fetch_one(&mut *connection))?
            .unsigned_abs();
            total += forgotten;
            if forgotten < u64::from(ROWS_MAX.unsigned_abs()) {
                return Ok(total);
            }
        }
    }};
}

#[async_trait]
impl Upkeep for Database {
    async fn ensure_archives(&self) -> Result<u64, StoreError> {
        let made = within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- upkeep.ensure_archives
            select webhook_ensure_archives($1) as "made!""#,
            ARCHIVE_DAYS_AHEAD
        )
        .fetch_one(&mut *connection))?;
        Ok(u64::from(made.unsigned_abs()))
    }

    async fn index_closed_archives(&self) -> Result<u64, StoreError> {
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

    async fn drop_archives(&self, retention: Duration) -> Result<u64, StoreError> {
        let dropped = within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- upkeep.drop_archives
            select webhook_drop_archives($1 * interval '1 second') as "dropped!""#,
            retention.as_secs_f64(),
        )
        .fetch_one(&mut *connection))?;
        Ok(u64::from(dropped.unsigned_abs()))
    }

    async fn forget_statistics(&self) -> Result<u64, StoreError> {
        let forgotten = within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- upkeep.forget_statistics
            select webhook_forget_statistics() as "forgotten!""#
        )
        .fetch_one(&mut *connection))?;
        Ok(forgotten.unsigned_abs())
    }

    async fn forget_events(&self, retention: Duration) -> Result<u64, StoreError> {
        forget_in_steps!(
            self,
            retention,
            r#"-- upkeep.forget_events
            select webhook_forget_events($1 * interval '1 second', $2) as "forgotten!""#
        )
    }

    async fn forget_probes(&self, retention: Duration) -> Result<u64, StoreError> {
        forget_in_steps!(
            self,
            retention,
            r#"-- upkeep.forget_probes
            select webhook_forget_probes($1 * interval '1 second', $2) as "forgotten!""#
        )
    }

    async fn count_statistics(&self, recent: Duration) -> Result<u64, StoreError> {
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

    async fn coarsen_statistics(&self) -> Result<u64, StoreError> {
        let merged = within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
            r#"-- upkeep.coarsen_statistics
            select webhook_coarsen_statistics() as "merged!""#
        )
        .fetch_one(&mut *connection))?;
        Ok(merged.unsigned_abs())
    }

    async fn cancel_orphans(&self) -> Result<u64, StoreError> {
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
}

impl Database {
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
            // whoever has begun goes on
            recent = Duration::ZERO;
            if row.caught_up {
                return Ok(total);
            }
            // what is empty is crossed in ever longer steps: other databases of the cluster use transactions too
            step = if row.counted == 0 {
                step.saturating_mul(16).min(i64::from(i32::MAX))
            } else {
                COUNT_TRANSACTIONS
            };
        }
    }
}
