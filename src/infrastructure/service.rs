//! Composition: settings in, a running service out.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::embedded_postgres::{EmbeddedOptions, EmbeddedPostgres};
use super::http::{self, Api, Begun, Operations};
use super::postgres::{Database, Listening, announce_ready, listen_for_ready};
use super::sender::{HttpSender, SenderSettings};
use super::settings::Settings;
use crate::application::circuits::Circuits;
use crate::application::deliver::{AttemptLimits, Deliver};
use crate::application::directory::EndpointDirectory;
use crate::application::enqueue::Enqueue;
use crate::application::manage_deliveries::ManageDeliveries;
use crate::application::manage_endpoints::ManageEndpoints;
use crate::application::upkeep;
use crate::application::wakeup::Wakeup;
use crate::application::workers::shares::Shares;
use crate::application::workers::{WorkerNames, WorkerPool};
use crate::domain::address::AddressPolicy;

/// How long an enqueue may take before it is answered with 503.
const ENQUEUE_PATIENCE: Duration = Duration::from_millis(1800);
/// The wait between tries to reach the database at start: at first, and after many in vain.
const DATABASE_AGAIN_MIN: Duration = Duration::from_millis(500);
const DATABASE_AGAIN_MAX: Duration = Duration::from_secs(10);
/// How often the private server is looked at.
const EMBEDDED_CHECK_EVERY: Duration = Duration::from_secs(2);
/// Beyond the limit of an attempt: how long the last outcomes may take to be written at the end.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(15);

/// Which parts of the service a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// API and workers.
    Serve,
    /// The API alone.
    Api,
    /// Workers alone, with health and metrics.
    Worker,
}

/// What a command wants of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To read: on a standby, too, and as a role that may do nothing else.
    Read,
    /// To write, with the schema that is there.
    Write,
    /// To bring the schema up to date first, and to make the private database if there is none.
    Migrate,
}

/// Whether to wait for a database that is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// As long as it takes: a service.
    Endless,
    /// Not at all: a command that someone waits for.
    None,
}

/// A database for use: an external one, or the private one.
pub struct ReadyDatabase {
    /// Its pools.
    pub database: Database,
    /// For LISTEN.
    pub listening: Listening,
    embedded: Option<(EmbeddedOptions, EmbeddedPostgres)>,
    /// Whether its schema was looked at and is as new as it must be.
    is_prepared: bool,
}

impl ReadyDatabase {
    /// Prepares pools, starting the private server if there is no other database. An external one need not be there yet.
    async fn open(settings: &Settings, may_create: bool) -> anyhow::Result<Self> {
        let (options, setting, embedded) = if let Some(options) = &settings.database {
            (options.clone(), "DATABASE_URL", None)
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
            let embedded = EmbeddedPostgres::start(&options).await?;
            info!("private PostgreSQL; look inside with: {}", embedded.psql_command());
            (embedded.connect_options(), "DATA_DIR", Some((options, embedded)))
        };
        let mut database = Database::reached_by(options.clone(), setting, settings.request_connections);
        let listening = match settings.listen_database.clone().filter(|_| embedded.is_none()) {
            Some(direct) => {
                database = database.migrating_by(direct.clone());
                Listening::new(direct, "LISTEN_DATABASE_URL")
            }
            None => Listening::new(options, setting),
        };
        Ok(Self { database, listening, embedded, is_prepared: false })
    }

    /// Opens the database for a command, or refuses with a sentence that says why.
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

    /// Opens the database and brings its schema up to date. Waits for one that is away as `patience` says, until `stop`.
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

    async fn migrate(&self, stop: &CancellationToken, patience: Patience) -> anyhow::Result<()> {
        let mut pause = DATABASE_AGAIN_MIN;
        loop {
            let migrated = tokio::select! {
                migrated = self.database.migrate() => migrated,
                () = stop.cancelled() => bail!("stopped before the database was there"),
            };
            let Err(trouble) = migrated else { return Ok(()) };
            if patience == Patience::None || !trouble.passes() {
                return Err(trouble.into());
            }
            warn!("{trouble}; trying again in {} s", pause.as_secs_f32());
            tokio::select! {
                () = stop.cancelled() => bail!("stopped before the database was there"),
                () = sleep(pause) => {}
            }
            pause = (pause * 2).min(DATABASE_AGAIN_MAX);
        }
    }

