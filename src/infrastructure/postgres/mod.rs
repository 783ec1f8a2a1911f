//! The repositories on PostgreSQL, and what they share: pools, time limits, migrations, the meaning of errors.

mod circuits;
mod delivery_queue;
mod delivery_records;
mod endpoints;
mod notifications;
mod upkeep;

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions as _, Executor as _, PgConnection, Postgres};
use tokio::sync::Semaphore;

pub use notifications::{announce_ready, listen_for_ready, tell_ready};

use crate::application::ports::StoreError;

/// The schema, in order.
pub static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();

/// Connections of the engine: claims, one writer at each end, promotion, announcements, upkeep, look-ups, circuits; the
/// rare release finds one that is idle.
const ENGINE_CONNECTIONS: u32 = 8;
/// How many lists and counts are read at a time; more wait, and leave connections to other requests.
const SCANS_AT_ONCE: usize = 3;
/// How long to wait for a connection.
const ACQUIRE_LIMIT: Duration = Duration::from_secs(1);
/// How long a statement of the hot path may take before its connection is given up.
const ENGINE_LIMIT: Duration = Duration::from_secs(15);
/// How long a look-up or a change of one row may take.
const REQUEST_LIMIT: Duration = Duration::from_millis(1500);
/// How long a list, a count, or upkeep may take.
const SCAN_LIMIT: Duration = Duration::from_secs(30);

/// The database: one pool for requests and one for the engine, so that neither can starve the other.
#[derive(Debug, Clone)]
pub struct Database {
    requests: PgPool,
    engine: PgPool,
    options: PgConnectOptions,
    scans: Arc<Semaphore>,
}

impl Database {
    /// Prepares pools; connections are made when they are needed, so this does not fail where the database is away.
    pub fn new(options: PgConnectOptions, request_connections: u32) -> Self {
        let options = options.application_name("webhook-processor").disable_statement_logging();
        let pool =
            |connections| PgPoolOptions::new().max_connections(connections).acquire_timeout(ACQUIRE_LIMIT);
        // a caller who has gone leaves a scan behind, which the server ends then
        let requests = pool(request_connections).after_connect(|connection, _| {
            Box::pin(async { connection.execute("set statement_timeout = '35s'").await.map(drop) })
        });
        Self {
            requests: requests.connect_lazy_with(options.clone()),
            engine: pool(ENGINE_CONNECTIONS).connect_lazy_with(options.clone()),
            options,
            scans: Arc::new(Semaphore::new(SCANS_AT_ONCE)),
        }
    }

    /// Brings the schema up to date. Safe to call from several processes at once.
    pub async fn migrate(&self) -> anyhow::Result<()> {
        let mut connection = self.options.connect().await?;
        MIGRATIONS.run(&mut connection).await?;
        Ok(())
    }

    /// Whether the schema is as new as this program needs it. Fails where the database does not answer.
    pub async fn is_migrated(&self) -> Result<bool, StoreError> {
        let newest = MIGRATIONS.iter().map(|migration| migration.version).max();
        let applied: Option<i64> = within!(self.engine, REQUEST_LIMIT, |connection| sqlx::query_scalar(
            "-- database.version\nselect max(version) from _sqlx_migrations where success"
        )
        .fetch_one(&mut *connection))
        .or_else(|error| if is_missing_table(&error) { Ok(None) } else { Err(error) })?;
        Ok(applied >= newest)
    }

