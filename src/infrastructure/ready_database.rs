//! Opens the database that the settings name for a command or a service: an external one, or a private server.

use std::time::Duration;

use anyhow::bail;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::embedded_postgres::keeper::keep_running;
use super::embedded_postgres::{EmbeddedOptions, EmbeddedPostgres};
use super::postgres::{Database, Listening};
use super::settings::Settings;
use crate::application::backoff::Backoff;

/// Waits between tries to reach the database at start.
const DATABASE_BACKOFF: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
/// What a command needs the database for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To read. A standby or a read-only role is enough.
    Read,
    /// To write, with the existing schema.
    Write,
    /// To write, after the schema is brought up to date and a missing private database is made.
    Migrate,
}

/// How long to wait for a database that is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// As long as it takes, for a service.
    Endless,
    /// Not at all, for a command that someone waits for.
    None,
}

/// An opened database, external or private.
pub struct ReadyDatabase {
    pub database: Database,
    /// The way to the database for LISTEN.
    pub listening: Listening,
    embedded: Option<Embedded>,
    /// Whether its schema was checked and is new enough.
    pub(super) is_prepared: bool,
}

struct Embedded {
    options: EmbeddedOptions,
    server: EmbeddedPostgres,
}

impl ReadyDatabase {
    /// Prepares pools. Starts the private server if no external database is set. An external one need not be reachable yet.
    pub(super) async fn open(settings: &Settings, may_create: bool) -> anyhow::Result<Self> {
        let (hosts, setting, embedded) = if let Some(hosts) = &settings.database {
            (hosts.clone(), "DATABASE_URL", None)
        } else {
            let options = EmbeddedOptions {
                directory: settings.data_dir.join("postgres"),
                durable: true,
                binaries: None,
            };
            if !may_create && !EmbeddedPostgres::exists(&options)? {
                bail!(
                    "no DATABASE_URL is set, and there is no private database in {} here: set DATABASE_URL or DATA_DIR, go to \
                     the directory where the server was started, or start one with webhook-processor serve",
                    settings.data_dir.display()
                );
            }
            let server = EmbeddedPostgres::start(&options).await?;
            info!("using a private PostgreSQL; open it with: {}", server.psql_command());
            (server.connect_options().into(), "DATA_DIR", Some(Embedded { options, server }))
        };
        let mut database = Database::reached_by(hosts, setting, settings.request_connections);
        if let Some(direct) = settings.listen_database.clone().filter(|_| embedded.is_none()) {
            database = database.migrating_by(direct);
        }
        let listening = database.listening();
        Ok(Self { database, listening, embedded, is_prepared: false })
    }

    /// Opens the database for a command. The error is a sentence for people.
    pub async fn open_for(settings: &Settings, purpose: Purpose) -> anyhow::Result<Self> {
        let ready = Self::open(settings, purpose == Purpose::Migrate).await?;
        let checked = match purpose {
            Purpose::Read => ready.database.require_readable().await,
            Purpose::Write => ready.database.require_writable().await,
            Purpose::Migrate => ready.database.migrate().await,
        };
        if let Err(trouble) = checked {
            ready.close().await;
            return Err(trouble.into());
        }
        Ok(ready)
    }

    /// Opens the database and brings its schema up to date. If the database is away, `patience` says whether to wait, until `stop`.
    pub async fn prepare(
        settings: &Settings,
        stop: &CancellationToken,
        patience: Patience,
    ) -> anyhow::Result<Self> {
        let mut ready = Self::open(settings, true).await?;
        if let Err(error) = ready.migrate(stop, patience).await {
            ready.close().await;
            return Err(error);
        }
        ready.is_prepared = true;
        Ok(ready)
    }

    pub(super) async fn migrate(&self, stop: &CancellationToken, patience: Patience) -> anyhow::Result<()> {
        let mut backoff = DATABASE_BACKOFF;
        loop {
            let migrated = tokio::select! {
                migrated = self.database.migrate() => migrated,
                () = stop.cancelled() => bail!("stopped before the database was there"),
            };
            let Err(trouble) = migrated else { return Ok(()) };
            if patience == Patience::None || !trouble.passes() {
                return Err(trouble.into());
            }
            let pause = backoff.pause();
            warn!("{trouble}; trying again in {} s", pause.as_secs_f32());
            tokio::select! {
                () = stop.cancelled() => bail!("stopped before the database was there"),
                () = sleep(pause) => {}
            }
        }
    }

    /// Restarts the private server whenever it has died, until `stop`. `None` if there is no private server.
    pub(super) fn keeper(&self, stop: CancellationToken) -> Option<impl Future<Output = ()> + Send + use<>> {
        let options = self.embedded.as_ref()?.options.clone();
        Some(keep_running(options, self.database.clone(), stop))
    }

    /// Closes the pools. Stops the private server, unless another process uses it.
    pub async fn close(self) {
        self.database.close().await;
        if let Some(Embedded { server, .. }) = self.embedded
            && let Err(error) = server.stop().await
        {
            warn!(error = format!("{error:#}"), "the private PostgreSQL could not be stopped");
        }
    }
}
