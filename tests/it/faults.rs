//! What goes wrong around an attempt: pauses of the process, a database that refuses or stalls, bodies that do not end. What
//! a receiver has confirmed is never sent again.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;
use sqlx::postgres::{PgConnectOptions, PgPool};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};
use webhook_processor::infrastructure::embedded_postgres::{EmbeddedOptions, EmbeddedPostgres};

use crate::support::disk::Disk;
use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command};
use crate::support::raw_receiver::{self, Behaviour};
use crate::support::receiver::{Reply, TestReceiver};
use crate::support::service::{ApiClient, TestService};

/// How many requests are in flight when something goes wrong.
const IN_FLIGHT: usize = 50;

/// How many requests came for each delivery.
fn requests_by_delivery(receiver: &TestReceiver) -> HashMap<String, usize> {
    let mut requests = HashMap::new();
    for arrival in receiver.arrivals() {
        *requests.entry(arrival.headers["webhook-id"].to_str().unwrap().to_owned()).or_default() += 1;
    }
    requests
}

async fn credits(api: &ApiClient, config: i64, count: usize) {
    let events = vec![json!({"event_type": "+credit", "config_id": config}); count];
    let answer = api.post("/webhooks/batch", json!(events)).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
}

async fn arrived(receiver: &TestReceiver, count: usize) {
    eventually(&format!("{count} requests"), async || (receiver.count() >= count).then_some(())).await;
}

async fn completed(api: &ApiClient, count: usize) {
    eventually(&format!("{count} completed"), async || {
        let answer = api.get("/webhooks/stats").await;
        (answer.status == 200 && answer.json()["completed"] == count).then_some(())
    })
    .await;
}

/// All were delivered by one request each, and the audit shows these requests and no others.
async fn assert_each_was_sent_once(api: &ApiClient, receiver: &TestReceiver, count: usize) {
    completed(api, count).await;
    let requests = requests_by_delivery(receiver);
    assert_eq!(requests.len(), count);
    let twice = requests.values().filter(|&&requests| requests > 1).count();
    assert_eq!(twice, 0, "of {count} were sent more than once");
    assert_eq!(api.get("/webhooks/stats").await.json()["attempts"], count);
}

