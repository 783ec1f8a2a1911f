//! A private PostgreSQL for the whole run, and a database of its own for each test.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};
use tokio::sync::OnceCell;
use uuid::Uuid;
use webhook_processor::infrastructure::embedded_postgres::{EmbeddedOptions, EmbeddedPostgres};
use webhook_processor::infrastructure::postgres::Database;

/// The database that all others are copied from: the schema, with archives.
const TEMPLATE: &str = "webhook_template";

static SERVER: OnceCell<PgConnectOptions> = OnceCell::const_new();

/// Starts the server once. It stops when this process ends, however it ends.
async fn server() -> PgConnectOptions {
    let options = SERVER.get_or_init(|| async {
        let directory = std::env::temp_dir().join(format!("webhook-processor-test-{}", std::process::id()));
        let options = EmbeddedOptions { directory, durable: false, binaries: None };
        let server = EmbeddedPostgres::start(&options).await.expect("a private PostgreSQL");
        stop_with_this_process(&server, options.directory);
        let connect = server.connect_options();
        // never dropped: the reaper stops it
        std::mem::forget(server);

        let mut connection = connect.connect().await.unwrap();
        sqlx::query(AssertSqlSafe(format!("create database {TEMPLATE}")))
            .execute(&mut connection)
            .await
            .unwrap();
        connection.close().await.unwrap();
        let database = Database::new(connect.clone().database(TEMPLATE), 1);
        database.migrate().await.unwrap();
        database.ensure_archives().await.unwrap();
        database.close().await;
        connect
    });
    options.await.clone()
}

/// A shell that waits for the end of a pipe, which comes with the end of this process, then stops the server.
#[expect(clippy::zombie_processes, reason = "it is waited for by whoever outlives this process")]
fn stop_with_this_process(server: &EmbeddedPostgres, directory: PathBuf) {
    let reaper = Command::new("sh")
        .args([
            "-c",
            "read -r _; kill -QUIT \"$(head -n 1 \"$1/data/postmaster.pid\")\"; rm -rf \"$1\" \"$2\"",
            "reaper",
        ])
        .arg(server.directory())
        .arg(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("sh");
    std::mem::forget(reaper.stdin);
}

/// A database of a test's own.
#[derive(Clone)]
pub struct TestDatabase {
    /// How to reach it.
    pub options: PgConnectOptions,
    /// For the test's own look at it.
    pub pool: PgPool,
}

impl TestDatabase {
    /// With the schema and archives.
    pub async fn new() -> Self {
        Self::create(&format!("template {TEMPLATE}")).await
    }

    /// With nothing in it.
    pub async fn empty() -> Self {
        Self::create("template template0").await
    }

    async fn create(from: &str) -> Self {
        let server = server().await;
        let name = format!("test_{}", Uuid::new_v4().simple());
        let mut connection = server.connect().await.unwrap();
        sqlx::query(AssertSqlSafe(format!("create database {name} {from}")))
            .execute(&mut connection)
            .await
            .unwrap();
        let options = server.database(&name);
        let pool = PgPoolOptions::new().max_connections(3).connect_lazy_with(options.clone());
        Self { options, pool }
    }

    /// Hands the database over to a new role that may do nothing else; returns its name.
    pub async fn hand_over(&self) -> String {
        let role = format!("role_{}", Uuid::new_v4().simple());
        let name = self.options.get_database().unwrap();
        self.run(&format!("create role {role} login; alter database {name} owner to {role}")).await;
        role
    }

    /// As a value of `DATABASE_URL`, for a role.
    pub fn url_as(&self, role: &str) -> String {
        self.options.clone().username(role).to_url_lossy().to_string()
    }

    /// Runs statements on another database of the same server, which this one does not get in the way of.
    pub async fn run(&self, sql: &str) {
        let mut connection = server().await.connect().await.unwrap();
        // one after another: some of them must not be part of a transaction
        for statement in sql.split(';') {
            sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut connection).await.unwrap();
        }
        connection.close().await.unwrap();
    }

    /// As a value of `DATABASE_URL`.
    pub fn url(&self) -> String {
        self.options.to_url_lossy().to_string()
    }

    /// One value.
    pub async fn scalar<T>(&self, sql: &'static str) -> T
    where
        T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres> + Send + Unpin,
    {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }

    /// Runs statements.
    pub async fn execute(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(&self.pool).await.unwrap();
    }

    /// Runs a statement about one delivery.
    pub async fn execute_with(&self, sql: &'static str, queue_id: Uuid) {
        sqlx::query(sql).bind(queue_id).execute(&self.pool).await.unwrap();
    }
}
