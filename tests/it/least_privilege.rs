//! The service as a role that owns nothing: all of it works, and nothing that has happened can be changed.

use serde_json::json;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};

use crate::support::cluster::Cluster;
use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command, output};
use crate::support::receiver::{Reply, TestReceiver};

const DATABASE: &str = "postgres";

/// A server whose database is set up as `deploy/` says.
async fn set_up() -> Cluster {
    let cluster = Cluster::start("");
    run_as(&cluster, "postgres", include_str!("../../deploy/roles.sql")).await.unwrap();
    let mut migrate = command(&TestDatabase::new().await, &["migrate"]);
    migrate.env("DATABASE_URL", url_as(&cluster, "webhook_migrations"));
    let migrated = output(migrate);
    assert!(migrated.status.success(), "{}", String::from_utf8_lossy(&migrated.stderr));
    run_as(&cluster, "webhook_migrations", include_str!("../../deploy/grants.sql")).await.unwrap();
    cluster
}

async fn run_as(cluster: &Cluster, role: &str, sql: &str) -> sqlx::Result<()> {
    let mut connection = cluster.options(DATABASE).username(role).connect().await?;
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await?;
    connection.close().await
}

fn url_as(cluster: &Cluster, role: &str) -> String {
    cluster.options(DATABASE).username(role).to_url_lossy().to_string()
}

async fn serve(cluster: &Cluster) -> Process {
    let mut serve = command(&TestDatabase::new().await, &["serve"]);
    serve.env("DATABASE_URL", url_as(cluster, "webhook_service"));
    Process::start(serve)
}

