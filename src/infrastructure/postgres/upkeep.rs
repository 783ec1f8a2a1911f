//! Archives, statistics and clearing up: functions of the schema, called from time to time.

use std::time::Duration;

use async_trait::async_trait;

use super::{Database, SCAN_LIMIT, within};
use crate::application::ports::{StoreError, Upkeep};

/// How many days of archives are made ahead.
const ARCHIVE_DAYS_AHEAD: i32 = 7;
/// How many event keys are forgotten at a time.
const KEYS_MAX: i32 = 10_000;
/// How many orphans are cancelled at a time.
const ORPHANS_MAX: i32 = 1_000;

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
        // an index on a day of many millions of deliveries takes minutes
        let limit = SCAN_LIMIT * 60;
        let indexed = within!(self.engine, limit, |connection| sqlx::query_scalar!(
            r#"-- upkeep.index_closed_archives
            select webhook_index_closed_archives() as "indexed!""#
        )
        .fetch_one(&mut *connection))?;
        Ok(u64::from(indexed.unsigned_abs()))
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

    async fn forget_events(&self, retention: Duration) -> Result<u64, StoreError> {
        let mut total = 0;
        loop {
            let forgotten = within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
                r#"-- upkeep.forget_events
                select webhook_forget_events($1 * interval '1 second', $2) as "forgotten!""#,
                retention.as_secs_f64(),
                KEYS_MAX,
            )
            .fetch_one(&mut *connection))?
            .unsigned_abs();
            total += forgotten;
            if forgotten < u64::from(KEYS_MAX.unsigned_abs()) {
                return Ok(total);
            }
        }
    }

    async fn count_statistics(&self) -> Result<Option<u64>, StoreError> {
        let counted = within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
            "-- upkeep.count_statistics
            select webhook_count_statistics()"
        )
        .fetch_one(&mut *connection))?;
        Ok(counted.map(i64::unsigned_abs))
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
        let mut total = 0;
        loop {
            let cancelled = within!(self.engine, SCAN_LIMIT, |connection| sqlx::query_scalar!(
                r#"-- upkeep.cancel_orphans
                select webhook_cancel_orphans($1) as "cancelled!""#,
                ORPHANS_MAX
            )
            .fetch_one(&mut *connection))?
            .unsigned_abs();
            total += cancelled;
            if cancelled < u64::from(ORPHANS_MAX.unsigned_abs()) {
                metrics::counter!("webhook_deliveries_total", "status" => "cancelled").increment(total);
                return Ok(total);
            }
        }
    }
}
