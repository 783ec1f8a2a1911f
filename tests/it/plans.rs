//! What keeps the queue fast, asserted without measuring time: plans, and which updates are HOT.

use serde_json::json;
use sqlx::{AssertSqlSafe, Row as _};
use webhook_processor::infrastructure::service::Role;

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::receiver::TestReceiver;
use crate::support::service::TestService;

/// The plan of a statement inside a function, under the function's own settings.
async fn plan_of(
    database: &TestDatabase,
    function: &str,
    from: &str,
    to: &str,
    arguments: &[(&str, &str)],
) -> String {
    let mut connection = database.pool.acquire().await.unwrap();
    let row = sqlx::query("select prosrc, proconfig from pg_proc where proname = $1")
        .bind(function)
        .fetch_one(&mut *connection)
        .await
        .unwrap();
    let source: String = row.get("prosrc");
    let settings: Vec<String> = row.get("proconfig");
    for setting in settings {
        let (name, value) = setting.split_once('=').unwrap();
        sqlx::query(AssertSqlSafe(format!("set {name} = '{value}'")))
            .execute(&mut *connection)
            .await
            .unwrap();
    }
    let begin = source.find(from).unwrap();
    let end = source[begin..].find(to).unwrap() + begin;
    let mut statement = source[begin..end].to_owned();
    for (parameter, value) in arguments {
        statement = statement.replace(parameter, value);
    }
    let plan: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!("explain (costs off) {statement}")))
        .fetch_all(&mut *connection)
        .await
        .unwrap();
    sqlx::query("reset all").execute(&mut *connection).await.unwrap();
    plan.join("\n")
}

async fn fill(database: &TestDatabase) {
    database
        .execute(
            "insert into webhook_configs (name, postback_url) values ('a', 'http://127.0.0.1:1/'), ('b', 'http://127.0.0.1:1/');
             alter table webhook_queue_open set (autovacuum_enabled = off);
             alter table webhook_configs set (autovacuum_enabled = off);
             insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries)
             select gen_random_uuid(), '+credit', g::text, 1 + g % 2, 'http://127.0.0.1:1/', 2, 6 from generate_series(1, 5000) g",
        )
        .await;
}

#[tokio::test]
async fn a_claim_walks_indexes_whether_the_table_was_analyzed_or_not() {
    let database = TestDatabase::new().await;
    fill(&database).await;
    let arguments = [
        ("p_worker_ids", "array_fill('w'::text, array[50])"),
        ("p_lease", "interval '5 min'"),
        ("p_after", "0::bigint"),
        ("p_held", "false"),
        ("p_share", "50"),
        ("p_config_ids", "(array[7]::bigint[])"),
        ("p_floor_keys", "(array[29]::bigint[])"),
        ("p_floors", "(array[now()]::timestamptz[])"),
        (
            "INTO tids, config_ids, config_revisions, priorities, ready_sinces, probes, in_flight_limits, rate_limits",
            "",
        ),
        ("rooms[", "(array[0]::int[])["),
        ("(listed, ", "((array[7]::bigint[]), "),
        ("cardinality(all_tids)", "0"),
        ("most_urgent AND least_urgent", "0 AND 3"),
    ];
    let taking = [
        ("p_worker_ids", "array['w']"),
        ("p_lease", "interval '5 min'"),
        ("all_tids", "'{}'::tid[]"),
        ("all_config_revisions", "'{}'::timestamptz[]"),
        ("all_in_flight_limits, starts_in_us)", "'{}'::int[], '{}'::bigint[])"),
        ("all_probes", "'{}'::boolean[]"),
    ];
    for state in ["never analyzed", "analyzed"] {
        let choice = plan_of(&database, "webhook_claim", "WITH due AS (", ";", &arguments).await;
        let taken = plan_of(&database, "webhook_claim", "WITH due AS MATERIALIZED", ";", &taking).await;
        let plan = format!("{choice}\n{taken}");
        assert!(
            plan.contains("Index Scan using webhook_queue_open_ready")
                || plan.contains("Index Only Scan using webhook_queue_open_ready"),
            "{plan}"
        );
        assert!(plan.contains("Tid Scan on webhook_queue_open"), "{plan}");
        assert!(plan.contains("webhook_configs_pkey"), "{plan}");
        for spoiler in ["Seq Scan", "Sort", "Bitmap", "Hash", "Merge Join"] {
            assert!(!plan.contains(spoiler), "{state}: {spoiler} in\n{plan}");
        }
        database.execute("analyze").await;
    }
}

