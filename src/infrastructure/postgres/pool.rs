//! A connection pool that shares a database with few connections.
//!
//! It closes connections that it does not need, because other processes need some. If it cannot get a connection, it finds out
//! why.

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
/// The shortest time between two looks for the reason why there is no connection.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// How long a reason is shown after it was found.
const REASON_HOLDS: Duration = Duration::from_secs(20);
/// Connections in use are counted over this time. Those that were not needed in it are closed.
const USE_COUNTED_FOR: Duration = Duration::from_secs(15);

#[derive(Debug, Clone)]
pub(super) struct Pool {
    connections: PgPool,
    /// The most connections that were in use at the same time since the last count.
    used_max: Arc<AtomicU32>,
    reason: Arc<Reason>,
}

impl Pool {
    /// Makes no connection yet, so this does not fail if the database is away.
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

    /// The number of open connections.
    pub(super) fn size(&self) -> u32 {
        self.connections.size()
    }

    /// The number of open connections that nobody uses.
    pub(super) fn num_idle(&self) -> usize {
        self.connections.num_idle()
    }

    pub(super) async fn close(&self) {
        self.connections.close().await;
    }
}

/// Closes connections that have not been needed lately. The driver's own limit for idle connections does not help: it uses them
/// in turn, so none is ever idle for long.
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