#[tokio::test]
async fn an_answer_counts_although_its_body_does_not_end_in_time() {
    let service = TestService::start().await;
    let settings = json!({"timeout_ms": 200, "retry_base_ms": 1, "retry_cap_ms": 1});
    for (answer, status, http_status) in [
        (&b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n"[..], "completed", 200),
        (b"HTTP/1.1 200 OK\r\n\r\nok", "completed", 200),
        (b"HTTP/1.1 410 Gone\r\ncontent-length: 9\r\n\r\nok", "failed", 410),
    ] {
        let url = raw_receiver::start(Behaviour::Answer(answer)).await;
        let config = service.api.register(&url, settings.clone()).await;
        let queue_id = service.api.credit(config).await;

        let ended = service.api.delivery_in(&queue_id, status).await;

        let attempts = ended["attempts"].as_array().unwrap();
        assert_eq!(attempts.len(), 1, "{ended}");
        let attempt = &attempts[0];
        assert_eq!((&attempt["http_status"], &attempt["response_body"]), (&json!(http_status), &json!("ok")));
        assert_eq!(attempt["error"], "the response did not end within 200 ms");
    }
    service.stop().await;
}

#[tokio::test]
async fn a_body_that_comes_drop_by_drop_does_not_make_an_attempt_last_for_ever() {
    let service = TestService::start().await;
    let url = raw_receiver::start(Behaviour::Dripping {
        beginning: b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        again: b"1\r\n.\r\n",
    })
    .await;
    let config = service.api.register(&url, json!({"timeout_ms": 200})).await;

    let queue_id = service.api.credit(config).await;
    let delivery = service.api.delivery_in(&queue_id, "completed").await;

    let attempt = &delivery["attempts"][0];
    assert_eq!(
        (&attempt["http_status"], attempt["response_body"].as_str().unwrap().len() < 4096),
        (&json!(200), true)
    );
    service.stop().await;
}

/// A process of its own, with a short time limit, and `IN_FLIGHT` requests under way that are answered after `answer_after`.
async fn process_with_requests_under_way(
    database: &TestDatabase,
    receiver: &TestReceiver,
    settings: &[(&str, &str)],
    answer_after: Duration,
) -> (Process, ApiClient) {
    let mut serve = command(database, &["serve"]);
    serve.envs(settings.iter().copied());
    let process = Process::start(serve);
    let api = process.api();
    let config = api.register(&receiver.url, json!({"retry_base_ms": 1, "retry_cap_ms": 1})).await;
    receiver.reply_always(Reply::status(200).after(answer_after));
    credits(&api, config, IN_FLIGHT).await;
    arrived(receiver, IN_FLIGHT).await;
    (process, api)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_was_stopped_for_longer_than_the_time_limit_reads_the_answers_that_came_meanwhile() {
    let (database, receiver) = (TestDatabase::empty().await, TestReceiver::start().await);
    let settings = [("HTTP_TIMEOUT", "2s")];
    let (process, api) =
        process_with_requests_under_way(&database, &receiver, &settings, Duration::from_millis(300)).await;

    process.signal("STOP");
    tokio::time::sleep(Duration::from_secs(4)).await;
    process.signal("CONT");

    assert_each_was_sent_once(&api, &receiver, IN_FLIGHT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_process_that_was_stopped_for_longer_than_its_leases_settles_what_it_knows() {
    let (database, receiver) = (TestDatabase::empty().await, TestReceiver::start().await);
    let settings =
        [("HTTP_TIMEOUT", "1s"), ("WORKER_LOCK_DURATION", "16s"), ("WORKER_POLL_INTERVAL", "50ms")];
    let (process, api) =
        process_with_requests_under_way(&database, &receiver, &settings, Duration::from_millis(300)).await;

    process.signal("STOP");
    database
        .execute("update webhook_queue_open set locked_at = locked_at, lock_expires_at = locked_at + interval '1 microsecond'")
        .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    process.signal("CONT");

    assert_each_was_sent_once(&api, &receiver, IN_FLIGHT).await;
}

/// Runs statements as the superuser of the server behind `database`.
async fn administer(database: &TestDatabase, statements: &[String]) {
    let mut connection = database.options.clone().database("postgres").connect().await.unwrap();
    for statement in statements {
        sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&mut connection).await.unwrap();
    }
    connection.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn outcomes_are_kept_while_access_to_the_database_is_withdrawn() {
    let (database, receiver) = (TestDatabase::empty().await, TestReceiver::start().await);
    let name = database.options.get_database().unwrap().to_owned();
    let role = format!("role_of_{name}");
    administer(&database, &[format!("create role {role} login superuser")]).await;
    let as_role =
        TestDatabase { options: database.options.clone().username(&role), pool: database.pool.clone() };
    let (_process, api) =
        process_with_requests_under_way(&as_role, &receiver, &[], Duration::from_secs(1)).await;

    let cut = format!("select pg_terminate_backend(pid) from pg_stat_activity where usename = '{role}'");
    administer(&database, &[format!("alter role {role} nologin"), cut.clone()]).await;
    let refused = api.post("/webhooks", json!({"event_type": "+credit", "config_id": 1})).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    administer(&database, &[format!("alter role {role} login")]).await;

    assert_eq!(
        (refused.status, refused.headers.contains_key("retry-after")),
        (503, true),
        "{}",
        refused.text
    );
    assert_each_was_sent_once(&api, &receiver, IN_FLIGHT).await;

    // the same where the database itself lets nobody in
    credits(&api, 1, IN_FLIGHT).await;
    arrived(&receiver, 2 * IN_FLIGHT).await;
    let cut = format!("select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'");
    administer(&database, &[format!("alter database {name} allow_connections false"), cut]).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    administer(&database, &[format!("alter database {name} allow_connections true")]).await;

    assert_each_was_sent_once(&api, &receiver, 2 * IN_FLIGHT).await;
}

/// A server of a test's own, whose commits can be made to wait.
async fn own_server(purpose: &str) -> (EmbeddedPostgres, EmbeddedOptions, PgConnectOptions) {
    let directory = std::env::temp_dir().join(format!("webhook-processor-{purpose}-{}", std::process::id()));
    let options = EmbeddedOptions { directory, durable: false, binaries: None };
    let server = EmbeddedPostgres::start(&options).await.unwrap();
    let connect = server.connect_options();
    (server, options, connect)
}

/// Lets all commits wait for a standby that does not exist, or no longer.
async fn stall_commits(connect: &PgConnectOptions, stalled: bool) {
    let mut connection = connect.clone().database("postgres").connect().await.unwrap();
    let standbys = if stalled { "nobody" } else { "" };
    for statement in [
        "alter system set synchronous_commit = 'on'".to_owned(),
        format!("alter system set synchronous_standby_names = '{standbys}'"),
        "select pg_reload_conf()".to_owned(),
    ] {
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await.unwrap();
    }
    connection.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn outcomes_that_are_known_win_over_leases_that_end_while_commits_stall() {
    let (server, options, connect) = own_server("stall").await;
    let database =
        TestDatabase { options: connect.clone(), pool: PgPool::connect_lazy_with(connect.clone()) };
    let receiver = TestReceiver::start().await;
    let settings =
        [("HTTP_TIMEOUT", "4s"), ("WORKER_LOCK_DURATION", "19s"), ("WORKER_POLL_INTERVAL", "500ms")];
    let start = |role| {
        let mut program = command(&database, &[role]);
        program.envs(settings);
        Process::start(program)
    };
    let (first, second) = (start("serve"), start("worker"));
    let api = first.api();
    let config = api.register(&receiver.url, json!({"retry_base_ms": 1, "retry_cap_ms": 1})).await;
    // one after the other, so that the commit of the first outcomes stalls while the others come in
    let answer_after = |n: usize| Duration::from_millis(1_500 + 20 * u64::try_from(n).unwrap());
    receiver.reply_with((0..IN_FLIGHT).map(|n| Reply::status(200).after(answer_after(n))));
    credits(&api, config, IN_FLIGHT).await;
    arrived(&receiver, IN_FLIGHT).await;

    stall_commits(&connect, true).await;
    // longer than the leases
    tokio::time::sleep(Duration::from_secs(24)).await;
    stall_commits(&connect, false).await;

    assert_each_was_sent_once(&api, &receiver, IN_FLIGHT).await;
    drop((first, second));
    server.stop().await.unwrap();
    let _ = std::fs::remove_dir_all(&options.directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn outcomes_that_are_known_win_over_leases_that_end_while_the_disk_is_full() {
    let mount = std::env::temp_dir().join(format!("webhook-processor-full-{}", std::process::id()));
    let Some(disk) = Disk::mount(&mount, "200m") else {
        eprintln!("left out: no file system can be mounted here");
        return;
    };
    let options = EmbeddedOptions { directory: disk.path().join("postgres"), durable: true, binaries: None };
    let server = EmbeddedPostgres::start(&options).await.unwrap();
    let connect = server.connect_options();
    let database =
        TestDatabase { options: connect.clone(), pool: PgPool::connect_lazy_with(connect.clone()) };
    let receiver = TestReceiver::start().await;
    let start = |role| {
        let mut program = command(&database, &[role]);
        program.env("WORKER_POLL_INTERVAL", "200ms");
        Process::start(program)
    };
    let (first, second) = (start("serve"), start("worker"));
    let api = first.api();
    let config = api.register(&receiver.url, json!({"retry_base_ms": 1, "retry_cap_ms": 1})).await;
    // the index of retries has room for more: then a loss can be written, although an archive has no room for an outcome
    let later = chrono::Utc::now() + chrono::TimeDelta::hours(1);
    let scheduled = json!({"event_type": "+credit", "config_id": config, "scheduled_at": later});
    assert_eq!(api.post("/webhooks", scheduled).await.status, 201);
    receiver.reply_always(Reply::status(200).after(Duration::from_secs(5)));
    credits(&api, config, IN_FLIGHT).await;
    arrived(&receiver, IN_FLIGHT).await;

    // stopped, so that the disk is full before they read an answer
    let processes = [first, second];
    for process in &processes {
        process.signal("STOP");
    }
    disk.fill();
    for process in &processes {
        process.signal("CONT");
    }
    eventually("outcomes that find no room", async || {
        processes.iter().any(|process| process.log().contains("No space left on device")).then_some(())
    })
    .await;
    database
        .execute("update webhook_queue_open set lock_expires_at = locked_at + interval '1 microsecond' where status = 'processing'")
        .await;
    // longer than a takeover waits before it writes the loss, and the retry after it
    tokio::time::sleep(Duration::from_secs(10)).await;
    disk.free();

    assert_each_was_sent_once(&api, &receiver, IN_FLIGHT).await;
    for process in &processes {
        assert!(!process.log().contains("the lease was lost"), "{}", process.log());
    }
    drop(processes);
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_claimed_by_a_claim_whose_answer_was_lost_is_ready_again_soon_and_no_attempt_is_invented() {
    let (server, options, connect) = own_server("lost-claim").await;
    let database =
        TestDatabase { options: connect.clone(), pool: PgPool::connect_lazy_with(connect.clone()) };
    let receiver = TestReceiver::start().await;
    let mut serve = command(&database, &["serve"]);
    serve.env("WORKER_POLL_INTERVAL", "200ms");
    let process = Process::start(serve);
    let api = process.api();
    let config = api.register(&receiver.url, json!({"max_retries": 0})).await;
    assert_eq!(config, 1);

    // whose lock would hold up everything while their commit stalls
    eventually("the archives", async || {
        (database.scalar::<i64>("select count(*) from webhook_archives").await == 8).then_some(())
    })
    .await;
    // the claim takes them, and its commit waits for longer than the claim is waited for
    stall_commits(&connect, true).await;
    database
        .execute("set synchronous_commit = off;
                  insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries)
                  select gen_random_uuid(), '+credit', g::text, 1, (select postback_url from webhook_configs), 2, 0
                  from generate_series(1, 40) g")
        .await;
    process.wait_for_log("cannot claim");
    stall_commits(&connect, false).await;

    assert_each_was_sent_once(&api, &receiver, 40).await;
    drop(process);
    server.stop().await.unwrap();
    let _ = std::fs::remove_dir_all(&options.directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settle_whose_answer_was_lost_is_no_lost_lease() {
    let (server, options, connect) = own_server("lost-settle").await;
    let database =
        TestDatabase { options: connect.clone(), pool: PgPool::connect_lazy_with(connect.clone()) };
    let receiver = TestReceiver::start().await;
    let (process, api) =
        process_with_requests_under_way(&database, &receiver, &[], Duration::from_secs(2)).await;

    stall_commits(&connect, true).await;
    process.wait_for_log("outcomes cannot be written");
    stall_commits(&connect, false).await;

    assert_each_was_sent_once(&api, &receiver, IN_FLIGHT).await;
    // the table knows of an outcome before the process does whose answer was lost
    let delivered = format!("webhook_deliveries_total{{status=\"completed\"}} {IN_FLIGHT}\n");
    let metrics = eventually("the process counts them", async || {
        let metrics = api.get("/metrics").await.text;
        metrics.contains(&delivered).then_some(metrics)
    })
    .await;
    assert!(metrics.contains("\nwebhook_leases_lost_total 0\n"), "{}", process.log());
    drop(process);
    server.stop().await.unwrap();
    let _ = std::fs::remove_dir_all(&options.directory);
}

#[tokio::test]
async fn an_outcome_that_the_database_refuses_is_written_without_its_text() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    service
        .database
        .execute("create function refuse() returns trigger language plpgsql as $$
                  begin
                    if new.retry_0_response_body like '%poison%' then raise exception using errcode = '22P05', message = 'untranslatable'; end if;
                    return new;
                  end $$;
                  create trigger refuse before insert on webhook_queue for each row execute function refuse()")
        .await;
    let config = service.api.register(&receiver.url, json!({})).await;
    receiver.reply_with([Reply::status(200).body("poison")]);

    let queue_id = service.api.credit(config).await;
    let delivery = service.api.delivery_in(&queue_id, "completed").await;

    assert_eq!(receiver.count(), 1);
    let attempt = &delivery["attempts"][0];
    assert_eq!((&attempt["http_status"], &attempt["response_body"]), (&json!(200), &json!("")));
    service.stop().await;
}
