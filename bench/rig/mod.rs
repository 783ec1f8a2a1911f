//! What all figures stand on: a private PostgreSQL with `fsync` on, a receiver, a database for each run.

pub mod load;
pub mod machine;
pub mod payload;
pub mod program;
pub mod store;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use indicatif::ProgressBar;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, PgConnection};
use tokio::process::Command;
use url::form_urlencoded::byte_serialize;
use webhook_processor::domain::access::{Operator, Way};
use webhook_processor::domain::endpoint::Endpoint;
use webhook_processor::domain::endpoint_settings::EndpointParts;
use webhook_processor::infrastructure::embedded_postgres::{EmbeddedOptions, EmbeddedPostgres};
use webhook_processor::infrastructure::postgres::Database;
use webhook_processor::infrastructure::sender::{HttpSender, SenderSettings};
use webhook_processor::infrastructure::service::Application;
use webhook_processor::infrastructure::settings::Settings;

use self::program::Program;
use self::store::{Store, execute};

/// The database that those of the runs are copies of.
const TEMPLATE: &str = "bench_template";
/// How long connections may take to end.
const FAREWELL_MAX: Duration = Duration::from_secs(10);

/// What the runs share.
pub struct Rig {
    server: EmbeddedPostgres,
    pub settings: Settings,
    /// Answers every request at once.
    pub receiver: Program,
    pub bar: ProgressBar,
    /// The endpoint of the template, and so of every database.
    pub endpoint: Endpoint,
    databases: AtomicUsize,
    /// Goes last: the server must have stopped.
    directory: Directory,
}

impl Rig {
    pub async fn start(settings: &Settings, bar: ProgressBar) -> anyhow::Result<Self> {
        let receiver = Program::receiver()?;
        let directory = std::env::temp_dir().join(format!("webhook-processor-bench-{}", std::process::id()));
        // durable, as in production, and never the user's own database
        let options = EmbeddedOptions { directory, durable: true, binaries: None };
        let server = EmbeddedPostgres::start(&options).await?;
        let directory = Directory(server.directory().to_owned());
        let settings =
            Settings { egress_allow: vec!["127.0.0.0/8".parse().expect("a network")], ..settings.clone() };
        let endpoint = make_template(&server, &settings, &receiver).await?;
        Ok(Self { server, settings, receiver, bar, endpoint, databases: AtomicUsize::new(0), directory })
    }

    /// Stops everything and removes it.
    pub async fn close(self) -> anyhow::Result<()> {
        self.bar.finish_and_clear();
        self.server.stop().await?;
        drop(self.directory);
        Ok(())
    }

    /// A new database with the schema and one endpoint, never analyzed.
    pub async fn fresh(&self) -> anyhow::Result<Store> {
        let name = self.create_database(&format!("template {TEMPLATE}")).await?;
        Ok(Store {
            options: self.options(&name),
            url: self.url(&name),
            name,
            endpoint: self.endpoint.clone(),
            settings: self.settings.clone(),
        })
    }

    /// Creates a database, empty unless `with` says otherwise; returns its name.
    pub async fn create_database(&self, with: &str) -> anyhow::Result<String> {
        let name = format!("bench_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.execute(&format!("create database {name} {with}")).await?;
        Ok(name)
    }

    /// Removes a database, whoever uses it.
    pub async fn drop_database(&self, name: &str) -> anyhow::Result<()> {
        self.execute(&format!("drop database {name} with (force)")).await
    }

    /// The end of a run on a database of its own.
    pub async fn finish(&self, store: Store) -> anyhow::Result<()> {
        self.drop_database(&store.name).await?;
        self.bar.inc(1);
        Ok(())
    }

    /// Writes everything out, so that no run pays for the one before.
    pub async fn checkpoint(&self) -> anyhow::Result<()> {
        self.execute("checkpoint").await
    }

    async fn execute(&self, statement: &str) -> anyhow::Result<()> {
        execute(&mut self.connect().await?, statement).await
    }

    /// A connection to none of the databases of the runs.
    pub async fn connect(&self) -> anyhow::Result<PgConnection> {
        Ok(self.options("postgres").connect().await?)
    }

    fn options(&self, database: &str) -> PgConnectOptions {
        self.server.connect_options().database(database).disable_statement_logging()
    }

    /// As libpq and other drivers read it.
    pub fn url(&self, database: &str) -> String {
        let directory = self.server.socket_directory().to_string_lossy();
        let host: String = byte_serialize(directory.as_bytes()).collect();
        format!("postgres://postgres@localhost:5432/{database}?host={host}")
    }

    /// `psql` or `pgbench` of the server's own version.
    pub async fn client(&self, name: &str, store: &Store) -> anyhow::Result<Command> {
        let bin_directory: String = sqlx::query_scalar("select setting from pg_config where name = 'BINDIR'")
            .fetch_one(&mut self.connect().await?)
            .await?;
        let program = Path::new(&bin_directory).join(name);
        ensure!(program.exists(), "there is no {}; it comes with PostgreSQL's packages", program.display());
        let mut command = Command::new(program);
        command
            .env("PGHOST", self.server.socket_directory())
            .env("PGUSER", "postgres")
            .env("PGDATABASE", &store.name);
        command.kill_on_drop(true).stdin(std::process::Stdio::null());
        Ok(command)
    }

    /// A place for files, removed at the end.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.0.join(name)
    }

    /// The sender as workers have it.
    pub fn sender(&self) -> anyhow::Result<HttpSender> {
        HttpSender::new(SenderSettings {
            timeout: self.settings.http_timeout,
            response_bytes_max: self.settings.response_bytes_max,
            idle_connections_max: self.settings.workers.leases_max(),
            egress: self.settings.egress(),
            name_servers: vec![],
        })
    }

    /// Waits until nobody is connected to a database: only then is all counted that they did.
    pub async fn wait_for_farewell(&self, database: &str) -> anyhow::Result<()> {
        let mut connection = self.connect().await?;
        let begun = Instant::now();
        while sqlx::query_scalar(
            "select exists (select from pg_stat_activity where datname = $1 and backend_type = 'client backend')",
        )
        .bind(database)
        .fetch_one(&mut connection)
        .await?
        {
            ensure!(begun.elapsed() < FAREWELL_MAX, "somebody is still connected to {database}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}

/// Makes the database that others are copies of.
async fn make_template(
    server: &EmbeddedPostgres,
    settings: &Settings,
    receiver: &Program,
) -> anyhow::Result<Endpoint> {
    let options = server.connect_options();
    execute(&mut options.connect().await?, &format!("create database {TEMPLATE}")).await?;
    let database = Database::new(options.database(TEMPLATE), settings.request_connections);
    database.migrate().await?;
    database.ensure_archives().await?;
    let parts = EndpointParts {
        name: Some("bench".into()),
        postback_url: Some(Some(format!("http://{}/postback", receiver.address))),
        ..EndpointParts::default()
    };
    let endpoint = Application::new(&database, settings).api.endpoints.register(parts, &operator()).await?;
    database.close().await;
    Ok(endpoint)
}

/// Who registers the endpoints.
pub fn operator() -> Operator {
    Operator { name: "bench".to_owned(), way: Way::CommandLine, reason: None }
}

/// Removed when it goes out of scope.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        // nobody misses what could not be removed
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
