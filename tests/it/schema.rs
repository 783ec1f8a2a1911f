//! The schema as a whole: what must hold for each column, also for those that are added later.

use serde_json::Value;
use sqlx::AssertSqlSafe;

use crate::support::postgres::TestDatabase;

/// What a settle or a cancel writes itself.
const WRITTEN_AT_THE_END: &str = "array['status', 'status_reason', 'worker_id', 'locked_at', 'lock_expires_at', 'abandoned_by', \
                                  'abandoned_at', 'ready_since', 'completed_at', 'updated_at', 'settled_in']";

/// An open delivery under attempt `number`, or waiting for it, in which each column has a value that may have one.
async fn store_a_full_row(database: &TestDatabase, number: i32, status: &str) {
    let under_lease = status == "processing";
    let columns: Vec<(String, String)> = sqlx::query_as(
        "select attname::text, format_type(atttypid, null) from pg_attribute
         where attrelid = 'webhook_queue'::regclass and attnum > 0 and not attisdropped order by attnum",
    )
    .fetch_all(&database.pool)
    .await
    .unwrap();
    let value_of = |name: &str, kind: &str| -> String {
        let attempt =
            name.strip_prefix("retry_").and_then(|rest| rest.split('_').next()?.parse::<i32>().ok());
        match name {
            "status" => format!("'{status}'"),
            "completed_at" | "status_reason" | "settled_in" => "null".to_owned(),
            "worker_id" | "locked_at" | "lock_expires_at" if !under_lease => "null".to_owned(),
            "locked_at" => "now()".to_owned(),
            "lock_expires_at" => "now() + interval '1 hour'".to_owned(),
            "retry_count" => number.to_string(),
            "max_retries" => "6".to_owned(),
            _ if attempt.is_some_and(|attempt| attempt >= number) => "null".to_owned(),
            _ => match kind {
                "text" => format!("'the {name}'"),
                "json" | "jsonb" => "'{\"a\": 1}'".to_owned(),
                "uuid" => "gen_random_uuid()".to_owned(),
                "boolean" => "true".to_owned(),
                "bigint" | "integer" | "smallint" => "3".to_owned(),
                "timestamp with time zone" => "now() - interval '1 hour'".to_owned(),
                other => panic!("say what a full column of type {other} holds, such as {name}"),
            },
        }
    };
    let (names, values): (Vec<_>, Vec<_>) =
        columns.iter().map(|(name, kind)| (name.as_str(), value_of(name, kind))).unzip();
    let insert = format!("insert into webhook_queue ({}) values ({})", names.join(", "), values.join(", "));
    execute(database, insert).await;
}

/// The only delivery, without what its end writes and the columns of attempt `number`.
async fn what_must_stay(database: &TestDatabase, number: i32) -> Value {
    let rows: Vec<Value> = sqlx::query_scalar(AssertSqlSafe(format!(
        "select to_jsonb(q) - {WRITTEN_AT_THE_END}
                - array(select k from jsonb_object_keys(to_jsonb(q)) k where k ~ '^retry_{number}_')
         from webhook_queue q"
    )))
    .fetch_all(&database.pool)
    .await
    .unwrap();
    assert_eq!(rows.len(), 1);
    rows[0].clone()
}

#[tokio::test]
async fn no_column_is_lost_when_a_delivery_ends() {
    let database = TestDatabase::new().await;
    // as a later migration would
    execute(
        &database,
        "alter table webhook_queue add column added_later text; select webhook_write_settles()",
    )
    .await;
    execute(&database, "select webhook_ensure_archives(1)").await;
    for number in 0..=6 {
        store_a_full_row(&database, number, "processing").await;
        let before = what_must_stay(&database, number).await;
        let settle = format!(
            "select webhook_settle_{number}_terminal(array[q.queue_id], array[q.worker_id], array[q.locked_at],
                      array[1::bigint], array[1::bigint], array[1], array[200::smallint], array['body'], array['error'],
                      array['failed'], array['the reason'])
             from webhook_queue_open q"
        );
        execute(&database, settle).await;
        assert_eq!(database.scalar::<i64>("select count(*) from webhook_queue_open").await, 0);
        assert_eq!(what_must_stay(&database, number).await, before, "attempt {number}");
        execute(&database, "delete from webhook_queue").await;

        // a cancelled one keeps its attempts, and has made no more
        store_a_full_row(&database, number, "pending").await;
        let before = what_must_stay(&database, 7).await;
        execute(&database, "select webhook_cancel(array(select queue_id from webhook_queue), 'the reason')")
            .await;
        assert_eq!(database.scalar::<i64>("select count(*) from webhook_queue_open").await, 0);
        assert_eq!(what_must_stay(&database, 7).await, before, "cancelled after {number} attempts");
        execute(&database, "delete from webhook_queue").await;
    }
}

async fn execute(database: &TestDatabase, statements: impl Into<String>) {
    sqlx::raw_sql(AssertSqlSafe(statements.into())).execute(&database.pool).await.unwrap();
}
