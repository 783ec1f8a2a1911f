//! The repositories on PostgreSQL, with their shared pools, time limits and meaning of errors.

mod circuits;
mod delivery_queue;
mod delivery_records;
mod durability;
mod endpoints;
mod floors;
mod hosts;
mod notifications;
mod pool;
mod primary;
mod schema;
mod trouble;
pub mod upkeep;
mod writability;

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::error::DatabaseError;
use sqlx::pool::PoolConnection;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, PgConnection, Postgres};
use tokio::sync::Semaphore;

pub use hosts::{Hosts, HostsError};
pub use notifications::{Listening, announce_ready, listen_for_ready, tell_ready};
pub use schema::MIGRATIONS;
pub use trouble::Trouble;

use self::floors::KnownFloors;
use self::pool::{Pool, Reason};
use self::primary::Way;
use self::schema::Access;
use self::writability::Writability;
use crate::application::ports::StoreError;

/// Connections of the engine, one each for claims, enqueues, settles, promotion, announcements, upkeep, look-ups and circuits.
/// The rare release uses an idle one.
const ENGINE_CONNECTIONS: u32 = 8;
/// How many lists and counts run at the same time. Others wait, so that connections are left for other requests.
const SCANS_AT_ONCE: usize = 3;
/// How long a statement of the hot path may take before its connection is closed.
const ENGINE_LIMIT: Duration = Duration::from_secs(15);
/// How long a look-up or a change of one row may take.
const REQUEST_LIMIT: Duration = Duration::from_millis(1500);
/// How long a list, a count, or upkeep may take.
const SCAN_LIMIT: Duration = Duration::from_secs(30);

/// Begins the transaction of a list or a count. The server ends it if its caller has gone. The limit is set only for the
/// transaction, because a pooler gives the session to others afterwards.
const BEGIN_SCAN: &str = "begin; set local statement_timeout = '35s'";

/// The database, with one pool for requests and one for the engine, so that neither can starve the other.
#[derive(Debug, Clone)]
pub struct Database {
    requests: Pool,
    engine: Pool,
    access: Access,
    /// Goes past a pooler, for statements that take long.
    direct: Access,
    reason: Arc<Reason>,
    writability: Arc<Writability>,
    scans: Arc<Semaphore>,
    floors: Arc<Mutex<KnownFloors>>,
}

impl Database {
    /// Makes no connection yet, so this does not fail if the database is away.
    pub fn new(hosts: impl Into<Hosts>, request_connections: u32) -> Self {
        Self::reached_by(hosts, "DATABASE_URL", request_connections)
    }

    /// Like [`Database::new`]. `setting` is the name of the setting that error texts point to.
    pub fn reached_by(hosts: impl Into<Hosts>, setting: &'static str, request_connections: u32) -> Self {
        let way = Way::new(hosts.into(), setting);
        let access = Access::new(way.clone());
        let reason = Reason::new(access.clone());
        let engine = Pool::new(way.clone(), ENGINE_CONNECTIONS, reason.clone());
        Self {
            requests: Pool::new(way, request_connections, reason.clone()),
            writability: Writability::new(engine.clone(), access.clone()),
            engine,
            direct: access.clone(),
            access,
            reason,
            scans: Arc::new(Semaphore::new(SCANS_AT_ONCE)),
            floors: Arc::default(),
        }
    }

    /// Uses direct connections for migrations, with the value of `LISTEN_DATABASE_URL`.
    #[must_use]
    pub fn migrating_by(mut self, hosts: impl Into<Hosts>) -> Self {
        self.direct = Access::new(Way::new(hosts.into(), "LISTEN_DATABASE_URL"));
        self
    }

    /// The way for wakeups: direct, if there is a setting for that.
    pub fn listening(&self) -> Listening {
        Listening::new(self.direct.way().clone())
    }

    /// Brings the schema up to date. If it is up to date, nothing is locked or written. Several processes may call it at once.
    pub async fn migrate(&self) -> Result<(), Trouble> {
        let migrated = self.direct.migrate().await;
        self.remember(migrated)
    }

    /// Refuses a database that is read-only, or whose schema is older than this program needs.
    pub async fn require_writable(&self) -> Result<(), Trouble> {
        self.access.require_writable().await
    }

    /// Refuses a database whose schema is older than this program needs. Only reads.
    pub async fn require_readable(&self) -> Result<(), Trouble> {
        self.access.require_readable().await
    }

    fn remember<T>(&self, result: Result<T, Trouble>) -> Result<T, Trouble> {
        if let Err(trouble) = &result {
            self.reason.remember(trouble.to_string());
        }
        result
    }

    /// Why the database could not be used a moment ago, in one sentence.
    pub fn trouble(&self) -> Option<String> {
        self.reason.recent()
    }

    /// Whether a write can be committed; the error is a sentence that says why not. The result may be a few seconds old.
    pub async fn accepts_writes(&self) -> Result<(), String> {
        self.writability.recent().await
    }

    /// Whether the schema is as new as this program needs. Fails if the database does not answer.
    pub async fn is_migrated(&self) -> Result<bool, StoreError> {
        let applied: Option<i64> = within!(self.engine, REQUEST_LIMIT, |connection| sqlx::query_scalar(
            "-- database.version\nselect max(version) from _sqlx_migrations where success"
        )
        .fetch_one(&mut *connection))
        .or_else(|error| if is_missing_table(&error) { Ok(None) } else { Err(error) })?;
        Ok(applied >= Some(schema::newest()))
    }

