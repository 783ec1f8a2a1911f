//! Upkeep of the tables: archives, statistics, orphans. Every process does it.

mod steps;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use self::steps::Forgetting;
use super::Database;
use crate::application::duties::Duties;
use crate::application::ports::StoreError;

/// How often terminal deliveries are counted.
const COUNT_EVERY: Duration = Duration::from_secs(2);
/// A process counts only if the last count is older than this.
const COUNT_LAG: Duration = Duration::from_secs(1);
/// How often open deliveries of deleted endpoints are looked for.
const ORPHANS_EVERY: Duration = Duration::from_secs(10);
/// How often archives are made ahead, indexed and retired.
const ARCHIVES_EVERY: Duration = Duration::from_hours(1);
/// The wait after a failure. It is short because these steps give up instead of waiting for a lock.
const ARCHIVES_AGAIN: Duration = Duration::from_secs(30);

/// Does the upkeep until `stop`, and then ends at once. A step that is interrupted is rolled back; another process does it later.
pub async fn run(database: Database, retention: Duration, duties: Arc<Duties>, stop: CancellationToken) {
    let upkeep = Upkeep { database, retention, duties };
    tokio::select! {
        () = stop.cancelled() => {}
        () = upkeep.run_for_ever() => {}
    }
}

struct Upkeep {
    database: Database,
    retention: Duration,
    duties: Arc<Duties>,
}

impl Upkeep {
    async fn run_for_ever(&self) {
        let (mut archives_due, mut orphans_due) = (Instant::now(), Instant::now());
        // an earlier process may have left something to forget
        let mut forgetting_due = Instant::now();
        loop {
            let now = Instant::now();
            if now >= archives_due {
                let pause = if self.look_after_archives().await { ARCHIVES_EVERY } else { ARCHIVES_AGAIN };
                archives_due = now + pause;
                forgetting_due = now;
            }
            let counted =
                self.noted("counting terminal deliveries", self.database.count_statistics(COUNT_LAG).await);
            if let Some(count @ 1..) = counted {
                debug!(count, "terminal deliveries counted");
            }
            if now >= forgetting_due {
                forgetting_due = now + self.forget_retired().await;
            }
            if now >= orphans_due {
                orphans_due = now + ORPHANS_EVERY;
                let cancelled = self
                    .noted("cancelling deliveries of deleted configs", self.database.cancel_orphans().await);
                if let Some(count @ 1..) = cancelled {
                    info!(count, "open deliveries of deleted configs cancelled");
                }
            }
            sleep_until(now + COUNT_EVERY).await;
        }
    }

    /// Makes archives ahead, indexes closed ones, retires old ones. Returns whether all of it worked.
    async fn look_after_archives(&self) -> bool {
        let database = &self.database;
        let steps = [
            ("making archives ahead", database.ensure_archives().await),
            ("indexing closed archives", database.index_closed_archives().await),
            ("taking out archives", self.retire_archives().await),
            ("forgetting old statistics", database.forget_statistics().await),
            ("merging statistics", database.coarsen_statistics().await),
        ];
        let mut all_well = true;
        for (step, result) in steps {
            match self.noted(step, result) {
                Some(0) => {}
                Some(count) => info!(count, "{step}: done"),
                None => all_well = false,
            }
        }
        all_well
    }

    /// Retires the archives that are past the retention. Logs each by name, because its deliveries can no longer be found.
    async fn retire_archives(&self) -> Result<u64, StoreError> {
        let retired = self.database.retire_archives(self.retention).await?;
        for archive in &retired {
            info!(archive, retention_s = self.retention.as_secs(), "the archive is past ARCHIVE_RETENTION");
        }
        Ok(retired.len() as u64)
    }

    /// Deletes some of the keys of retired archives. Returns the wait before the next part.
    async fn forget_retired(&self) -> Duration {
        let forgotten = self.database.forget_retired().await;
        let Some(Forgetting { keys, dropped, left }) =
            self.noted("forgetting what is past ARCHIVE_RETENTION", forgotten)
        else {
            return ARCHIVES_AGAIN;
        };
        if keys > 0 {
            debug!(keys, "keys of events and replays forgotten");
        }
        for archive in dropped {
            info!(archive, "the archive is dropped");
        }
        if left { COUNT_EVERY } else { ARCHIVES_EVERY }
    }

    /// Notes whether a step worked. Returns its result, `None` if it failed.
    fn noted<T>(&self, step: &'static str, result: Result<T, StoreError>) -> Option<T> {
        match result {
            Ok(answer) => {
                self.duties.done(step);
                Some(answer)
            }
            Err(cause) => {
                self.duties.failed(step, &cause);
                None
            }
        }
    }
}
