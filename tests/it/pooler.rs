//! Behind `PgBouncer` in transaction mode: starts and commands never hang, nothing sticks to its sessions, and the audit
//! shows no attempt that was never made.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::StreamExt as _;
use serde_json::json;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command};
use crate::support::receiver::TestReceiver;

/// Where `scripts/install-pgbouncer` puts it.
const INSTALLED: &str = "/var/lib/webhook-processor-tools/pgbouncer/pgbouncer";

/// A `PgBouncer` in front of a test's server.
struct Pooler {
    child: Child,
    directory: PathBuf,
    port: u16,
}

impl Pooler {
    /// `None`: there is no `PgBouncer` here.
    async fn start(database: &TestDatabase) -> Option<Self> {
        let program = std::env::var_os("PGBOUNCER").map_or_else(|| PathBuf::from(INSTALLED), PathBuf::from);
        if !program.exists() {
            assert!(
                std::env::var_os("PGBOUNCER_REQUIRED").is_none(),
                "no PgBouncer at {}",
                program.display()
            );
            eprintln!(
                "left out: no PgBouncer at {}; scripts/install-pgbouncer installs it",
                program.display()
            );
            return None;
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let directory =
            std::env::temp_dir().join(format!("webhook-processor-pooler-{}-{port}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let socket = database.options.get_socket().unwrap();
        // the server's account: its socket is for that one alone
        let uid = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(socket).unwrap());
        let ini = format!(
            "[databases]\n* = host={} port=5432 user=postgres\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n\
             pool_mode = transaction\nmax_prepared_statements = 200\ndefault_pool_size = 20\nmax_client_conn = 500\n",
            socket.display()
        );
        let file = directory.join("pgbouncer.ini");
        std::fs::write(&file, ini).unwrap();
        let mut command = Command::new(program);
        std::os::unix::process::CommandExt::uid(&mut command, uid);
        let child = command
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(directory.join("log")).unwrap())
            .spawn()
            .unwrap();
        let pooler = Self { child, directory, port };
        eventually("the pooler answers", async || {
            pooler.options(database).connect().await.ok()?.close().await.ok()
        })
        .await;
        Some(pooler)
    }

    fn options(&self, database: &TestDatabase) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(self.port)
            .username("postgres")
            .database(database.options.get_database().unwrap())
            .ssl_mode(sqlx::postgres::PgSslMode::Disable)
            .extra_float_digits(None)
    }

    fn command(&self, database: &TestDatabase, args: &[&str]) -> Command {
        let mut command = command(database, args);
        command.env("DATABASE_URL", self.options(database).to_url_lossy().to_string());
        command
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Hands events in, some at a time, until all are accepted.
async fn enqueue(process: &Process, config: i64, events: std::ops::Range<usize>) {
    let api = &process.api();
    let accepted = futures_util::stream::iter(events).map(|number| async move {
        let event = json!({"event_type": "+credit", "config_id": config, "event_id": format!("e{number}")});
        let answer = api.post("/webhooks", event).await;
        assert!([200, 201].contains(&answer.status), "{}", answer.text);
    });
    accepted.buffer_unordered(16).collect::<Vec<_>>().await;
}

/// Each event was sent once, and the audit shows nothing else.
async fn each_once(database: &TestDatabase, receiver: &TestReceiver, events: usize) {
    eventually("all are delivered", async || {
        let completed: i64 =
            database.scalar("select count(*) from webhook_queue where status = 'completed'").await;
        (usize::try_from(completed).unwrap() == events).then_some(())
    })
    .await;
    let attempts: i64 = database.scalar("select count(*) from webhook_attempts").await;
    assert_eq!((usize::try_from(attempts).unwrap(), receiver.count()), (events, events));
}

#[tokio::test(flavor = "multi_thread")]
async fn four_processes_start_at_once_behind_a_pooler_and_deliver_each_event_once_without_listening() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::empty().await);
    let Some(pooler) = Pooler::start(&database).await else { return };
    let serve = || {
        let mut serve = pooler.command(&database, &["serve"]);
        serve.env("WORKER_POLL_INTERVAL", "200ms");
        serve
    };
    let processes: Vec<_> = (0..4).map(|_| Process::start_waiting(serve())).collect();
    for process in &processes {
        process.wait_for_log("the service is ready");
        process.wait_for_log("DATABASE_URL leads to a pooler that keeps no sessions");
    }
    let config = processes[0].api().register(&receiver.url, json!({})).await;

