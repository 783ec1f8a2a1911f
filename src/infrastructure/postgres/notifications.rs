//! Wakeups between processes, by LISTEN and NOTIFY. They are hints: if one is lost, the next poll finds the delivery.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::{ConnectOptions as _, Connection as _, PgConnection};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::primary::Way;
use super::within::within;
use super::{Database, REQUEST_LIMIT};
use crate::application::ports::StoreError;
use crate::application::wakeup::Wakeup;

/// The channel that processes of one database share.
const CHANNEL: &str = "webhook_ready";
/// The shortest time between two announcements of a process. NOTIFY takes a cluster-wide lock at commit.
const ANNOUNCE_EVERY: Duration = Duration::from_millis(50);
/// After this time without a notification, a listener checks that its connection still lives.
const QUIET_MAX: Duration = Duration::from_secs(30);
/// How many times two connections are asked for their sessions, to detect a pooler. A busy pooler gives out another session each
/// time; an idle one gives the same session to both.
const PID_LOOKS: usize = 10;
/// The wait before the next look for a pooler.
const LOOK_FOR_POOLER_AGAIN: Duration = Duration::from_mins(1);
/// How long it may take until a listener listens.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// The wait before a listener connects again.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// Notifies other processes that something is ready, at most once in 50 ms, outside any transaction. `listener` is the id that
/// this process listens with; it ignores its own notifications.
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
            debug!(error = %cause, "could not notify other processes; they find the deliveries when they poll");
        }
        sleep(ANNOUNCE_EVERY).await;
    }
}

/// Notifies all processes once, except for the one that listens with the id `except`.
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

/// How to reach a database for wakeups.
#[derive(Debug, Clone)]
pub struct Listening {
    way: Way,
}

impl Listening {
    pub(super) fn new(way: Way) -> Self {
        Self { way }
    }
}

/// Whether there is a pooler in between that moves sessions between connections. Such a session must not listen: its
/// notifications would reach whichever connection uses it at that moment, as a message that nobody expects.
async fn is_pooled(options: &PgConnectOptions) -> sqlx::Result<bool> {
    let mut one = options.connect().await?;
    let mut other = options.connect().await?;
    let mut pids = [HashSet::new(), HashSet::new()];
    for _ in 0..PID_LOOKS {
        pids[0].insert(session(&mut one).await?);
        pids[1].insert(session(&mut other).await?);
    }
    for connection in [one, other] {
        connection.close().await?;
    }
    // without a pooler, each connection has one session, and no other connection has the same
    Ok(pids.iter().any(|pids| pids.len() > 1) || pids[0] == pids[1])
}

async fn session(connection: &mut PgConnection) -> sqlx::Result<i32> {
    sqlx::query_scalar("-- notifications.session\nselect pg_backend_pid()").fetch_one(connection).await
}

/// Wakes the claimer of this process when another process announces something. `listener` is the id of this process, whose own
/// notifications are ignored. Behind a pooler that moves sessions it does not listen, and logs that once.
pub async fn listen_for_ready(way: Listening, listener: Uuid, wakeup: Arc<Wakeup>, stop: CancellationToken) {
    let own = listener.to_string();
    let (mut told, mut told_of_pooler) = (false, false);
    while !stop.is_cancelled() {
        let result = tokio::select! {
            () = stop.cancelled() => return,
            result = listen_until_lost(&way.way, &own, &wakeup) => result,
        };
        let mut again = RECONNECT_AFTER;
        match result {
            Ok(Ended::Pooled) => {
                again = LOOK_FOR_POOLER_AGAIN;
                if !std::mem::replace(&mut told_of_pooler, true) {
                    warn!(
                        "{} leads to a pooler that keeps no sessions: no wakeups from other processes, whose events wait for \
                         the next poll (WORKER_POLL_INTERVAL); set LISTEN_DATABASE_URL to a direct connection",
                        way.way.setting()
                    );
                }
            }
            Ok(Ended::Lost) => info!("the connection for wakeups was lost; connecting again"),
            Err(cause) if !told => {
                told = true;
                warn!(error = %cause, "no wakeups from other processes for now; polling goes on");
            }
            Err(cause) => debug!(error = %cause, "still no wakeups from other processes"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(again) => {}
        }
    }
}

enum Ended {
    Lost,
    Pooled,
}

/// Returns `None` behind a pooler.
async fn begin_to_listen(options: &PgConnectOptions) -> sqlx::Result<Option<PgListener>> {
    if is_pooled(options).await? {
        return Ok(None);
    }
    let pool = PgPoolOptions::new().max_connections(1).connect_with(options.clone()).await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.listen(CHANNEL).await?;
    Ok(Some(listener))
}

/// Returns, too, when another host of the database is used.
async fn listen_until_lost(way: &Way, own: &str, wakeup: &Wakeup) -> sqlx::Result<Ended> {
    let used = way.wait_for_used().await;
    tokio::select! {
        () = way.left(used) => Ok(Ended::Lost),
        ended = listen_to(way.options(used), own, wakeup) => {
            way.doubt(used);
            ended
        }
    }
}

async fn listen_to(options: &PgConnectOptions, own: &str, wakeup: &Wakeup) -> sqlx::Result<Ended> {
    let listener =
        timeout(CONNECT_LIMIT, begin_to_listen(options)).await.map_err(|_| sqlx::Error::PoolTimedOut)??;
    let Some(mut listener) = listener else { return Ok(Ended::Pooled) };
    // announcements from before the connection was listening are lost, so the claimer looks once
    wakeup.wake_claimer();
    loop {
        match timeout(QUIET_MAX, listener.try_recv()).await {
            Ok(Ok(Some(told))) if told.payload() == own => {}
            Ok(Ok(Some(_))) => wakeup.wake_claimer(),
            Ok(Ok(None)) => return Ok(Ended::Lost),
            Ok(Err(error)) => return Err(error),
            // a connection may be dead without a sign; another LISTEN must be answered if it lives
            Err(_) => match timeout(REQUEST_LIMIT, listener.listen(CHANNEL)).await {
                Ok(answered) => answered?,
                Err(_) => return Ok(Ended::Lost),
            },
        }
    }
}
