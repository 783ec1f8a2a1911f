//! The record of what operators change, in `webhook_operator_actions`.

use sqlx::PgConnection;

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
