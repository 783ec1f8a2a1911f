//! PostgreSQL behind the ports: the database that the repositories share.

mod access;
mod api_keys;
mod circuits;
mod delivery_queue;
mod delivery_records;
mod durability;
mod endpoints;
mod errors;
mod floors;
mod hosts;
mod migration;
mod notifications;
mod operators;
mod pool;
mod primary;
mod reason;
mod schema;
mod trouble;
pub mod upkeep;
mod within;
mod writability;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::ConnectOptions as _;
use sqlx::postgres::PgConnectOptions;
use tokio::sync::Semaphore;

pub use hosts::{Hosts, HostsError};
pub use notifications::{Listening, announce_ready, listen_for_ready, tell_ready};
pub use schema::MIGRATIONS;
pub use trouble::Trouble;

use self::access::Access;
use self::errors::is_missing_table;
use self::floors::KnownFloors;
use self::pool::Pool;
use self::primary::Way;
use self::reason::Reason;
use self::within::within;
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
