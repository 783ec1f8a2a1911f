//! The way to the database: starts wait for it, commands refuse at once, and both say in a sentence what is wrong.

use std::process::Output;

use serde_json::json;
use webhook_processor::infrastructure::postgres::MIGRATIONS;

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command, output};
use crate::support::receiver::TestReceiver;

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// A command on another way to the database.
fn by(url: &str, database: &TestDatabase, args: &[&str]) -> std::process::Command {
    let mut command = command(database, args);
    command.env("DATABASE_URL", url);
    command
}

/// The one line that a command refuses with.
fn refusal(command: std::process::Command) -> String {
    let output = output(command);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let said = text(&output);
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(!said.contains("at line "), "a line of PostgreSQL's source is no news: {said}");
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn four_processes_that_start_at_once_on_an_empty_database_all_come_up() {
    let database = TestDatabase::empty().await;
    let starting: Vec<_> = (0..4).map(|_| Process::start_waiting(command(&database, &["serve"]))).collect();
    for process in &starting {
        process.wait_for_log("the service is ready");
    }
    let applied: i64 = database.scalar("select count(*) from _sqlx_migrations where success").await;
    assert_eq!(usize::try_from(applied).unwrap(), MIGRATIONS.iter().count());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_waits_while_its_database_refuses_and_says_why_and_goes_on_by_itself() {
    // how the database is made to refuse {role} {database}, how it is opened again, and what is said
    let refusals = [
        ("alter role {role} nologin", "alter role {role} login", "is not permitted to log in"),
        (
            "alter database {database} rename to {database}_away",
            "alter database {database}_away rename to {database}",
            "has no database \"{database}\"",
        ),
        (
            "alter database {database} allow_connections false",
            "alter database {database} allow_connections true",
            "ALLOW_CONNECTIONS true opens it",
        ),
        (
            "alter role {role} connection limit 0",
            "alter role {role} connection limit -1",
            "too many connections",
        ),
        (
            "alter database {database} owner to postgres",
            "alter database {database} owner to {role}",
            "permission denied for schema public",
        ),
        (
            "alter database {database} set default_transaction_read_only = on",
            "alter database {database} reset default_transaction_read_only",
            "is read-only",
        ),
    ];
    for (refuse, admit, said) in refusals {
        let database = TestDatabase::empty().await;
        let role = database.hand_over().await;
        let url = database.url_as(&role);
        let name = database.options.get_database().unwrap().to_owned();
        let filled = |text: &str| text.replace("{role}", &role).replace("{database}", &name);
        database.run(&filled(refuse)).await;

        let process = Process::start_waiting(by(&url, &database, &["serve"]));
        process.wait_for_log(&filled(said));
        let api = process.api();
        assert_eq!(api.get("/health/live").await.status, 200, "{refuse}");
        eventually("the reason is shown", async || {
            let ready = api.get("/health/ready").await;
            assert_eq!(ready.status, 503, "{refuse}");
            ready.text.contains(&filled(said).replace('"', "\\\"")).then_some(())
        })
        .await;
        for (path, answer) in [
            ("POST", api.post("/webhooks", json!({"event_type": "+credit", "config_id": 1})).await),
            ("GET", api.get("/webhooks/stats").await),
        ] {
            assert_eq!(answer.status, 503, "{refuse}: {path} {}", answer.text);
            assert_eq!(answer.headers["content-type"], "application/problem+json");
            assert!(answer.headers.contains_key("retry-after"));
        }
        let refused = refusal(by(&url, &database, &["migrate"]));
        assert!(refused.contains(&filled(said)), "{refused}");

        database.run(&filled(admit)).await;
        process.wait_for_log("the service is ready");
        assert_eq!(api.get("/webhooks/stats").await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_host_port_or_user_is_told_in_one_sentence_without_the_password() {
    let database = TestDatabase::new().await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let port = closed.port();
    for (url, said) in [
        (
            format!("postgres://app:s3cret@127.0.0.1:{port}/shop"),
            format!("nothing listens at 127.0.0.1:{port}"),
        ),
        (
            "postgres://app:s3cret@no-such-host.invalid/shop".to_owned(),
            "the host of no-such-host.invalid:5432 cannot be found".to_owned(),
        ),
        (database.url_as("nobody_of_that_name"), "role \"nobody_of_that_name\" does not exist".to_owned()),
        ("postgres://app:s3cret#1@127.0.0.1/shop".to_owned(), "percent-encoded".to_owned()),
        ("postgres://app:s3cret@127.0.0.1/shop?sslmode=bogus".to_owned(), "sslmode=\"bogus\"".to_owned()),
    ] {
        let refused = refusal(by(&url, &database, &["stats"]));
        assert!(refused.contains(&said), "{said}: {refused}");
        assert!(refused.contains("DATABASE_URL") && !refused.contains("s3cret"), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_cannot_hold_every_answer_is_refused_for_good() {
    let database = TestDatabase::empty().await;
    let name = format!("{}_latin1", database.options.get_database().unwrap());
    database
        .run(&format!(
            "create database {name} encoding 'LATIN1' lc_collate 'C' lc_ctype 'C' template template0"
        ))
        .await;
    let url = sqlx::ConnectOptions::to_url_lossy(&database.options.clone().database(&name)).to_string();

    for role in ["serve", "migrate"] {
        let output = output(by(&url, &database, &[role]));
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output).contains("has the encoding LATIN1"), "{}", text(&output));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_only_read_can_use_the_reading_commands_and_so_can_anyone_on_a_standby() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::new().await);
    let process = Process::start(command(&database, &["serve"]));
    let config = process.api().register(&receiver.url, json!({})).await;
    let queue_id = process.api().credit(config).await;
    process.api().delivery_in(&queue_id, "completed").await;
    let reader = format!("{}_reader", database.options.get_database().unwrap());
    database.run(&format!("create role {reader} login; grant pg_read_all_data to {reader}")).await;
    let name = database.options.get_database().unwrap();
    database.run(&format!("alter database {name} set default_transaction_read_only = on")).await;

    let config = config.to_string();
    for args in [
        &["stats"][..],
        &["show", &queue_id],
        &["replay", "--failed", "--dry-run"],
        &["configs", "list"],
        &["configs", "show", &config],
    ] {
        let output = output(by(&database.url_as(&reader), &database, args));
        assert!(output.status.success(), "{args:?}: {}", text(&output));
    }
    let refused = refusal(command(&database, &["configs", "disable", &config]));
    assert!(refused.contains("is read-only"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_never_change_the_schema_and_refuse_one_that_is_too_old_for_them() {
    let empty = TestDatabase::empty().await;
    let older = TestDatabase::new().await;
    let newest = MIGRATIONS.iter().map(|migration| migration.version).max().unwrap();
    older
        .execute("delete from _sqlx_migrations where version = (select max(version) from _sqlx_migrations)")
        .await;

    for args in [
        &["stats"][..],
        &["configs", "list"],
        &["configs", "register", "--name", "x", "--postback-url", "https://x.example/"],
        &["enqueue", "--type", "+credit", "--config-id", "1"],
        &["replay", "--failed"],
    ] {
        let refused = refusal(command(&older, args));
        assert!(
            refused.contains(&format!(
                "the database's schema is of version {}, this program needs {newest}: run webhook-processor migrate",
                newest - 1
            )) || refused.contains(&format!("this program needs {newest}: run webhook-processor migrate")),
            "{refused}"
        );
        let refused = refusal(command(&empty, args));
        assert!(refused.contains("has no schema yet"), "{refused}");
    }
    let tables: i64 = empty.scalar("select count(*) from pg_class where relname like 'webhook%'").await;
    assert_eq!(tables, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_program_works_on_with_a_newer_schema() {
    let database = TestDatabase::new().await;
    database
        .execute(
            "insert into _sqlx_migrations (version, description, success, checksum, execution_time)
             values (999999, 'of a newer program', true, 'x', 0)",
        )
        .await;

    let process = Process::start(command(&database, &["serve"]));

    assert_eq!(process.api().get("/health/ready").await.status, 200);
    assert!(output(command(&database, &["stats"])).status.success());
    assert!(output(command(&database, &["migrate"])).status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_on_a_schema_that_is_up_to_date_waits_for_nobody() {
    let database = TestDatabase::new().await;
    // whoever holds a lock on the table of migrations, by a dump or a migration of their own
    let mut other = database.pool.begin().await.unwrap();
    sqlx::raw_sql(
        "lock table _sqlx_migrations in exclusive mode;
         select pg_advisory_xact_lock(x'77656268'::bigint << 32 | x'6f6f6b73'::bigint)",
    )
    .execute(&mut *other)
    .await
    .unwrap();

    let process = Process::start(command(&database, &["serve"]));

    assert_eq!(process.api().get("/health/live").await.status, 200);
    other.rollback().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_must_migrate_waits_for_another_that_does_and_says_so() {
    let database = TestDatabase::empty().await;
    let mut other = database.pool.begin().await.unwrap();
    sqlx::raw_sql("select pg_advisory_xact_lock(x'77656268'::bigint << 32 | x'6f6f6b73'::bigint)")
        .execute(&mut *other)
        .await
        .unwrap();

    let process = Process::start_waiting(command(&database, &["serve"]));
    process.wait_for_log("another process brings the database's schema up to date; waiting for it");
    assert_eq!(process.api().get("/health/live").await.status, 200);
    assert_eq!(process.api().get("/health/ready").await.status, 503);
    other.rollback().await.unwrap();

    process.wait_for_log("the service is ready");
}

#[test]
fn reading_commands_without_a_database_refuse_and_make_nothing() {
    let here = std::env::temp_dir().join(format!("webhook-processor-nowhere-{}", std::process::id()));
    std::fs::create_dir_all(&here).unwrap();
    for args in [
        &["stats"][..],
        &["configs", "list"],
        &["replay", "--failed", "--dry-run"],
        &["enqueue", "--type", "+credit", "--config-id", "1"],
    ] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_webhook-processor"));
        command.args(args).current_dir(&here).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        let refused = refusal(command);
        assert!(
            refused.contains("no DATABASE_URL is set, and there is no private database in .data here"),
            "{refused}"
        );
    }
    assert_eq!(std::fs::read_dir(&here).unwrap().count(), 0);
    std::fs::remove_dir_all(&here).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_stays_idle_gives_connections_back_so_that_another_can_start() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::empty().await);
    let role = database.hand_over().await;
    let url = database.url_as(&role);
    let first = Process::start(by(&url, &database, &["serve"]));
    let api = first.api();
    let config = api.register(&receiver.url, json!({})).await;
    // many at a time, so that it opens what it may
    let many = (0..200).map(|_| async {
        api.credit(config).await;
        api.get("/webhooks/stats").await;
    });
    futures_util::future::join_all(many).await;
    let open: i64 = sqlx::query_scalar("select count(*) from pg_stat_activity where usename = $1")
        .bind(&role)
        .fetch_one(&database.pool)
        .await
        .unwrap();
    database.run(&format!("alter role {role} connection limit {open}")).await;

    let second = Process::start_waiting(by(&url, &database, &["serve"]));

    second.wait_for_log("the service is ready");
    eventually("the second is ready", async || {
        (second.api().get("/health/ready").await.status == 200).then_some(())
    })
    .await;
}
