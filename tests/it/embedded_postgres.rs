//! The private Postgres: it keeps its data, survives what kills it or us, and stops when nobody needs it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use serde_json::json;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection};
use webhook_processor::infrastructure::embedded_postgres::{EmbeddedOptions, EmbeddedPostgres};

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command};
use crate::support::receiver::TestReceiver;

#[tokio::test]
async fn data_survives_a_stop_and_a_start() {
    let scratch = Scratch::new("stop_and_start");
    let postgres = scratch.start().await;
    execute(&postgres, "create table kept as select 42 as answer").await;
    assert!(postgres.stop().await.unwrap());

    let postgres = scratch.start().await;

    assert_eq!(fetch(&postgres, "select answer from kept").await, 42);
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn a_killed_server_is_recovered_with_what_was_committed() {
    let scratch = Scratch::new("killed");
    let durable = EmbeddedOptions { durable: true, ..options(&scratch.0) };
    let first = EmbeddedPostgres::start(&durable).await.unwrap();
    execute(&first, "create table kept as select 42 as answer").await;
    kill("KILL", server_pid(first.directory()));

    let second = scratch.start().await;

    assert_eq!(fetch(&second, "select answer from kept").await, 42);
    assert!(!first.stop().await.unwrap());
    assert!(second.stop().await.unwrap());
}

#[tokio::test]
async fn the_number_of_a_killed_server_may_belong_to_another_program_by_now() {
    let scratch = Scratch::new("recycled");
    let first = scratch.start().await;
    kill("KILL", server_pid(first.directory()));
    for lock_file in ["data/postmaster.pid", ".s.PGSQL.5432.lock"] {
        let path = first.directory().join(lock_file);
        let text = fs::read_to_string(&path).unwrap();
        let (_, rest) = text.split_once('\n').unwrap();
        fs::write(&path, format!("{}\n{rest}", std::process::id())).unwrap();
    }

    let second = scratch.start().await;

    assert_eq!(fetch(&second, "select 1").await, 1);
    first.stop().await.unwrap();
    second.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_of_a_crashed_process_is_adopted_with_its_data() {
    let scratch = Scratch::new("adopted");
    let mut serve = command(&TestDatabase::empty().await, &["serve"]);
    serve.env_remove("DATABASE_URL").env("DATA_DIR", &scratch.0);
    let process = Process::start(serve);
    process.api().register("http://127.0.0.1:1", json!({})).await;
    process.signal("KILL");
    assert_eq!(process.wait(), None);
    let orphan = server_pid(&scratch.postgres());

    let postgres = scratch.start().await;

    assert_eq!(server_pid(postgres.directory()), orphan);
    assert_eq!(fetch(&postgres, "select count(*)::int from webhook_configs").await, 1);
    assert!(postgres.stop().await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_starts_its_server_again_when_that_dies_and_goes_on() {
    let (scratch, receiver) = (Scratch::new("service"), TestReceiver::start().await);
    let mut serve = command(&TestDatabase::empty().await, &["serve"]);
    serve.env_remove("DATABASE_URL").env("DATA_DIR", &scratch.0);
    let process = Process::start(serve);
    let config = process.api().register(&receiver.url, json!({})).await;

    kill("KILL", server_pid(&scratch.postgres()));

    process.wait_for_log("started again");
    let accepted = eventually("an event is accepted", async || {
        let event = json!({"event_type": "+credit", "config_id": config});
        let answer = process.api().post("/webhooks", event).await;
        (answer.status == 201).then(|| answer.json()["queue_id"].as_str().unwrap().to_owned())
    })
    .await;
    process.api().delivery_in(&accepted, "completed").await;
    process.signal("TERM");
    assert_eq!(process.wait(), Some(0));
}

#[tokio::test]
async fn the_last_of_two_users_stops_the_server() {
    let scratch = Scratch::new("two_users");
    let (first, second) = tokio::join!(scratch.start(), scratch.start());
    let options = second.connect_options();

    assert!(!first.stop().await.unwrap());
    assert!(answers(&options).await);

    assert!(second.stop().await.unwrap());
    assert!(!answers(&options).await);
}

#[tokio::test]
async fn one_who_does_not_say_goodbye_stops_the_server_too() {
    let scratch = Scratch::new("dropped");
    let postgres = scratch.start().await;
    let options = postgres.connect_options();

    drop(postgres);

    assert!(!answers(&options).await);
}

#[tokio::test]
async fn an_interrupted_first_start_is_begun_anew() {
    let scratch = Scratch::new("interrupted");
    let unfinished = scratch.postgres().join("initdb-1");
    fs::create_dir_all(unfinished.join("base")).unwrap();
    fs::write(unfinished.join("PG_VERSION"), "15\n").unwrap();

    let postgres = scratch.start().await;

    assert_eq!(fetch(&postgres, "select 1").await, 1);
    assert!(!unfinished.exists());
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn a_path_may_be_odd_and_too_long_for_a_socket() {
    let scratch = Scratch::new(&format!("odd it's \"$(false)\" {}", "x".repeat(100)));

    let postgres = scratch.start().await;

    assert_eq!(fetch(&postgres, "select 1").await, 1);
    let socket_directory = postgres.socket_directory().to_path_buf();
    assert_ne!(socket_directory, postgres.directory());
    postgres.stop().await.unwrap();
    assert!(!socket_directory.exists());
}

#[tokio::test]
async fn fsync_comes_back_for_those_who_need_it() {
    let scratch = Scratch::new("fsync");
    let careless = scratch.start().await;
    assert_eq!(fetch(&careless, "select (current_setting('fsync') = 'on')::int").await, 0);

    let durable = EmbeddedOptions { durable: true, ..options(&scratch.0) };
    let careful = EmbeddedPostgres::start(&durable).await.unwrap();

    assert_eq!(fetch(&careful, "select (current_setting('fsync') = 'on')::int").await, 1);
    careless.stop().await.unwrap();
    careful.stop().await.unwrap();
}

#[tokio::test]
async fn without_server_programs_the_error_says_what_to_do() {
    let scratch = Scratch::new("no_programs");
    let options = EmbeddedOptions { binaries: Some(scratch.0.clone()), ..options(&scratch.0) };

    let error = EmbeddedPostgres::start(&options).await.unwrap_err();

    let message = format!("{error:#}");
    for hint in ["apt-get install postgresql", "PG_BINDIR", "DATABASE_URL"] {
        assert!(message.contains(hint), "{message}");
    }
    assert!(!scratch.postgres().exists());
}

#[tokio::test]
async fn data_of_another_version_is_left_alone() {
    let scratch = Scratch::new("version");
    fs::create_dir_all(scratch.postgres().join("data")).unwrap();
    fs::write(scratch.postgres().join("data/PG_VERSION"), "9\n").unwrap();

    let error = EmbeddedPostgres::start(&options(&scratch.0)).await.unwrap_err();

    let message = format!("{error:#}");
    let directory = scratch.postgres().display().to_string();
    assert!(message.contains(&directory) && message.contains("written by PostgreSQL 9,"), "{message}");
}

/// A directory of one test, which is removed with the server in it, even if the test fails.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("webhook-processor-test-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        // macOS reaches its temporary directory through a symbolic link.
        Self(fs::canonicalize(path).unwrap())
    }

    fn postgres(&self) -> PathBuf {
        options(&self.0).directory
    }

    async fn start(&self) -> EmbeddedPostgres {
        EmbeddedPostgres::start(&options(&self.0)).await.unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.postgres().join("data/postmaster.pid").exists() {
            kill("KILL", server_pid(&self.postgres()));
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn options(scratch: &Path) -> EmbeddedOptions {
    EmbeddedOptions { directory: scratch.join("postgres"), durable: false, binaries: None }
}

fn server_pid(directory: &Path) -> u32 {
    let text = fs::read_to_string(directory.join("data/postmaster.pid")).unwrap();
    text.lines().next().unwrap().parse().unwrap()
}

fn kill(signal: &str, pid: u32) {
    let status = Command::new("sh").args(["-c", "kill -$0 $1", signal, &pid.to_string()]).status();
    assert!(status.unwrap().success());
}

async fn execute(postgres: &EmbeddedPostgres, statement: &'static str) {
    let mut connection = postgres.connect_options().connect().await.unwrap();
    sqlx::query(statement).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

async fn fetch(postgres: &EmbeddedPostgres, query: &'static str) -> i32 {
    let mut connection = postgres.connect_options().connect().await.unwrap();
    let answer = sqlx::query_scalar(query).fetch_one(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    answer
}

async fn answers(options: &PgConnectOptions) -> bool {
    match options.connect().await {
        Ok(connection) => connection.close().await.is_ok(),
        Err(_) => false,
    }
}