    /// Closes the pools and stops the private server, if nobody else uses it.
    pub async fn close(self) {
        self.database.close().await;
        if let Some((_, embedded)) = self.embedded
            && let Err(error) = embedded.stop().await
        {
            warn!(error = format!("{error:#}"), "the private PostgreSQL could not be stopped");
        }
    }
}

/// The use cases on a database.
pub struct Application {
    /// What the API works with.
    pub api: Api,
    /// Who is woken when something is ready.
    pub wakeup: Arc<Wakeup>,
    /// Those who attempt deliveries in this process.
    pub workers: Option<Arc<WorkerPool>>,
}

impl Application {
    /// Puts the use cases together, without workers.
    pub fn new(database: &Database, settings: &Settings) -> Self {
        let (wakeup, directory) = Self::shared(database);
        Self::of(database, settings, wakeup, directory, None)
    }

    /// Puts the use cases together, with workers that are yet to run.
    pub fn with_workers(database: &Database, settings: &Settings) -> anyhow::Result<Self> {
        let (wakeup, directory) = Self::shared(database);
        let workers = worker_pool(database, settings, &wakeup, &directory)?;
        Ok(Self::of(database, settings, wakeup, directory, Some(Arc::new(workers))))
    }

    fn shared(database: &Database) -> (Arc<Wakeup>, Arc<EndpointDirectory>) {
        (Arc::default(), Arc::new(EndpointDirectory::start(Arc::new(database.clone()))))
    }

    fn of(
        database: &Database,
        settings: &Settings,
        wakeup: Arc<Wakeup>,
        directory: Arc<EndpointDirectory>,
        workers: Option<Arc<WorkerPool>>,
    ) -> Self {
        let store = Arc::new(database.clone());
        let enqueue = Arc::new(Enqueue::start(
            directory.clone(),
            store.clone(),
            wakeup.clone(),
            workers.clone(),
            ENQUEUE_PATIENCE,
        ));
        let addresses = AddressPolicy::new(settings.egress_allow.clone());
        let api = Api {
            enqueue: enqueue.clone(),
            deliveries: Arc::new(ManageDeliveries::new(
                store.clone(),
                store.clone(),
                directory.clone(),
                enqueue,
                wakeup.clone(),
            )),
            endpoints: Arc::new(ManageEndpoints::new(
                store.clone(),
                store,
                directory,
                addresses,
                settings.http_timeout,
                wakeup.clone(),
            )),
        };
        Self { api, wakeup, workers }
    }
}

fn worker_pool(
    database: &Database,
    settings: &Settings,
    wakeup: &Arc<Wakeup>,
    directory: &Arc<EndpointDirectory>,
) -> anyhow::Result<WorkerPool> {
    let store = Arc::new(database.clone());
    let sender = HttpSender::new(SenderSettings {
        timeout: settings.http_timeout,
        response_bytes_max: settings.response_bytes_max,
        idle_connections_max: settings.workers.leases_max(),
        addresses: AddressPolicy::new(settings.egress_allow.clone()),
    })?;
    let circuits = Circuits::new(store.clone(), wakeup.clone());
    let shares = Shares::new(settings.workers.leases_max(), wakeup.clone());
    let deliver = Deliver::start(
        directory.clone(),
        store.clone(),
        circuits,
        Arc::new(sender),
        wakeup.clone(),
        shares.clone(),
        AttemptLimits { lease: settings.workers.lease, attempt_max: settings.http_timeout },
    );
    Ok(WorkerPool::new(store, deliver, wakeup.clone(), shares, settings.workers.clone(), worker_names()))
}

/// Lets this process have as many files open as the system allows it: each connection is one, and a common limit is 1,024.
fn raise_open_files_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "the limit of open files cannot be raised");
    }
}