#[tokio::test]
async fn promotion_and_settling_walk_indexes_too() {
    let database = TestDatabase::new().await;
    fill(&database).await;
    let promote = plan_of(&database, "webhook_promote", "WITH due", ";", &[("p_limit", "50")]).await;
    let nothing = [
        ("p_queue_ids", "'{}'::uuid[]"),
        ("p_workers", "'{}'::text[]"),
        ("p_locked_ats", "'{}'::timestamptz[]"),
        ("p_ages_us", "'{}'::bigint[]"),
        ("p_lengths_us", "'{}'::bigint[]"),
        ("p_durations_ms", "'{}'::int[]"),
        ("p_http_statuses", "'{}'::smallint[]"),
        ("p_bodies", "'{}'::text[]"),
        ("p_errors", "'{}'::text[]"),
        ("p_error_kinds", "'{}'::text[]"),
        ("p_evidence", "'{}'::text[]"),
        ("p_statuses", "'{}'::text[]"),
        ("p_reasons", "'{}'::text[]"),
        ("p_delays_us", "'{}'::bigint[]"),
    ];
    let terminal = plan_of(&database, "webhook_settle_0_terminal", "WITH outcome", ";", &nothing).await;
    let retry = plan_of(&database, "webhook_settle_3_retry", "WITH outcome", ";", &nothing).await;

    assert!(promote.contains("webhook_queue_open_scheduled"), "{promote}");
    for plan in [promote, terminal, retry] {
        assert!(plan.contains("Index Scan using webhook_queue_open_pkey"), "{plan}");
        assert!(!plan.contains("Seq Scan"), "{plan}");
    }
}

#[tokio::test]
async fn no_index_mentions_what_a_claim_changes() {
    let database = TestDatabase::new().await;
    let indexed: Vec<String> = sqlx::query_scalar(
        "select pg_get_indexdef(indexrelid) from pg_index where indrelid = 'webhook_queue_open'::regclass",
    )
    .fetch_all(&database.pool)
    .await
    .unwrap();
    assert_eq!(indexed.len(), 3);
    for definition in indexed {
        for column in [
            "status",
            "worker_id",
            "locked_at",
            "lock_expires_at",
            "abandoned_by",
            "abandoned_at",
            "updated_at",
        ] {
            assert!(!definition.contains(column), "{definition}");
        }
    }
}

#[tokio::test]
async fn a_table_that_was_never_analyzed_is_drained_by_hot_claims() {
    let receiver = TestReceiver::start().await;
    let database = TestDatabase::new().await;
    let api = TestService::start_with(Role::Api, database.clone(), &[]).await;
    api.api.register(&receiver.url, json!({})).await;
    database
        .execute(
            "alter table webhook_queue_open set (autovacuum_enabled = off);
             insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, url_params, priority, max_retries)
             select gen_random_uuid(), '+credit', g::text, 1, c.postback_url, '{\"user_id\":\"user_123\",\"value\":100}', 2, 6
             from generate_series(1, 3000) g, webhook_configs c",
        )
        .await;

    let worker = TestService::start_with(Role::Worker, database.clone(), &[]).await;
    eventually("all are delivered", async || {
        let open: i64 = database.scalar("select count(*) from webhook_queue_open").await;
        (open == 0).then_some(())
    })
    .await;
    worker.stop().await;
    api.stop().await;

    assert_eq!(receiver.count(), 3000);
    let row = eventually("the statistics of the table arrive", async || {
        let row = sqlx::query(
            "select n_tup_upd, n_tup_hot_upd, last_analyze, last_autoanalyze from pg_stat_user_tables where relname = 'webhook_queue_open'",
        )
        .fetch_one(&database.pool)
        .await
        .unwrap();
        (row.get::<i64, _>("n_tup_upd") >= 3000).then_some(row)
    })
    .await;
    let (updates, hot): (i64, i64) = (row.get("n_tup_upd"), row.get("n_tup_hot_upd"));
    assert!(hot * 100 >= updates * 95, "{hot} of {updates} updates were HOT");
    for analyzed in ["last_analyze", "last_autoanalyze"] {
        assert!(row.get::<Option<chrono::DateTime<chrono::Utc>>, _>(analyzed).is_none());
    }
}