    let shares =
        processes.iter().enumerate().map(|(n, process)| enqueue(process, config, n * 500..(n + 1) * 500));
    futures_util::future::join_all(shares).await;

    each_once(&database, &receiver, 2_000).await;
    for process in &processes {
        assert!(!process.log().contains("NotificationResponse"), "{}", process.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_and_commands_behind_a_busy_pooler_come_to_an_end() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::empty().await);
    let Some(pooler) = Pooler::start(&database).await else { return };
    let direct = |args: &[&str]| {
        let mut command = pooler.command(&database, args);
        command.env("LISTEN_DATABASE_URL", database.url()).env("WORKER_POLL_INTERVAL", "1h");
        command
    };
    let first = Process::start(direct(&["serve"]));
    let config = first.api().register(&receiver.url, json!({})).await;

    let load = enqueue(&first, config, 0..3_000);
    let others = async {
        let mut started = Vec::new();
        for _ in 0..3 {
            started.push(Process::start_waiting(direct(&["serve"])));
            for args in [&["stats"][..], &["configs", "list"], &["migrate"]] {
                let mut command = tokio::process::Command::from(direct(args));
                let ended = command.stdin(Stdio::null()).kill_on_drop(true).output();
                let ended = tokio::time::timeout(Duration::from_mins(1), ended).await;
                let output = ended.unwrap_or_else(|_| panic!("{args:?} hangs")).unwrap();
                assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
            }
        }
        started
    };
    let ((), started) = tokio::join!(load, others);

    for process in &started {
        process.wait_for_log("the service is ready");
        assert!(!process.log().contains("leads to a pooler"), "{}", process.log());
        assert_eq!(process.api().get("/webhooks").await.status, 200);
        assert_eq!(process.api().get("/webhooks/stats").await.status, 200);
    }
    each_once(&database, &receiver, 3_000).await;
    // what is looked up while many others use the pooler's servers
    let ids: Vec<String> = database
        .scalar(
            "select array_agg(queue_id::text) from (select queue_id from webhook_queue limit 400) as part",
        )
        .await;
    let api = &first.api();
    let looked_up = futures_util::stream::iter(ids).map(|id| async move {
        let found = api.get(&format!("/webhooks/{id}")).await;
        assert_eq!(found.status, 200, "{}", found.text);
    });
    tokio::join!(looked_up.buffer_unordered(32).collect::<Vec<_>>(), enqueue(&first, config, 0..400));
    for process in started.into_iter().chain([first]) {
        process.signal("TERM");
        assert_eq!(process.wait(), Some(0));
    }
    // nothing of ours sticks to the sessions that others get next
    let mut sessions: Vec<_> = Vec::new();
    for _ in 0..20 {
        sessions.push(pooler.options(&database).connect().await.unwrap());
    }
    for session in &mut sessions {
        // in a transaction each, so that each has a session of its own
        sqlx::raw_sql("begin").execute(&mut *session).await.unwrap();
        let timeout: String = sqlx::query_scalar("select current_setting('statement_timeout')")
            .fetch_one(&mut *session)
            .await
            .unwrap();
        assert_eq!(timeout, "0");
        let locks: i64 = sqlx::query_scalar(
            "select count(*) from pg_locks
             where locktype = 'advisory'
               and database = (select oid from pg_database where datname = current_database())",
        )
        .fetch_one(&mut *session)
        .await
        .unwrap();
        assert_eq!(locks, 0);
    }
}
