//! A pool that says why no connection is to be had, and that gives back what it does not use: a database has few
//! connections, and other processes need some.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::Postgres;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use tokio::time::{Instant, interval};
use tracing::warn;

use super::schema::Access;

/// How long to wait for a connection.
const ACQUIRE_LIMIT: Duration = Duration::from_secs(1);
/// How often it is asked at most why there is no connection.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// How long a reason is worth telling.
const REASON_HOLDS: Duration = Duration::from_secs(20);
/// Over how long the connections in use are counted; what was not needed for as long is given back.
const USE_COUNTED_FOR: Duration = Duration::from_secs(15);

/// Connections, at most so many at a time.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    connections: PgPool,
    /// The most that were in use at a time, lately.
    used_max: Arc<AtomicU32>,
    reason: Arc<Reason>,
}

impl Pool {
    /// Prepares it; connections are made when they are needed, so this does not fail if the database is away.
    pub(super) fn new(options: PgConnectOptions, connections_max: u32, reason: Arc<Reason>) -> Self {
        let connections = PgPoolOptions::new()
            .max_connections(connections_max)
            .acquire_timeout(ACQUIRE_LIMIT)
            .connect_lazy_with(options);
        let pool = Self { connections, used_max: Arc::default(), reason };
        tokio::spawn(give_back(pool.connections.clone(), pool.used_max.clone()));
        pool
    }

    /// A connection, within a second.
    pub(super) async fn acquire(&self) -> sqlx::Result<PoolConnection<Postgres>> {
        match self.connections.acquire().await {
            Ok(connection) => {
                let idle = u32::try_from(self.connections.num_idle()).unwrap_or(u32::MAX);
                self.used_max.fetch_max(self.connections.size().saturating_sub(idle), Ordering::Relaxed);
                Ok(connection)
            }
            Err(error) => {
                if !matches!(error, sqlx::Error::PoolClosed) {
                    self.reason.find_out(self.connections.options().get_max_connections());
                }
                Err(error)
            }
        }
    }

    /// How many are open.
    pub(super) fn size(&self) -> u32 {
        self.connections.size()
    }

    /// How many of those nobody uses.
    pub(super) fn num_idle(&self) -> usize {
        self.connections.num_idle()
    }

    /// Closes all connections.
    pub(super) async fn close(&self) {
        self.connections.close().await;
    }
}

/// Closes what has not been needed lately. The driver's own limit for idle connections is of no use: it takes them in
/// turn, so that none of them is ever idle for long.
async fn give_back(connections: PgPool, used_max: Arc<AtomicU32>) {
    let mut ticks = interval(USE_COUNTED_FOR);
    let (mut before, mut closed) = (u32::MAX, std::pin::pin!(connections.close_event()));
    loop {
        tokio::select! {
            () = &mut closed => return,
            _ = ticks.tick() => {}
        }
        let lately = used_max.swap(0, Ordering::Relaxed);
        let needed = lately.max(before).max(1);
        before = lately;
        while connections.size() > needed {
            let Some(spare) = connections.try_acquire() else { break };
            // one that does not close in order is closed all the same
            let _ = spare.close().await;
        }
    }
}

/// Why there is no connection: found out by connecting directly, now and then.
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

    /// What was found last, if that is not long ago.
    pub(super) fn recent(&self) -> Option<String> {
        let found = self.found();
        let recent = found.sentence.as_ref().filter(|(at, _)| at.elapsed() < REASON_HOLDS);
        recent.map(|(_, sentence)| sentence.clone())
    }

    /// Remembers what was found, perhaps elsewhere: then there is no need to find it out here.
    pub(super) fn remember(&self, sentence: String) {
        let now = Instant::now();
        *self.found() = Finding { asked_at: Some(now), sentence: Some((now, sentence)) };
    }

    /// Finds it out and logs it, unless that was done a moment ago.
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
