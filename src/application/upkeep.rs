//! What must be done from time to time. Every process does it; the store sees to it that no work is done twice.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::ports::{Forgetting, StoreError, Upkeep};

/// How often terminal deliveries are counted.
const COUNT_EVERY: Duration = Duration::from_secs(2);
/// How far behind counts may be before a process makes one.
const COUNT_LAG: Duration = Duration::from_secs(1);
/// How often open deliveries of deleted endpoints are looked for.
const ORPHANS_EVERY: Duration = Duration::from_secs(10);
/// How often archives are made ahead, indexed and taken out.
const ARCHIVES_EVERY: Duration = Duration::from_hours(1);
/// How soon that is tried again where it failed: it gives up rather than wait for a lock.
const ARCHIVES_AGAIN: Duration = Duration::from_secs(30);

/// Does it until `stop`, which it does not let wait: what is broken off is rolled back, and done by the next process.
pub async fn run(upkeep: Arc<dyn Upkeep>, retention: Duration, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = run_for_ever(&*upkeep, retention) => {}
    }
}

async fn run_for_ever(upkeep: &dyn Upkeep, retention: Duration) {
    let (mut archives_due, mut orphans_due) = (Instant::now(), Instant::now());
    // a process before may have left something to forget
    let mut forgetting_due = Instant::now();
    loop {
        let now = Instant::now();
        if now >= archives_due {
            archives_due = now
                + if look_after_archives(upkeep, retention).await { ARCHIVES_EVERY } else { ARCHIVES_AGAIN };
            forgetting_due = now;
        }
        count(upkeep).await;
        if now >= forgetting_due {
            forgetting_due = now + forget_retired(upkeep).await;
        }
        if now >= orphans_due {
            orphans_due = now + ORPHANS_EVERY;
            cancel_orphans(upkeep).await;
        }
        sleep_until(now + COUNT_EVERY).await;
    }
}

/// Makes archives ahead, indexes closed ones, takes old ones out. Answers whether all of it worked.
async fn look_after_archives(upkeep: &dyn Upkeep, retention: Duration) -> bool {
    let steps = [
        ("archives made ahead", upkeep.ensure_archives().await),
        ("closed archives indexed", upkeep.index_closed_archives().await),
        ("archives taken out", retire_archives(upkeep, retention).await),
        ("old statistics forgotten", upkeep.forget_statistics().await),
        ("statistics merged", upkeep.coarsen_statistics().await),
    ];
    let mut all_well = true;
    for (step, result) in steps {
        match result {
            Ok(0) => {}
            Ok(count) => info!(count, "{step}"),
            Err(cause) => {
                all_well = false;
                tell(step, cause);
            }
        }
    }
    all_well
}

/// Takes out what is past the retention, and says by name what is lost for look-ups from now on.
async fn retire_archives(upkeep: &dyn Upkeep, retention: Duration) -> Result<u64, StoreError> {
    let retired = upkeep.retire_archives(retention).await?;
    for archive in &retired {
        info!(archive, retention_s = retention.as_secs(), "the archive is past ARCHIVE_RETENTION");
    }
    Ok(retired.len() as u64)
}

/// Forgets a part of what was taken out. Answers when to go on.
async fn forget_retired(upkeep: &dyn Upkeep) -> Duration {
    match upkeep.forget_retired().await {
        Ok(Forgetting { keys, dropped, left }) => {
            if keys > 0 {
                debug!(keys, "keys of events and replays forgotten");
            }
            for archive in dropped {
                info!(archive, "the archive is dropped");
            }
            if left { COUNT_EVERY } else { ARCHIVES_EVERY }
        }
        Err(cause) => {
            tell("forgetting what is past ARCHIVE_RETENTION", cause);
            ARCHIVES_AGAIN
        }
    }
}

async fn count(upkeep: &dyn Upkeep) {
    match upkeep.count_statistics(COUNT_LAG).await {
        Ok(0) => {}
        Ok(count) => debug!(count, "terminal deliveries counted"),
        Err(cause) => tell("counting terminal deliveries", cause),
    }
}

async fn cancel_orphans(upkeep: &dyn Upkeep) {
    match upkeep.cancel_orphans().await {
        Ok(0) => {}
        Ok(count) => info!(count, "open deliveries of deleted configs cancelled"),
        Err(cause) => tell("cancelling deliveries of deleted configs", cause),
    }
}

fn tell(step: &str, cause: StoreError) {
    let cause = anyhow::Error::new(cause);
    warn!(step, error = format!("{cause:#}"), "upkeep failed; it is tried again");
}