    /// Connections of the pools: open ones, and how many of those are idle; for requests and for the engine.
    pub fn pool_use(&self) -> [(&'static str, u32, usize); 2] {
        [("requests", &self.requests), ("engine", &self.engine)]
            .map(|(name, pool)| (name, pool.size(), pool.num_idle()))
    }

    /// Closes all connections.
    pub async fn close(&self) {
        self.requests.close().await;
        self.engine.close().await;
    }
}

/// Runs one statement, or a few, on a connection of a pool within a time limit. A connection on which they did not come
/// to their end, because time ran out or nobody waits for them any more, is closed, not given back: it is still busy.
macro_rules! within {
    ($pool:expr, $limit:expr, |$connection:ident| $work:expr) => {
        match $pool.acquire().await {
            Err(error) => Err($crate::infrastructure::postgres::not_asked(error)),
            Ok(connection) => {
                let mut $connection =
                    $crate::infrastructure::postgres::Guarded { connection, finished: false };
                match tokio::time::timeout($limit, $work).await {
                    Ok(result) => {
                        $connection.finished = true;
                        result.map_err($crate::infrastructure::postgres::store_error)
                    }
                    Err(_) => Err($crate::infrastructure::postgres::no_answer()),
                }
            }
        }
    };
}
use within;

/// A connection in use.
struct Guarded {
    connection: PoolConnection<Postgres>,
    finished: bool,
}

impl Deref for Guarded {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Guarded {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if !self.finished {
            self.connection.close_on_drop();
        }
    }
}

/// What an error of the driver means for the application, once a statement was sent.
fn store_error(error: sqlx::Error) -> StoreError {
    let meaning = match &error {
        // the connection broke, or cannot be understood any more
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => {
            StoreError::InDoubt
        }
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => StoreError::Unavailable,
        sqlx::Error::Database(database) => meaning_of(&database.code().unwrap_or_default()),
        _ => StoreError::Unexpected,
    };
    meaning(Arc::new(anyhow::Error::new(error)))
}

/// What an error means that came before any statement was sent.
fn not_asked(error: sqlx::Error) -> StoreError {
    match store_error(error) {
        StoreError::InDoubt(cause) => StoreError::Unavailable(cause),
        known => known,
    }
}

/// What an SQLSTATE means.
/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
fn meaning_of(code: &str) -> fn(Arc<anyhow::Error>) -> StoreError {
    let in_class = |classes: &[&str]| classes.iter().any(|class| code.starts_with(class));
    match code {
        // the server ended the connection, perhaps between a commit and its answer
        "57P01" | "57P02" | "57P05" => StoreError::InDoubt,
        // serialization failure, deadlock, lock not available, read-only transaction (a standby after a failover)
        "40001" | "40P01" | "55P03" | "25006"
        // access withdrawn: a database that allows no connections, or a missing privilege
        | "55000" | "42501"
        // the schema is not there yet, or not as this program knows it: a table, a function, a column
        | "42P01" | "42883" | "42703" => StoreError::Unavailable,
        // connection exception
        _ if in_class(&["08"]) => StoreError::InDoubt,
        // invalid authorization, no such database, insufficient resources, operator intervention, system error
        _ if in_class(&["28", "3D", "53", "57", "58"]) => StoreError::Unavailable,
        // data exception, integrity constraint violation
        _ if in_class(&["22", "23"]) => StoreError::Refused,
        _ => StoreError::Unexpected,
    }
}

/// A row that the constraints of the schema, or the domain, should have kept out: someone wrote it by hand.
fn inconsistent(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    store_error(sqlx::Error::Decode(Box::new(error)))
}

fn no_answer() -> StoreError {
    StoreError::InDoubt(Arc::new(anyhow::anyhow!("no answer in time")))
}

fn is_missing_table(error: &StoreError) -> bool {
    has_code(error, "42P01")
}

/// Whether a terminal row had no archive to go to, since the clock has run past the last one: the open partition, where
/// it ended up instead, refused it by a CHECK.
fn lacks_archive(error: &StoreError) -> bool {
    has_code(error, "23514")
}

/// Whether the database refused with this SQLSTATE.
fn has_code(error: &StoreError, code: &str) -> bool {
    let driver = error.cause().downcast_ref::<sqlx::Error>().and_then(sqlx::Error::as_database_error);
    driver.and_then(sqlx::error::DatabaseError::code).is_some_and(|found| found == code)
}

/// Microseconds for SQL, which adds them to its own clock.
fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// A duration that SQL tells in microseconds; what lies in the past is zero.
fn from_micros(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}
