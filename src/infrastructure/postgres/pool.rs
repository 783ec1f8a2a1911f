//! A connection pool that shares a database with few connections.
//!
//! It closes connections that it does not need, because other processes need some.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use sqlx::Postgres;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use tokio::time::interval;

use super::reason::Reason;

/// How long to wait for a connection.
pub(super) const ACQUIRE_LIMIT: Duration = Duration::from_secs(1);
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
