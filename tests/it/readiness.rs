//! `/health/ready` fails while nothing can be stored, whatever the reason, and recovers by itself.

use std::path::PathBuf;

use serde_json::json;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};
use webhook_processor::infrastructure::embedded_postgres::{EmbeddedOptions, EmbeddedPostgres};

use crate::support::disk::Disk;
use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command};
use crate::support::receiver::TestReceiver;
use crate::support::service::ApiClient;

/// Waits until the readiness of a service is as it should be, and returns its text.
async fn ready_is(api: &ApiClient, status: u16, said: &str) -> String {
    eventually(&format!("ready is {status} with {said}"), async || {
        let ready = api.get("/health/ready").await;
        (ready.status == status && ready.text.contains(said)).then_some(ready.text)
    })
    .await
}

/// A server of a test's own, which it may spoil.
fn own_server(directory: PathBuf) -> EmbeddedOptions {
    // one that is not durable commits without waiting
    EmbeddedOptions { directory, durable: true, binaries: None }
}

fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("webhook-processor-{name}-{}", std::process::id()))
}

async fn execute(server: &EmbeddedPostgres, sql: &str) {
    let mut connection = server.connect_options().connect().await.unwrap();
    for statement in sql.split(';') {
        sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut connection).await.unwrap();
    }
    connection.close().await.unwrap();
}

async fn serve_on(server: &EmbeddedPostgres) -> Process {
    let mut serve = command(&TestDatabase::new().await, &["serve"]);
    serve.env("DATABASE_URL", server.connect_options().to_url_lossy().to_string());
    Process::start(serve)
}

#[tokio::test(flavor = "multi_thread")]
async fn ready_fails_while_the_database_is_read_only() {
    let database = TestDatabase::new().await;
    let name = database.options.get_database().unwrap().to_owned();
    let process = Process::start(command(&database, &["serve"]));
    let api = process.api();
    ready_is(&api, 200, "writes").await;

    // connections that are open keep what they began with
    let kick = format!("select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'");
    database.run(&format!("alter database {name} set default_transaction_read_only = on;{kick}")).await;
    ready_is(&api, 503, "is read-only").await;

    database.run(&format!("alter database {name} reset default_transaction_read_only;{kick}")).await;
    ready_is(&api, 200, "are committed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ready_fails_while_commits_stall_and_the_checks_do_not_use_up_connections() {
    let options = own_server(scratch("stalled"));
    let server = EmbeddedPostgres::start(&options).await.unwrap();
    let process = serve_on(&server).await;
    let api = process.api();
    ready_is(&api, 200, "are committed").await;

    execute(&server, "alter system set synchronous_standby_names = 'nobody';select pg_reload_conf()").await;
    ready_is(&api, 503, "a small commit has had no answer").await;
    for _ in 0..20 {
        api.get("/health/ready").await;
    }
    let mut connection = server.connect_options().connect().await.unwrap();
    let checks: i64 = sqlx::query_scalar(
        "select count(*) from pg_stat_activity where wait_event = 'SyncRep' and backend_xid is not null
         and application_name = 'webhook-processor' and query ilike 'commit%'",
    )
    .fetch_one(&mut connection)
    .await
    .unwrap();
    assert!(checks <= 1, "{checks} checks hang at a time");
    drop(connection);

    execute(&server, "alter system reset synchronous_standby_names;select pg_reload_conf()").await;
    ready_is(&api, 200, "are committed").await;
    drop(process);
    server.stop().await.unwrap();
    let _ = std::fs::remove_dir_all(&options.directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn ready_fails_while_the_disk_is_full() {
    let Some(disk) = Disk::mount(&scratch("disk"), "200m") else {
        eprintln!("left out: no file system can be mounted here");
        return;
    };
    let receiver = TestReceiver::start().await;
    let server = EmbeddedPostgres::start(&own_server(disk.path().join("postgres"))).await.unwrap();
    let process = serve_on(&server).await;
    let api = process.api();
    let config = api.register(&receiver.url, json!({})).await;
    ready_is(&api, 200, "are committed").await;

    // the log keeps its room: without it the server ends, which is another story
    disk.fill();
    ready_is(&api, 503, "No space left on device").await;

    disk.free();
    ready_is(&api, 200, "are committed").await;
    let queue_id = api.credit(config).await;
    api.delivery_in(&queue_id, "completed").await;
    drop(process);
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn ready_fails_while_due_deliveries_cannot_be_made_ready() {
    let database = TestDatabase::new().await;
    let process = Process::start(command(&database, &["serve"]));
    let api = process.api();
    ready_is(&api, 200, "are done").await;

    database.execute("alter function webhook_promote rename to webhook_promote_is_away").await;
    ready_is(&api, 503, "making ready what is due").await;

    database.execute("alter function webhook_promote_is_away rename to webhook_promote").await;
    ready_is(&api, 200, "are done").await;
}
