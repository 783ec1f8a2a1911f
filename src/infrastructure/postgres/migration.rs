//! Brings the schema of a database up to date.
//!
//! It works through a pooler that moves sessions, because nothing here is held by a session: the lock against other processes
//! and all settings end with the transaction.

use std::time::Duration;

use sqlx::Connection as _;
use sqlx::migrate::{MigrateError, Migrator};
use tokio::time::{Instant, sleep};
use tracing::info;

use super::access::Access;
use super::schema::{Found, MIGRATIONS, SchemaState, look_by, newest};
use super::trouble::Trouble;

/// The advisory lock that a process holds while it updates the schema, until the end of its transaction.
const LOCK: i64 = 0x7765_6268_6f6f_6b73;
/// The wait between tries to get the lock.
const LOCK_AGAIN: Duration = Duration::from_secs(1);
/// How often the log says that the process waits for the lock.
const SAY_EVERY: Duration = Duration::from_secs(30);
/// A migration may take long, but must not block others while it waits for a table that someone uses.
const BEGIN: &str = "begin; set local statement_timeout = 0; set local idle_in_transaction_session_timeout = 0; \
                     set local lock_timeout = '1s'";

impl Access {
    /// Brings the schema up to date. Waits if another process is doing it.
    pub(super) async fn migrate(&self) -> Result<(), Trouble> {
        let found = self.look().await?;
        if found.read_only {
            return Err(Trouble::read_only(self.way().place()));
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
        let (mut connection, place) = self.way().connect().await?;
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