/// Runs a role until `stop`, then finishes what is under way.
pub async fn run(
    settings: &Settings,
    role: Role,
    metrics: PrometheusHandle,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    raise_open_files_limit();
    // before the database, so that a second process on the same address is told so before it starts anything
    let listener = http::listen(settings.listen_addr)
        .with_context(|| format!("LISTEN_ADDR: cannot listen on {}", settings.listen_addr))?;
    let ready = ReadyDatabase::open(settings, true).await?;
    let ended = run_on(settings, role, metrics, &ready, listener, stop).await;
    ready.close().await;
    ended
}

/// Runs a role on a database. As long as that is not ready, health answers, and the API with 503; the rest begins afterwards.
pub async fn run_on(
    settings: &Settings,
    role: Role,
    metrics: PrometheusHandle,
    ready: &ReadyDatabase,
    listener: TcpListener,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let database = &ready.database;
    let application = match role {
        Role::Api => Application::new(database, settings),
        Role::Serve | Role::Worker => Application::with_workers(database, settings)?,
    };
    let address = listener.local_addr()?;
    let begun = Begun::default();
    if ready.is_prepared {
        begun.note();
    }
    let operations = Operations::new(database.clone(), metrics.clone(), settings.ready_age_max);
    let router = http::router(
        operations.after(begun.clone()),
        (role != Role::Worker).then(|| application.api.clone()),
    );

    let mut tasks = JoinSet::new();
    tasks.spawn(http::serve(listener, router, stop.clone()));
    info!(%address, role = format!("{role:?}").to_lowercase(), "listening");
    if !ready.is_prepared {
        ready.migrate(&stop, Patience::Endless).await?;
    }
    begun.note();
    tasks.spawn(upkeep::run(Arc::new(database.clone()), settings.archive_retention, stop.clone()));
    let listener = Uuid::new_v4();
    tasks.spawn(announce_ready(database.clone(), listener, application.wakeup.clone(), stop.clone()));
    tasks.spawn(keep_metrics_small(metrics, stop.clone()));
    if let Some((options, _)) = &ready.embedded {
        tasks.spawn(keep_embedded_postgres_running(options.clone(), database.clone(), stop.clone()));
    }
    if let Some(workers) = application.workers {
        let way = ready.listening.clone();
        tasks.spawn(listen_for_ready(way, listener, application.wakeup.clone(), stop.clone()));
        tasks.spawn(workers.run(stop.clone()));
    }
    info!("the service is ready");
    if role != Role::Worker {
        info!("documentation: http://{address}/docs");
    }

    let first = tasks.join_next().await;
    if !stop.is_cancelled() {
        stop.cancel();
        bail!("a part of the service ended unexpectedly: {first:?}");
    }
    let limit = settings.http_timeout + SETTLE_TIME_MAX;
    if timeout(limit, async { while tasks.join_next().await.is_some() {} }).await.is_err() {
        bail!("not all attempts could be finished; the others are repeated when their leases end");
    }
    info!("stopped");
    Ok(())
}

/// Starts the private PostgreSQL again where it has died: nobody else would.
async fn keep_embedded_postgres_running(
    options: EmbeddedOptions,
    database: Database,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(EMBEDDED_CHECK_EVERY) => {}
        }
        if database.is_migrated().await.is_ok() {
            continue;
        }
        // joins the server if it runs after all
        let started = tokio::select! {
            () = stop.cancelled() => return,
            started = EmbeddedPostgres::start(&options) => started,
        };
        match started {
            // this process uses it anyway, so this stops nothing
            Ok(second_hold) => match second_hold.stop().await {
                Ok(_) => warn!("the private PostgreSQL did not answer, and was started again if it had died"),
                Err(error) => {
                    warn!(error = format!("{error:#}"), "the private PostgreSQL is in a strange state");
                }
            },
            Err(error) => error!(
                error = format!("{error:#}"),
                "the private PostgreSQL has died and cannot be started; trying again"
            ),
        }
    }
}

/// Two workers never have the same name, wherever they run.
fn worker_names() -> WorkerNames {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = match host.trim() {
        "" => "unknown-host",
        name => name,
    };
    WorkerNames { host: host.to_owned(), pid: std::process::id() }
}

/// Histograms hold single values until someone reads them; this folds them into their buckets.
async fn keep_metrics_small(metrics: PrometheusHandle, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(Duration::from_secs(5)) => metrics.run_upkeep(),
        }
    }
}
