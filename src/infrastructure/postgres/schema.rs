//! Compares the schema of a database with the one that this program needs.

use std::collections::HashMap;

use sqlx::migrate::Migrator;
use sqlx::{Connection as _, PgConnection, Row as _};

use super::access::{Access, answer};
use super::trouble::{Place, Trouble, judge_server};

/// The schema, in order.
pub static MIGRATIONS: Migrator = sqlx::migrate!();

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
    /// Reads the state of the server and of the schema. It changes nothing, so it works on a standby, too.
    pub(super) async fn look(&self) -> Result<Found, Trouble> {
        let (mut connection, place) = self.way().connect().await?;
        let found = answer(place, look_by(&mut connection, place)).await;
        let _ = connection.close().await;
        found?
    }

    /// Refuses a database that is read-only, or whose schema is too old.
    pub(super) async fn require_writable(&self) -> Result<(), Trouble> {
        let found = self.look().await?;
        found.schema.require_new()?;
        if found.read_only { Err(Trouble::read_only(self.way().place())) } else { Ok(()) }
    }

    /// Refuses a database whose schema is too old to be read.
    pub(super) async fn require_readable(&self) -> Result<(), Trouble> {
        self.look().await?.schema.require_new()
    }
}

pub(super) async fn look_by(
    connection: &mut PgConnection,
    place: &Place,
) -> sqlx::Result<Result<Found, Trouble>> {
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
