//! Servers that a test may break, with TCP, TLS and standbys of their own.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};

use super::eventually;

/// A server with its files, on a port of 127.0.0.1. It is stopped and removed when it goes out of scope.
pub struct Cluster {
    directory: PathBuf,
    pub port: u16,
    /// Whom PostgreSQL runs as, if we are root.
    account: Option<(u32, u32)>,
}

impl Cluster {
    /// A new server, with these lines in its configuration.
    pub fn start(settings: &str) -> Self {
        let cluster = Self::make();
        cluster
            .program("initdb", &["-D", "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]);
        cluster.configure(settings);
        cluster.launch();
        cluster
    }

    /// A standby of this server, which is stopped for the copy. The server waits for it with each commit from then on.
    pub async fn start_synchronous_standby(&self) -> Self {
        self.program("pg_ctl", &["stop", "-D", "data", "-m", "fast", "-w"]);
        let standby = Self::make();
        let copied =
            Command::new("cp").arg("-a").arg(self.directory.join("data")).arg(&standby.directory).status();
        assert!(copied.unwrap().success());
        standby.configure(&format!(
            "primary_conninfo = 'host=127.0.0.1 port={} user=postgres application_name=standby'",
            self.port
        ));
        fs::write(standby.directory.join("data/standby.signal"), "").unwrap();
        standby.own(&standby.directory.join("data/standby.signal"));
        self.configure("synchronous_standby_names = 'standby'");
        self.launch();
        standby.launch();
        eventually("the standby follows", async || {
            let followers = "select count(*) from pg_stat_replication where sync_state = 'sync'";
            (self.scalar::<i64>("postgres", followers).await == 1).then_some(())
        })
        .await;
        standby
    }

    /// Makes a standby the primary.
    pub async fn promote(&self) {
        assert!(self.scalar::<bool>("postgres", "select pg_promote()").await);
    }

    /// Ends all its processes at once, as a crash does.
    pub fn crash(&self) {
        self.program("pg_ctl", &["stop", "-D", "data", "-m", "immediate", "-w"]);
    }

    /// Starts it (again).
    pub fn launch(&self) {
        self.program("pg_ctl", &["start", "-D", "data", "-l", "log", "-w", "-s"]);
    }

    /// Adds lines to its configuration, for the next start. Later lines win.
    pub fn configure(&self, settings: &str) {
        let path = self.directory.join("data/postgresql.conf");
        let text = fs::read_to_string(&path).unwrap();
        let Self { directory, port, .. } = self;
        let own = format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = '{}'\n",
            directory.display()
        );
        fs::write(&path, format!("{text}\n{own}{settings}\n")).unwrap();
    }

    /// Puts a file into its data directory, for its eyes only.
    pub fn place(&self, name: &str, content: &str) {
        let path = self.directory.join("data").join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        self.own(&path);
    }

    /// How its superuser reaches a database.
    pub fn options(&self, database: &str) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(self.port)
            .username("postgres")
            .database(database)
            .ssl_mode(PgSslMode::Disable)
    }

    /// Runs statements in a database, one after the other.
    pub async fn run(&self, database: &str, statements: &[&str]) {
        let mut connection = self.options(database).connect().await.unwrap();
        for statement in statements {
            let done = sqlx::raw_sql(AssertSqlSafe((*statement).to_owned())).execute(&mut connection).await;
            done.unwrap_or_else(|error| panic!("{statement}: {error}"));
        }
        connection.close().await.unwrap();
    }

    /// One value.
    pub async fn scalar<T>(&self, database: &str, sql: &'static str) -> T
    where
        T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres> + Send + Unpin,
    {
        let mut connection = self.options(database).connect().await.unwrap();
        let value = sqlx::query_scalar(sql).fetch_one(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        value
    }

    fn make() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory =
            std::env::temp_dir().join(format!("webhook-processor-cluster-{}-{number}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let is_root = fs::metadata(&directory).unwrap().uid() == 0;
        let account =
            is_root.then(|| ["postgres", "nobody"].into_iter().find_map(ids_of).expect("an account"));
        let cluster = Self { directory, port, account };
        cluster.own(&cluster.directory);
        cluster
    }

    fn own(&self, path: &Path) {
        if let Some((uid, gid)) = self.account {
            chown(path, Some(uid), Some(gid)).unwrap();
        }
    }

    fn program(&self, name: &str, arguments: &[&str]) {
        let mut command = Command::new(binaries().join(name));
        command.args(arguments).current_dir(&self.directory).env_clear().env("LC_ALL", "C");
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        if let Some((uid, gid)) = self.account {
            command.uid(uid).gid(gid);
        }
        // a server that it starts would keep a pipe open
        let said = fs::File::create(self.directory.join("said")).unwrap();
        let status = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(said.try_clone().unwrap())
            .stderr(said)
            .status()
            .unwrap();
        let read = |file: &str| fs::read_to_string(self.directory.join(file)).unwrap_or_default();
        assert!(status.success(), "{name} {arguments:?}: {}\n{}", read("said"), read("log"));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // it may be stopped already
        let mut stop = Command::new(binaries().join("pg_ctl"));
        stop.args(["stop", "-D", "data", "-m", "immediate", "-w", "-s"]).current_dir(&self.directory);
        if let Some((uid, gid)) = self.account {
            stop.uid(uid).gid(gid);
        }
        let _ = stop.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Where the server programs are: where the program finds them, too.
fn binaries() -> PathBuf {
    let found = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/find-postgres")).output().unwrap();
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    PathBuf::from(String::from_utf8(found.stdout).unwrap().trim())
}

/// The user and the group of an account.
fn ids_of(account: &str) -> Option<(u32, u32)> {
    let id = |option: &str| {
        let output = Command::new("id").args([option, account]).output().ok()?;
        String::from_utf8(output.stdout).ok()?.trim().parse().ok()
    };
    Some((id("-u")?, id("-g")?))
}
