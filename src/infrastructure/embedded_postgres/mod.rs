//! A private Postgres for those who have not set `DATABASE_URL`, run from the server programs of this
//! machine.
//!
//! All its files are in one directory. Any number of our processes may use it at the same time. Each holds a
//! shared lock on `users.lock`, which the system releases if the process crashes. The first process starts the
//! server, the last one stops it, and `start.lock` makes them do so one at a time. It is not meant for data that
//! others depend on: it is one machine without a backup.

mod account;
mod binaries;
pub(super) mod keeper;
mod location;
mod server;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{ConnectOptions, Connection, PgConnection};
use tracing::warn;

use binaries::Binaries;
use location::Location;
use server::{Server, State};

/// The database that the program uses on its private server.
const DATABASE: &str = "webhook_processor";

/// How long a running server may take to answer: it may be recovering from a crash, or about to stop.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(1);

/// How long a running server may take to apply new settings.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a private server keeps its files, and whether they must survive a crash.
#[derive(Debug, Clone)]
pub struct EmbeddedOptions {
    /// The directory of its files, created if it is missing. If we are root and the server's account cannot
    /// reach it, a directory under `/var/lib` stands in for it, or under `/var/tmp` if not `durable`.
    pub directory: PathBuf,
    /// Whether a commit is on disk before it is acknowledged. `false` is for tests: any crash may lose data.
    pub durable: bool,
    /// The directory of `initdb` and `pg_ctl`; if `None`, `PG_BINDIR`, or else the machine is searched.
    pub binaries: Option<PathBuf>,
}

/// A private Postgres that this process uses.
///
/// Dropping it does the same as [`stop`](Self::stop), but blocks the thread. If a process is killed, the server
/// keeps running, and the next [`start`](Self::start) joins it.
#[derive(Debug)]
pub struct EmbeddedPostgres {
    server: Server,
    users: UsersLock,
    left: bool,
}

impl EmbeddedPostgres {
    /// Starts the server, or joins the one that already runs in the directory.
    ///
    /// # Errors
    ///
    /// There are no server programs, they do not suit the data, or the server does not start. The message
    /// says what to do, or shows the end of the server's log.
    pub async fn start(options: &EmbeddedOptions) -> Result<Self> {
        Self::start_or_join(options.clone())
            .await
            .with_context(|| format!("cannot run a private PostgreSQL in {}", options.directory.display()))
    }

    /// Whether there is a server to start or to join. Creates nothing.
    ///
    /// # Errors
    ///
    /// The account that would own its files cannot be determined.
    pub fn exists(options: &EmbeddedOptions) -> Result<bool> {
        let directory = Location::find(&options.directory, options.durable)?;
        Ok(directory.is_some_and(|directory| directory.join("data").join("PG_VERSION").exists()))
    }

    async fn start_or_join(options: EmbeddedOptions) -> Result<Self> {
        let durable = options.durable;
        let (start_lock, mut this) = blocking(move || {
            let candidates = Binaries::list(options.binaries.as_deref())?;
            let location = Location::prepare(&options.directory, durable)?;
            let start_lock = start_lock(&location)?;
            let users = UsersLock::join(&location)?;
            let server = Server::prepare(&candidates, location, durable)?;
            Ok((start_lock, Self { server, users, left: true }))
        })
        .await?;

        let (begun, begun_at) = (Instant::now(), SystemTime::now());
        let mut connection = loop {
            this = blocking(move || this.make_it_run().map(|()| this)).await?;
            match this.connect("postgres").await {
                Ok(connection) => break connection,
                Err(error) if is_passing(&error) && begun.elapsed() < ANSWER_TIMEOUT => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => {
                    let last_words = this.server.last_words(begun_at);
                    return Err(error).with_context(|| format!("the server does not answer{last_words}"));
                }
            }
        };
        if durable {
            this.insist_on_durability(&mut connection).await?;
        }
        create_database(&mut connection).await?;
        connection.close().await.context("cannot close the first connection")?;
        this.left = false;
        drop(start_lock);
        Ok(this)
    }

    /// How to connect to the program's database, as its owner.
    #[must_use]
    pub fn connect_options(&self) -> PgConnectOptions {
        self.connect_options_for(DATABASE)
    }

