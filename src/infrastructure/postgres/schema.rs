//! Checks and updates the schema.
//!
//! It works through a pooler that moves sessions, because nothing here is held by a session: the lock against other processes
//! and all settings end with the transaction.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::BoxFuture;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::{Connection as _, PgConnection, Row as _};
use tokio::time::{Instant, sleep, timeout};
use tracing::info;

use super::primary::Way;
use super::trouble::{Place, Trouble, judge_server};

/// The schema, in order.
pub static MIGRATIONS: Migrator = sqlx::migrate!();

/// The advisory lock that a process holds while it updates the schema, until the end of its transaction.
const LOCK: i64 = 0x7765_6268_6f6f_6b73;
/// The wait between tries to get the lock.
const LOCK_AGAIN: Duration = Duration::from_secs(1);
/// How often the log says that the process waits for the lock.
const SAY_EVERY: Duration = Duration::from_secs(30);
/// How long it may take to read the version of the schema.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// A migration may take long, but must not block others while it waits for a table that someone uses.
const BEGIN: &str = "begin; set local statement_timeout = 0; set local idle_in_transaction_session_timeout = 0; \
                     set local lock_timeout = '1s'";

/// A direct connection to a database, made when it is needed.
#[derive(Debug, Clone)]
pub(super) struct Access {
    way: Way,
}

/// How the schema compares with what this program needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchemaState {
    /// As new as this program needs, or newer.
    New,
    /// Older, with its version; `None` if there is no schema.
    Old(Option<i64>),
}

impl SchemaState {
    /// Refuses a schema that is too old.
    pub(super) fn require_new(self) -> Result<(), Trouble> {
        match self {
            Self::New => Ok(()),
            Self::Old(found) => Err(Trouble::old_schema(found, newest())),
        }
    }
}

/// What a look at a database found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub(super) schema: SchemaState,
    /// The database is a standby, or was set to refuse writes.
    pub(super) read_only: bool,
}

/// The version that this program needs.
pub(super) fn newest() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or_default()
}

impl Access {
    pub(super) fn new(way: Way) -> Self {
        Self { way }
    }

    /// The way that connections take.
    pub(super) fn way(&self) -> &Way {
        &self.way
    }

    /// Connects and closes the connection again, to find out whether that works.
    pub(super) async fn try_to_connect(&self) -> Result<(), Trouble> {
        self.run(|_| Box::pin(async { Ok(()) })).await
    }

    /// Explains an error from this connection.
    pub(super) fn trouble(&self, error: &sqlx::Error) -> Trouble {
        Trouble::of(error, self.way.place())
    }

    /// Does something short on a new connection.
    pub(super) async fn run<T>(
        &self,
        work: impl for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, sqlx::Result<T>>,
    ) -> Result<T, Trouble> {
        let (mut connection, place) = self.way.connect().await?;
        let done = answer(place, work(&mut connection)).await;
        let _ = connection.close().await;
        done
    }

    /// Reads the state of the server and of the schema. It changes nothing, so it works on a standby, too.
    pub(super) async fn look(&self) -> Result<Found, Trouble> {
        let (mut connection, place) = self.way.connect().await?;
        let found = answer(place, look_by(&mut connection, place)).await;
        let _ = connection.close().await;
        found?
    }

    /// Refuses a database that is read-only, or whose schema is too old.
    pub(super) async fn require_writable(&self) -> Result<(), Trouble> {
        let found = self.look().await?;
        found.schema.require_new()?;
        if found.read_only { Err(Trouble::read_only(self.way.place())) } else { Ok(()) }
    }

    /// Refuses a database whose schema is too old to be read.
    pub(super) async fn require_readable(&self) -> Result<(), Trouble> {
        self.look().await?.schema.require_new()
    }