/// Archives of earlier days, as they would be there by now.
async fn make_archives(cluster: &Cluster) {
    let make = "DO $$
        DECLARE
          days_ago int;
          archive_day date;
        BEGIN
          SET LOCAL timezone = 'UTC';
          FOREACH days_ago IN ARRAY ARRAY[3, 100, 101] LOOP
            archive_day := current_date - days_ago;
            EXECUTE format('CREATE TABLE %I PARTITION OF webhook_queue (PRIMARY KEY (queue_id)) FOR VALUES FROM (%L) TO (%L)',
                           'webhook_queue_archive_' || to_char(archive_day, 'YYYYMMDD'), archive_day::timestamptz,
                           (archive_day + 1)::timestamptz);
          END LOOP;
        END $$";
    run_as(cluster, "webhook_migrations", make).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_does_all_of_its_work_as_a_role_that_owns_nothing() {
    let (receiver, cluster) = (TestReceiver::start().await, set_up().await);
    make_archives(&cluster).await;
    let process = serve(&cluster).await;
    let api = process.api();

    // deliveries: completed, dead, replayed, cancelled with their config
    let config =
        api.register(&receiver.url, json!({"max_retries": 1, "retry_base_ms": 1, "retry_cap_ms": 1})).await;
    let completed = api.credit(config).await;
    api.delivery_in(&completed, "completed").await;
    receiver.reply_always(Reply::status(500));
    let failed = api.credit(config).await;
    api.delivery_in(&failed, "failed").await;
    receiver.reply_always(Reply::status(200));
    let replay = api.post(&format!("/webhooks/{failed}/replay"), json!({})).await;
    assert!([200, 201].contains(&replay.status), "{}", replay.text);
    api.delivery_in(replay.json()["queue_id"].as_str().unwrap(), "completed").await;
    let doomed = api.register(&receiver.url, json!({"enabled": false})).await;
    let orphan = api.credit(doomed).await;
    let deleted = api.delete(&format!("/api/webhooks/{doomed}")).await;
    assert!([200, 204].contains(&deleted.status), "{}", deleted.text);
    api.delivery_in(&orphan, "cancelled").await;

    // a circuit opens, is probed, and closes
    receiver.reply_always(Reply::status(500));
    let fragile = json!({"circuit": {"failures_in_row": 2, "cooldown_ms": 100, "cooldown_cap_ms": 200}, "max_in_flight": 2});
    let fragile = api.register(&receiver.url, fragile).await;
    let held = [api.credit(fragile).await, api.credit(fragile).await];
    let opened = "select count(*) from webhook_circuit_openings";
    let probed = "select count(*) from webhook_probes";
    eventually("the circuit has opened and was probed", async || {
        let counts =
            (cluster.scalar::<i64>(DATABASE, opened).await, cluster.scalar::<i64>(DATABASE, probed).await);
        (counts.0 > 0 && counts.1 > 0).then_some(())
    })
    .await;
    receiver.reply_always(Reply::status(200));
    for queue_id in held {
        api.delivery_in(&queue_id, "completed").await;
    }

    // statistics are counted, archives indexed, retired and dropped
    let counted = "select coalesce(sum(occurrences), 0)::bigint from webhook_statistics
                   where config_id = 0 and fact in ('completed', 'failed', 'cancelled')";
    eventually("all is counted", async || {
        (cluster.scalar::<i64>(DATABASE, counted).await == 6).then_some(())
    })
    .await;
    assert_eq!(api.get("/webhooks/stats").await.status, 200);
    let dropped = "select count(*) from webhook_retired_archives where dropped_at is not null";
    eventually("old archives are dropped", async || {
        (cluster.scalar::<i64>(DATABASE, dropped).await == 2).then_some(())
    })
    .await;
    let indexed =
        "select count(*) from pg_indexes where indexname ~ '^webhook_queue_archive_\\d{8}_event_id$'";
    assert_eq!(cluster.scalar::<i64>(DATABASE, indexed).await, 1);
    let made = "select count(*) from webhook_archives where archive_day > current_date";
    assert!(cluster.scalar::<i64>(DATABASE, made).await >= 6);
    let ready = api.get("/health/ready").await;
    assert_eq!(ready.status, 200, "{}", ready.text);
    let log = process.log();
    assert!(!log.contains("permission denied") && !log.contains("must be owner"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_role_of_the_service_cannot_change_what_has_happened_nor_the_schema() {
    let (receiver, cluster) = (TestReceiver::start().await, set_up().await);
    let process = serve(&cluster).await;
    let config = process.api().register(&receiver.url, json!({})).await;
    let queue_id = process.api().credit(config).await;
    process.api().delivery_in(&queue_id, "completed").await;
    let archive: String = cluster
        .scalar(DATABASE, "select tableoid::regclass::text from webhook_queue where status = 'completed'")
        .await;

    for statement in [
        "update webhook_queue set webhook_url = 'http://elsewhere.example/'".to_owned(),
        "delete from webhook_queue".to_owned(),
        "truncate webhook_queue".to_owned(),
        format!("update {archive} set status = 'failed'"),
        format!("delete from {archive}"),
        format!("truncate {archive}"),
        format!("drop table {archive}"),
        format!("alter table webhook_queue detach partition {archive}"),
        format!("insert into webhook_retired_archives (archive) values ('{archive}')"),
        "update webhook_statistics set occurrences = 0".to_owned(),
        "delete from webhook_configs".to_owned(),
        "delete from webhook_event_keys".to_owned(),
        "delete from webhook_api_keys".to_owned(),
        "update webhook_operator_actions set operator = 'someone else'".to_owned(),
        "delete from webhook_operator_actions".to_owned(),
        "truncate webhook_operator_actions".to_owned(),
        "delete from _sqlx_migrations".to_owned(),
        "create table mine (id int)".to_owned(),
        "create temporary table webhook_archives (archive text)".to_owned(),
        "select webhook_write_settles()".to_owned(),
        "alter function webhook_retire_archives security invoker".to_owned(),
    ] {
        let refused = run_as(&cluster, "webhook_service", &statement).await.expect_err(&statement);
        let code = refused.as_database_error().and_then(sqlx::error::DatabaseError::code);
        assert_eq!(code.as_deref(), Some("42501"), "{statement}: {refused}");
    }

    // not even through what it may call
    run_as(&cluster, "webhook_service", "select webhook_retire_archives('-100 years', 1000000)")
        .await
        .unwrap();
    let kept: i64 =
        cluster.scalar(DATABASE, "select count(*) from webhook_queue where status = 'completed'").await;
    assert_eq!(kept, 1);
    let elsewhere = "select webhook_count_statistics(1000000), webhook_forget_retired(1000000)";
    run_as(&cluster, "webhook_service", &format!("set search_path = pg_temp, public; {elsewhere}"))
        .await
        .unwrap();
}

#[tokio::test]
async fn functions_that_run_as_their_owner_have_a_fixed_search_path_and_are_not_for_everyone() {
    let database = TestDatabase::new().await;
    let functions: Vec<String> = database
        .scalar("select array_agg(proname::text order by proname) from pg_proc where prosecdef and proname like 'webhook%'")
        .await;
    assert_eq!(
        functions,
        [
            "webhook_coarsen_statistics",
            "webhook_count_statistics",
            "webhook_ensure_archives",
            "webhook_forget_retired",
            "webhook_forget_statistics",
            "webhook_index_closed_archive",
            "webhook_retire_archives",
            "webhook_summarize_archives",
        ]
    );
    let open: Vec<String> = database
        .scalar(
            "select coalesce(array_agg(proname::text), '{}') from pg_proc
             where prosecdef and proname like 'webhook%'
             and (not 'search_path=public, pg_temp' = any (proconfig) or has_function_privilege('public', oid, 'execute'))",
        )
        .await;
    assert_eq!(open, [""; 0]);
}