    /// The directory of the server's files, which may stand in for the one that was asked for.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.server.location().directory
    }

    /// The directory of the server's socket; only the server's account and root may enter it.
    #[must_use]
    pub fn socket_directory(&self) -> &Path {
        &self.server.location().socket_directory
    }

    /// A command that opens the database in `psql`.
    #[must_use]
    pub fn psql_command(&self) -> String {
        let socket_directory = shell_word(&self.socket_directory().to_string_lossy());
        format!("psql -h {socket_directory} -U postgres -d {DATABASE}")
    }

    /// Stops the server, unless another process still uses it; returns whether it was stopped. Close your
    /// connections first.
    ///
    /// # Errors
    ///
    /// `pg_ctl` failed; the message shows the end of the server's log.
    pub async fn stop(mut self) -> Result<bool> {
        blocking(move || self.leave()).await
    }

    fn leave(&mut self) -> Result<bool> {
        self.left = true;
        let _start_lock = start_lock(self.server.location())?;
        let last = self.users.is_last()?;
        if last {
            self.server.shut_down()?;
        }
        Ok(last)
    }

    /// Starts the server unless it runs. If it runs but has lost its socket, it is restarted, unless others use it.
    fn make_it_run(&mut self) -> Result<()> {
        match self.server.state() {
            State::Listening => Ok(()),
            State::Stopped => self.server.launch(),
            State::Unreachable { pid } => {
                let socket = self.server.location().socket();
                if !self.users.is_last()? {
                    bail!(
                        "process {pid} runs the server, but its socket {} is gone, and other programs still \
                         use it: stop them first",
                        socket.display()
                    );
                }
                let socket = socket.display();
                warn!(pid, %socket, "the private PostgreSQL has lost its socket; restarting it");
                self.server.shut_down()?;
                self.users.rejoin()?;
                self.server.launch()
            }
        }
    }

    /// Turns `fsync` on again if the running server was started as one that is not durable.
    async fn insist_on_durability(&self, connection: &mut PgConnection) -> Result<()> {
        let begun = Instant::now();
        while !fsync_is_on(connection).await? {
            if begun.elapsed() > RELOAD_TIMEOUT {
                bail!("fsync stays off; if ALTER SYSTEM turned it off, run ALTER SYSTEM RESET fsync");
            }
            self.server.write_settings()?;
            sqlx::query("select pg_reload_conf()").execute(&mut *connection).await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    async fn connect(&self, database: &str) -> Result<PgConnection, sqlx::Error> {
        tokio::time::timeout(ANSWER_TIMEOUT, self.connect_options_for(database).connect())
            .await
            .unwrap_or_else(|elapsed| Err(sqlx::Error::Io(elapsed.into())))
    }

    fn connect_options_for(&self, database: &str) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(self.socket_directory())
            .port(5432)
            .username("postgres")
            .database(database)
            .ssl_mode(PgSslMode::Disable)
    }
}

impl Drop for EmbeddedPostgres {
    fn drop(&mut self) {
        if !self.left
            && let Err(error) = self.leave()
        {
            warn!("the private PostgreSQL is left running: {error:#}");
        }
    }
}

/// Quotes a word for a shell, but only if it must: a log may escape quotes.
fn shell_word(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+:@%".contains(&byte);
    if !text.is_empty() && text.bytes().all(is_plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// The lock that each user of the server shares. The caller holds the start lock.
#[derive(Debug)]
struct UsersLock(File);

impl UsersLock {
    fn join(location: &Location) -> Result<Self> {
        let mut this = Self(lock_file(location, "users.lock")?);
        this.rejoin()?;
        Ok(this)
    }

    fn rejoin(&mut self) -> Result<()> {
        self.0.lock_shared().context("cannot lock users.lock")
    }

    /// Gives up our share of the lock and returns whether nobody else has one.
    fn is_last(&mut self) -> Result<bool> {
        self.0.unlock().context("cannot unlock users.lock")?;
        match self.0.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error).context("cannot lock users.lock"),
        }
    }
}

/// Waits until nobody else is starting or stopping the server.
fn start_lock(location: &Location) -> Result<File> {
    let file = lock_file(location, "start.lock")?;
    file.lock().context("cannot lock start.lock")?;
    Ok(file)
}

fn lock_file(location: &Location, name: &str) -> Result<File> {
    let path = location.directory.join(name);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    location.account.give(&path)?;
    Ok(file)
}

/// Whether a connection failed for a passing reason: the server is starting or stopping, or has just stopped.
fn is_passing(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => {
            matches!(
                error.kind(),
                ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset | ErrorKind::NotFound
            ) || error.kind() == ErrorKind::UnexpectedEof
        }
        sqlx::Error::Database(error) => error.code().is_some_and(|code| code == "57P03"),
        _ => false,
    }
}

async fn fsync_is_on(connection: &mut PgConnection) -> Result<bool> {
    sqlx::query_scalar("select current_setting('fsync')::bool")
        .fetch_one(connection)
        .await
        .context("cannot read fsync")
}

async fn create_database(connection: &mut PgConnection) -> Result<()> {
    let exists: bool = sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
        .bind(DATABASE)
        .fetch_one(&mut *connection)
        .await
        .context("cannot list the databases")?;
    if !exists {
        sqlx::query("create database webhook_processor")
            .execute(connection)
            .await
            .context("cannot create the database webhook_processor")?;
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .context("the thread that manages the private PostgreSQL ended early")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_quoted_for_the_shell_only_if_it_must_be() {
        assert_eq!(shell_word("/srv/.data/postgres_1"), "/srv/.data/postgres_1");
        assert_eq!(shell_word("/srv/it's here"), r"'/srv/it'\''s here'");
    }
}