    /// Brings the schema up to date. Waits if another process is doing it.
    pub(super) async fn migrate(&self) -> Result<(), Trouble> {
        let found = self.look().await?;
        if found.read_only {
            return Err(Trouble::read_only(self.way.place()));
        }
        if found.schema == SchemaState::New {
            return Ok(());
        }
        let mut said: Option<Instant> = None;
        while !self.migrate_unless_locked().await? {
            if said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
                said = Some(Instant::now());
                info!("another process brings the database's schema up to date; waiting for it");
            }
            sleep(LOCK_AGAIN).await;
        }
        Ok(())
    }

    /// Returns whether the schema is up to date now. If not, another process is updating it.
    async fn migrate_unless_locked(&self) -> Result<bool, Trouble> {
        let (mut connection, place) = self.way.connect().await?;
        let work = async {
            let mut transaction = connection.begin_with(BEGIN).await?;
            let locked: bool = sqlx::query_scalar("-- schema.lock\nselect pg_try_advisory_xact_lock($1)")
                .bind(LOCK)
                .fetch_one(&mut *transaction)
                .await?;
            if !locked {
                transaction.rollback().await?;
                return Ok(Ok(false));
            }
            // another process may have done it in the meantime
            match look_by(&mut transaction, place).await? {
                Err(trouble) => return Ok(Err(trouble)),
                Ok(Found { schema: SchemaState::New, .. }) => {}
                Ok(Found { schema: SchemaState::Old(found), .. }) => {
                    info!(from = found, to = newest(), "bringing the database's schema up to date");
                    migrator().run_direct(None, &mut *transaction, false).await.map_err(driver_error)?;
                }
            }
            transaction.commit().await?;
            Ok::<_, sqlx::Error>(Ok(true))
        };
        let done = work.await.map_err(|error| Trouble::of(&error, place))?;
        let _ = connection.close().await;
        done
    }
}

async fn answer<T>(place: &Place, work: impl Future<Output = sqlx::Result<T>>) -> Result<T, Trouble> {
    match timeout(ANSWER_LIMIT, work).await {
        Ok(result) => result.map_err(|error| Trouble::of(&error, place)),
        Err(_) => Err(Trouble::silence(place)),
    }
}

async fn look_by(connection: &mut PgConnection, place: &Place) -> sqlx::Result<Result<Found, Trouble>> {
    let server = sqlx::query(
        "-- schema.server
        select current_setting('server_version_num')::int, current_setting('server_encoding'),
               to_regclass('_sqlx_migrations') is not null, current_setting('transaction_read_only')::bool",
    )
    .fetch_one(&mut *connection)
    .await?;
    if let Err(trouble) = judge_server(server.try_get(0)?, server.try_get(1)?, place) {
        return Ok(Err(trouble));
    }
    let applied: Vec<(i64, Vec<u8>)> = if server.try_get(2)? {
        sqlx::query_as("-- schema.version\nselect version, checksum from _sqlx_migrations where success")
            .fetch_all(&mut *connection)
            .await?
    } else {
        vec![]
    };
    let read_only = server.try_get(3)?;
    Ok(judge_schema(&applied.into_iter().collect()).map(|schema| Found { schema, read_only }))
}

/// Compares the applied migrations with this program's. A newer program may have applied more of them.
fn judge_schema(applied: &HashMap<i64, Vec<u8>>) -> Result<SchemaState, Trouble> {
    let mut state = SchemaState::New;
    for migration in MIGRATIONS.iter() {
        match applied.get(&migration.version) {
            Some(checksum) if **checksum == *migration.checksum => {}
            Some(_) => {
                return Err(Trouble::lasting(format!(
                    "migration {} of the database is another than this program's: they are not of the same origin",
                    migration.version
                )));
            }
            None => state = SchemaState::Old(applied.keys().max().copied()),
        }
    }
    Ok(state)
}

/// The driver's migrator without its lock, which belongs to a session: a pooler gives that session to others.
fn migrator() -> Migrator {
    let mut migrator = Migrator { migrations: MIGRATIONS.migrations.clone(), ..Migrator::DEFAULT };
    migrator.set_locking(false).set_ignore_missing(true);
    migrator
}

fn driver_error(error: MigrateError) -> sqlx::Error {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error,
        other => sqlx::Error::Migrate(Box::new(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied() -> HashMap<i64, Vec<u8>> {
        MIGRATIONS.iter().map(|migration| (migration.version, migration.checksum.to_vec())).collect()
    }

    #[test]
    fn a_schema_is_new_if_it_has_all_that_this_program_needs_and_old_if_something_is_missing() {
        assert_eq!(judge_schema(&applied()), Ok(SchemaState::New));
        let mut newer = applied();
        newer.insert(newest() + 1, vec![1]);
        assert_eq!(judge_schema(&newer), Ok(SchemaState::New));
        let mut older = applied();
        older.remove(&newest());
        let found = older.keys().max().copied();
        assert_eq!(judge_schema(&older), Ok(SchemaState::Old(found)));
        assert_eq!(
            SchemaState::Old(found).require_new().unwrap_err().to_string(),
            format!(
                "the database's schema is of version {}, this program needs {}: run webhook-processor migrate",
                found.unwrap(),
                newest()
            )
        );
        assert_eq!(judge_schema(&HashMap::new()), Ok(SchemaState::Old(None)));
    }

    #[test]
    fn a_migration_that_differs_from_ours_is_refused() {
        let mut foreign = applied();
        foreign.insert(newest(), vec![1]);
        assert!(judge_schema(&foreign).is_err());
    }
}