    /// For each pool: its name, the number of open connections, and how many of these are idle.
    pub fn pool_use(&self) -> [(&'static str, u32, usize); 2] {
        [("requests", &self.requests), ("engine", &self.engine)]
            .map(|(name, pool)| (name, pool.size(), pool.num_idle()))
    }

    fn floors(&self) -> MutexGuard<'_, KnownFloors> {
        // a panic elsewhere leaves plain hints behind
        self.floors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub async fn close(&self) {
        self.requests.close().await;
        self.engine.close().await;
    }
}

/// Sets what all connections of this program have in common. `extra_float_digits` is left out: its value has been the default
/// since PostgreSQL 12, and `PgBouncer` refuses it.
fn ours(mut options: PgConnectOptions) -> PgConnectOptions {
    // the brackets of an IPv6 address belong to the URL
    if let Some(address) = options.get_host().strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        let address = address.to_owned();
        options = options.host(&address);
    }
    options.application_name("webhook-processor").extra_float_digits(None).disable_statement_logging()
}

/// Runs statements on a connection of a pool within a time limit. If they did not end, because time ran out or the caller has
/// gone, the connection is still busy. It is then closed instead of given back.
macro_rules! within {
    ($pool:expr, $limit:expr, |$connection:ident| $work:expr) => {
        match $pool.acquire().await {
            Err(error) => Err($crate::infrastructure::postgres::not_asked(error)),
            Ok(connection) => {
                let mut $connection =
                    $crate::infrastructure::postgres::Guarded { connection, finished: false };
                match tokio::time::timeout($limit, $work).await {
                    Ok(result) => {
                        // a session that may not write is of no use to anybody: a new one may
                        $connection.finished = !$pool.heed(result.as_ref().err());
                        result.map_err($crate::infrastructure::postgres::store_error)
                    }
                    Err(_) => {
                        $pool.heed(Some(&sqlx::Error::PoolTimedOut));
                        Err($crate::infrastructure::postgres::no_answer())
                    }
                }
            }
        }
    };
}
use within;

/// Like [`within!`], for a list or a count: on the connections for requests, in a transaction that the server ends if the caller
/// has gone.
macro_rules! scan {
    ($database:expr, |$connection:ident| $work:expr) => {
        $crate::infrastructure::postgres::within!(
            $database.requests,
            $crate::infrastructure::postgres::SCAN_LIMIT,
            |connection| async {
                use sqlx::Connection as _;
                let mut transaction =
                    connection.begin_with($crate::infrastructure::postgres::BEGIN_SCAN).await?;
                let $connection = &mut *transaction;
                let result = $work.await?;
                transaction.commit().await?;
                Ok(result)
            }
        )
    };
}
use scan;

/// A connection that is closed on drop, unless its statements came to their end.
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

/// What a driver's error means for the application if a statement may have been sent.
fn store_error(error: sqlx::Error) -> StoreError {
    let meaning = match &error {
        // the connection broke, or the protocol is out of step
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => {
            StoreError::InDoubt
        }
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => StoreError::Unavailable,
        sqlx::Error::Database(database) => meaning_of(&database.code().unwrap_or_default()),
        _ => StoreError::Unexpected,
    };
    meaning(Arc::new(anyhow::Error::new(error)))
}

/// What a driver's error means if no statement was sent.
fn not_asked(error: sqlx::Error) -> StoreError {
    match store_error(error) {
        StoreError::InDoubt(cause) => StoreError::Unavailable(cause),
        known => known,
    }
}

/// What an SQLSTATE means for the application.
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

/// The error for a row that the schema or the domain should have refused. Someone wrote it by hand.
fn inconsistent(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    store_error(undecodable(error))
}

/// The same, while the driver reads the row.
fn undecodable(error: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
    sqlx::Error::Decode(Box::new(error))
}

fn no_answer() -> StoreError {
    StoreError::InDoubt(Arc::new(anyhow::anyhow!("no answer in time")))
}

fn is_missing_table(error: &StoreError) -> bool {
    has_code(error, "42P01")
}

/// Whether a terminal row had no archive, because the clock has passed the last one. The row was then routed to the open
/// partition, whose CHECK refused it.
fn lacks_archive(error: &StoreError) -> bool {
    let constraint = refusal(error).and_then(DatabaseError::constraint);
    constraint == Some("the open partition holds open deliveries")
}

/// Whether the database refused with this SQLSTATE.
fn has_code(error: &StoreError, code: &str) -> bool {
    refusal(error).and_then(DatabaseError::code).is_some_and(|found| found == code)
}

fn refusal(error: &StoreError) -> Option<&dyn DatabaseError> {
    error.cause().downcast_ref::<sqlx::Error>().and_then(sqlx::Error::as_database_error)
}

/// Microseconds for SQL, which adds them to its own clock.
fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// A duration from microseconds that SQL returned. A negative number becomes zero.
fn from_micros(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_address_in_a_url_is_connected_to_without_its_brackets() {
        let options = ours("postgres://app@[::1]:5433/shop".parse().unwrap());
        assert_eq!((options.get_host(), options.get_port()), ("::1", 5433));
    }
}
