//! The record of what operators change, in `webhook_operator_actions`.

use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use sqlx::{Connection as _, PgConnection, Postgres};

use crate::application::ports::Change;

/// Records a change. `connection` must be in the transaction that makes it.
pub(super) async fn record(
    connection: &mut PgConnection,
    change: &Change<'_>,
    subject: impl ToString,
) -> sqlx::Result<()> {
    sqlx::query!(
        "-- operators.record
        select webhook_note_action($1, $2, $3, $4, $5, $6, $7, $8)",
        change.operator.name,
        change.operator.way.as_str(),
        change.operator.reason,
        change.action.as_str(),
        change.action.scope().as_str(),
        subject.to_string(),
        change.before,
        change.after,
    )
    .fetch_one(connection)
    .await?;
    Ok(())
}

/// Makes a change of one row and records it, in one transaction. Returns whether there was a row to change.
pub(super) async fn change_row(
    connection: &mut PgConnection,
    statement: Query<'_, Postgres, PgArguments>,
    change: &Change<'_>,
    subject: impl ToString,
) -> sqlx::Result<bool> {
    let mut transaction = connection.begin().await?;
    let is_changed = statement.execute(&mut *transaction).await?.rows_affected() == 1;
    if is_changed {
        record(&mut transaction, change, subject).await?;
    }
    transaction.commit().await?;
    Ok(is_changed)
}
