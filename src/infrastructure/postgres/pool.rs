//! A connection pool that shares a database with few connections.
//!
//! It closes connections that it does not need, because other processes need some. If it cannot get a connection, it finds out
//! why. If the database moves to another host, so does the pool.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::Postgres;
use sqlx::error::DatabaseError;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::time::{Instant, interval, timeout};
use tracing::warn;

use super::primary::{Used, Way};
use super::schema::Access;

/// How long to wait for a connection.
const ACQUIRE_LIMIT: Duration = Duration::from_secs(1);
/// The SQLSTATE of a write in a session that may not write.
const READ_ONLY: &str = "25006";
/// The shortest time between two looks for the reason why there is no connection.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// How long a reason is shown after it was found.
const REASON_HOLDS: Duration = Duration::from_secs(20);
/// Connections in use are counted over this time. Those that were not needed in it are closed.
const USE_COUNTED_FOR: Duration = Duration::from_secs(15);

#[derive(Debug, Clone)]
pub(super) struct Pool {
    way: Way,
    connections_max: u32,
    /// The connections to the host that is used; `None` before the first.
    open: Arc<Mutex<Option<(Used, PgPool)>>>,
    /// The most connections that were in use at the same time since the last count.
    used_max: Arc<AtomicU32>,
    reason: Arc<Reason>,
}

impl Pool {
    /// Makes no connection yet, so this does not fail if the database is away.
    pub(super) fn new(way: Way, connections_max: u32, reason: Arc<Reason>) -> Self {
        let pool = Self { way, connections_max, open: Arc::default(), used_max: Arc::default(), reason };
        if let Some(used) = pool.way.used() {
            pool.connections_to(used);
        }
        pool
    }

    /// A connection, within a second.
    pub(super) async fn acquire(&self) -> sqlx::Result<PoolConnection<Postgres>> {
        let acquired = if self.way.has_choice() {
            // the parts of this have limits of their own, but there may be several of them
            timeout(ACQUIRE_LIMIT, self.acquire_from_used()).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
        } else {
            self.acquire_from_used().await
        };
        if let Err(error) = &acquired
            && !matches!(error, sqlx::Error::PoolClosed)
        {
            self.heed(Some(error));
            self.reason.find_out(self.connections_max);
        }
        acquired
    }

    async fn acquire_from_used(&self) -> sqlx::Result<PoolConnection<Postgres>> {
        loop {
            let used = self.way.wait_for_used().await;
            let connections = self.connections_to(used);
            let acquired = connections.acquire().await;
            if self.way.used() == Some(used) {
                let idle = u32::try_from(connections.num_idle()).unwrap_or(u32::MAX);
                self.used_max.fetch_max(connections.size().saturating_sub(idle), Ordering::Relaxed);
                return acquired;
            }
            if let Ok(mut connection) = acquired {
                connection.close_on_drop();
            }
        }
    }

    /// The connections to this host, in place of those to another.
    fn connections_to(&self, used: Used) -> PgPool {
        let mut open = self.open();
        if let Some((to, connections)) = &*open
            && *to == used
        {
            return connections.clone();
        }
        let mut options =
            PgPoolOptions::new().max_connections(self.connections_max).acquire_timeout(ACQUIRE_LIMIT);
        if self.way.has_choice() {
            let way = self.way.clone();
            options = options.after_connect(move |connection, _| {
                let way = way.clone();
                // a host that refuses writes is left by this, and the connection is not handed out
                Box::pin(async move { way.confirm(connection, used).await.map(drop) })
            });
        }
        let connections = options.connect_lazy_with(self.way.options(used).clone());
        tokio::spawn(give_back(connections.clone(), self.used_max.clone(), self.way.clone(), used));
        *open = Some((used, connections.clone()));
        connections
    }

