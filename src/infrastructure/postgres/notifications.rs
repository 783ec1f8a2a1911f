//! Wakeups between processes, by LISTEN and NOTIFY. Hints only: what is lost costs a poll's time, nothing else.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::{Database, REQUEST_LIMIT, within};
use crate::application::ports::StoreError;
use crate::application::wakeup::Wakeup;

/// The channel that processes of one database share.
const CHANNEL: &str = "webhook_ready";
/// The shortest time between two announcements of a process: NOTIFY takes a lock of the whole cluster at commit.
const ANNOUNCE_EVERY: Duration = Duration::from_millis(50);
/// How long nothing may come before a listener asks whether its connection still lives.
const QUIET_MAX: Duration = Duration::from_secs(30);
/// The wait before a listener connects again.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// Tells other processes that something is ready here, at most once in 50 ms, outside any transaction. `listener` is who
/// this process listens as: it need not be told by itself.
pub async fn announce_ready(
    database: Database,
    listener: Uuid,
    wakeup: Arc<Wakeup>,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = wakeup.announced() => {}
        }
        if let Err(cause) = tell_ready(&database, Some(listener)).await {
            debug!(error = %cause, "other processes could not be told; they find it when they poll");
        }
        sleep(ANNOUNCE_EVERY).await;
    }
}

/// Tells all processes once, but for the one that listens as `except`.
pub async fn tell_ready(database: &Database, except: Option<Uuid>) -> Result<(), StoreError> {
    within!(database.engine, REQUEST_LIMIT, |connection| sqlx::query!(
        "-- notifications.tell_ready
        select pg_notify($1, $2) as notified",
        CHANNEL,
        except.map(|listener| listener.to_string()).unwrap_or_default(),
    )
    .execute(&mut *connection))?;
    Ok(())
}

/// Wakes the claimer here whenever a process other than the one that listens as `listener` announces something. `options`
/// must lead to PostgreSQL itself, or to a pooler that keeps sessions.
pub async fn listen_for_ready(
    options: PgConnectOptions,
    listener: Uuid,
    wakeup: Arc<Wakeup>,
    stop: CancellationToken,
) {
    let own = listener.to_string();
    let mut told = false;
    while !stop.is_cancelled() {
        let result = tokio::select! {
            () = stop.cancelled() => return,
            result = listen_until_lost(&options, &own, &wakeup) => result,
        };
        match result {
            Ok(()) => info!("the connection for wakeups was lost; connecting again"),
            Err(cause) if !told => {
                told = true;
                warn!(error = %cause, "no wakeups from other processes for now; polling goes on");
            }
            Err(cause) => debug!(error = %cause, "still no wakeups from other processes"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(RECONNECT_AFTER) => {}
        }
    }
}

async fn listen_until_lost(options: &PgConnectOptions, own: &str, wakeup: &Wakeup) -> sqlx::Result<()> {
    let pool = PgPoolOptions::new().max_connections(1).connect_with(options.clone()).await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.listen(CHANNEL).await?;
    // what was announced while nobody listened
    wakeup.wake_claimer();
    loop {
        match timeout(QUIET_MAX, listener.try_recv()).await {
            Ok(Ok(Some(told))) if told.payload() == own => {}
            Ok(Ok(Some(_))) => wakeup.wake_claimer(),
            Ok(Ok(None)) => return Ok(()),
            Ok(Err(error)) => return Err(error),
            // a connection may be dead without a sign: to listen once more is a question that must be answered
            Err(_) => match timeout(REQUEST_LIMIT, listener.listen(CHANNEL)).await {
                Ok(answered) => answered?,
                Err(_) => return Ok(()),
            },
        }
    }
}
