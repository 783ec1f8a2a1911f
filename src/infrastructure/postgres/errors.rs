//! What errors of the database mean for the application.

use std::sync::Arc;

use sqlx::error::DatabaseError;

use crate::application::ports::StoreError;

/// What a driver's error means for the application if a statement may have been sent.
pub(super) fn store_error(error: sqlx::Error) -> StoreError {
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
pub(super) fn not_asked(error: sqlx::Error) -> StoreError {
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
pub(super) fn inconsistent(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    store_error(undecodable(error))
}

/// The same, while the driver reads the row.
pub(super) fn undecodable(error: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
    sqlx::Error::Decode(Box::new(error))
}

pub(super) fn no_answer() -> StoreError {
    StoreError::InDoubt(Arc::new(anyhow::anyhow!("no answer in time")))
}

pub(super) fn is_missing_table(error: &StoreError) -> bool {
    has_code(error, "42P01")
}

/// Whether a terminal row had no archive, because the clock has passed the last one. The row was then routed to the open
/// partition, whose CHECK refused it.
pub(super) fn lacks_archive(error: &StoreError) -> bool {
    let constraint = refusal(error).and_then(DatabaseError::constraint);
    constraint == Some("the open partition holds open deliveries")
}

/// Whether the database refused with this SQLSTATE.
pub(super) fn has_code(error: &StoreError, code: &str) -> bool {
    refusal(error).and_then(DatabaseError::code).is_some_and(|found| found == code)
}

fn refusal(error: &StoreError) -> Option<&dyn DatabaseError> {
    error.cause().downcast_ref::<sqlx::Error>().and_then(sqlx::Error::as_database_error)
}