    /// Looks again for the right host if an error may mean that it is another one by now. Returns whether the session that had
    /// the error is of no use any more, because it may not write.
    pub(super) fn heed(&self, error: Option<&sqlx::Error>) -> bool {
        let Some(error) = error else { return false };
        let refusal = error.as_database_error().and_then(DatabaseError::code);
        let code = refusal.as_deref().unwrap_or_default();
        let is_away =
            matches!(error, sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut) || code.starts_with("57P");
        if (code == READ_ONLY || is_away)
            && let Some(used) = self.way.used()
        {
            self.way.doubt(used);
        }
        code == READ_ONLY
    }

    /// The number of open connections.
    pub(super) fn size(&self) -> u32 {
        self.open().as_ref().map_or(0, |(_, connections)| connections.size())
    }

    /// The number of open connections that nobody uses.
    pub(super) fn num_idle(&self) -> usize {
        self.open().as_ref().map_or(0, |(_, connections)| connections.num_idle())
    }

    pub(super) async fn close(&self) {
        let connections = self.open().as_ref().map(|(_, connections)| connections.clone());
        if let Some(connections) = connections {
            connections.close().await;
        }
    }

    fn open(&self) -> MutexGuard<'_, Option<(Used, PgPool)>> {
        // a panic elsewhere leaves a whole pool behind
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes connections that have not been needed lately, and all of them when their host is left. The driver's own limit for idle
/// connections does not help: it uses them in turn, so none is ever idle for long.
async fn give_back(connections: PgPool, used_max: Arc<AtomicU32>, way: Way, used: Used) {
    let mut ticks = interval(USE_COUNTED_FOR);
    let (mut before, mut closed) = (u32::MAX, std::pin::pin!(connections.close_event()));
    loop {
        tokio::select! {
            () = &mut closed => return,
            () = way.left(used) => return connections.close().await,
            _ = ticks.tick() => {}
        }
        let lately = used_max.swap(0, Ordering::Relaxed);
        let needed = lately.max(before).max(1);
        before = lately;
        while connections.size() > needed {
            let Some(spare) = connections.try_acquire() else { break };
            // on an error the connection is dropped, which closes it too
            let _ = spare.close().await;
        }
    }
}

/// Why there is no connection, found out by a direct connection now and then.
#[derive(Debug)]
pub(super) struct Reason {
    access: Access,
    found: Mutex<Finding>,
}

#[derive(Debug, Default)]
struct Finding {
    asked_at: Option<Instant>,
    sentence: Option<(Instant, String)>,
}

impl Reason {
    pub(super) fn new(access: Access) -> Arc<Self> {
        Arc::new(Self { access, found: Mutex::default() })
    }

    /// The last reason, if it was found in the last 20 seconds.
    pub(super) fn recent(&self) -> Option<String> {
        let found = self.found();
        let recent = found.sentence.as_ref().filter(|(at, _)| at.elapsed() < REASON_HOLDS);
        recent.map(|(_, sentence)| sentence.clone())
    }

    /// Remembers a reason that was found here or elsewhere.
    pub(super) fn remember(&self, sentence: String) {
        let now = Instant::now();
        *self.found() = Finding { asked_at: Some(now), sentence: Some((now, sentence)) };
    }

    /// Looks for the reason and logs it, unless that was done a moment ago.
    fn find_out(self: &Arc<Self>, connections_max: u32) {
        {
            let mut found = self.found();
            if found.asked_at.is_some_and(|at| at.elapsed() < ASK_EVERY) {
                return;
            }
            found.asked_at = Some(Instant::now());
        }
        let this = self.clone();
        tokio::spawn(async move {
            let sentence = match this.access.try_to_connect().await {
                Err(trouble) => trouble.to_string(),
                Ok(()) => format!(
                    "no connection became free within {ACQUIRE_LIMIT:?}: all {connections_max} of a pool are in use, or were lost a \
                     moment ago; see webhook_pool_connections, DATABASE_MAX_CONNECTIONS, and what keeps the database busy"
                ),
            };
            warn!("{sentence}");
            this.remember(sentence);
        });
    }

    fn found(&self) -> std::sync::MutexGuard<'_, Finding> {
        // a panic elsewhere leaves plain data behind
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
