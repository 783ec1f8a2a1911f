//! Composition root: builds a running service from the settings.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::info;
use uuid::Uuid;

use super::http::{self, Api, Begun, Operations};
use super::postgres::{Database, announce_ready, listen_for_ready, upkeep};
use super::process::{raise_open_files_limit, worker_names};
use super::ready_database::{Patience, ReadyDatabase};
use super::sender::{HttpSender, SenderSettings};
use super::settings::Settings;
use super::telemetry;
use crate::application::circuits::Circuits;
use crate::application::deliver::{AttemptLimits, Deliver};
use crate::application::directory::EndpointDirectory;
use crate::application::duties::Duties;
use crate::application::enqueue::Enqueue;
use crate::application::manage_deliveries::ManageDeliveries;
use crate::application::manage_endpoints::ManageEndpoints;
use crate::application::wakeup::Wakeup;
use crate::application::workers::WorkerPool;
use crate::application::workers::ledger::Ledger;

/// How long an enqueue may take before the API answers with 503.
const ENQUEUE_PATIENCE: Duration = Duration::from_millis(1800);
/// At shutdown, the time for writing the last outcomes, in addition to the limit of an attempt.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(15);

/// Which parts of the service a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// API and workers.
    Serve,
    /// The API only.
    Api,
    /// Workers only, with health and metrics.
    Worker,
}

/// The use cases, connected to a database.
pub struct Application {
    /// What the API needs.
    pub api: Api,
    /// Wakes the loops that wait for deliveries.
    pub wakeup: Arc<Wakeup>,
    /// The failing duties of this process.
    pub duties: Arc<Duties>,
    /// The workers of this process; `None` for the API only.
    pub workers: Option<Arc<WorkerPool>>,
}

impl Application {
    /// Builds the use cases without workers.
    pub fn new(database: &Database, settings: &Settings) -> Self {
        let (wakeup, directory) = Self::shared(database);
        Self::of(database, settings, wakeup, directory, Arc::default(), None)
    }

    /// Builds the use cases with workers. The caller runs the workers.
    pub fn with_workers(database: &Database, settings: &Settings) -> anyhow::Result<Self> {
        let (wakeup, directory) = Self::shared(database);
        let duties = Arc::default();
        let workers = worker_pool(database, settings, &wakeup, &directory, &duties)?;
        Ok(Self::of(database, settings, wakeup, directory, duties, Some(Arc::new(workers))))
    }

    fn shared(database: &Database) -> (Arc<Wakeup>, Arc<EndpointDirectory>) {
        (Arc::default(), Arc::new(EndpointDirectory::start(Arc::new(database.clone()))))
    }

    fn of(
        database: &Database,
        settings: &Settings,
        wakeup: Arc<Wakeup>,
        directory: Arc<EndpointDirectory>,
        duties: Arc<Duties>,
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
                settings.egress(),
                settings.http_timeout,
                wakeup.clone(),
            )),
        };
        Self { api, wakeup, duties, workers }
    }
}

fn worker_pool(
    database: &Database,
    settings: &Settings,
    wakeup: &Arc<Wakeup>,
    directory: &Arc<EndpointDirectory>,
    duties: &Arc<Duties>,
) -> anyhow::Result<WorkerPool> {
    let store = Arc::new(database.clone());
    let sender = HttpSender::new(SenderSettings {
        timeout: settings.http_timeout,
        response_bytes_max: settings.response_bytes_max,
        idle_connections_max: settings.workers.leases_max(),
        egress: settings.egress(),
        name_servers: settings.name_servers.clone(),
    })?;
    let circuits = Circuits::new(store.clone(), wakeup.clone());
    let ledger = Ledger::new(settings.workers.leases_max(), wakeup.clone());
    let deliver = Deliver::start(
        directory.clone(),
        store.clone(),
        circuits,
        Arc::new(sender),
        wakeup.clone(),
        ledger.clone(),
        AttemptLimits { lease_term: settings.workers.lease_term, attempt_max: settings.http_timeout },
    );
    let (wakeup, duties, settings) = (wakeup.clone(), duties.clone(), settings.workers.clone());
    Ok(WorkerPool::new(store, deliver, wakeup, ledger, duties, settings, worker_names()))
}

/// Runs a role until `stop`, then finishes the attempts under way.
pub async fn run(
    settings: &Settings,
    role: Role,
    metrics: PrometheusHandle,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    raise_open_files_limit();
    // before the database, so that a second process on the same address fails before it starts anything
    let listener = http::listen(settings.listen_addr)
        .with_context(|| format!("LISTEN_ADDR: cannot listen on {}", settings.listen_addr))?;
    let ready = ReadyDatabase::open(settings, true).await?;
    let ended = run_on(settings, role, metrics, &ready, listener, stop).await;
    ready.close().await;
    ended
}

/// Runs a role on a database. Until the database is ready, only health works, and the API answers with 503.
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
        operations.after(begun.clone()).watching(application.duties.clone()),
        (role != Role::Worker).then(|| application.api.clone()),
    );

    let mut tasks = JoinSet::new();
    tasks.spawn(http::serve(listener, router, stop.clone()));
    info!(%address, role = format!("{role:?}").to_lowercase(), "listening");
    if !ready.is_prepared {
        ready.migrate(&stop, Patience::Endless).await?;
    }
    begun.note();
    let duties = application.duties;
    tasks.spawn(upkeep::run(database.clone(), settings.archive_retention, duties, stop.clone()));
    let listener = Uuid::new_v4();
    tasks.spawn(announce_ready(database.clone(), listener, application.wakeup.clone(), stop.clone()));
    tasks.spawn(telemetry::keep_metrics_small(metrics, stop.clone()));
    if let Some(keeper) = ready.keeper(stop.clone()) {
        tasks.spawn(keeper);
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
