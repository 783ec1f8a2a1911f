//! Composition root: builds a running service from the settings.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::http::{self, Api, Asks, Begun, Door, Openness, Operations};
use super::metrics::keep_metrics_small;
use super::postgres::{Database, announce_ready, listen_for_ready, upkeep};
use super::process::{raise_open_files_limit, worker_names};
use super::ready_database::{Patience, ReadyDatabase};
use super::sender::{HttpSender, SenderSettings};
use super::settings::{Auth, Settings};
use crate::application::access::Access;
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
use crate::domain::egress::Egress;

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
        Parts::new(database, settings).assemble(settings, None)
    }

    /// Builds the use cases with workers. The caller runs the workers.
    pub fn with_workers(database: &Database, settings: &Settings) -> anyhow::Result<Self> {
        let parts = Parts::new(database, settings);
        let workers = parts.worker_pool(settings)?;
        Ok(parts.assemble(settings, Some(Arc::new(workers))))
    }
}

/// What the use cases and the workers of a process share.
struct Parts {
    store: Arc<Database>,
    directory: Arc<EndpointDirectory>,
    wakeup: Arc<Wakeup>,
    duties: Arc<Duties>,
    egress: Egress,
}

impl Parts {
    fn new(database: &Database, settings: &Settings) -> Self {
        let store = Arc::new(database.clone());
        Self {
            directory: Arc::new(EndpointDirectory::start(store.clone())),
            store,
            wakeup: Arc::default(),
            duties: Arc::default(),
            egress: settings.egress(),
        }
    }

    fn worker_pool(&self, settings: &Settings) -> anyhow::Result<WorkerPool> {
        let sender = HttpSender::new(SenderSettings {
            timeout: settings.http_timeout,
            response_bytes_max: settings.response_bytes_max,
            idle_connections_max: settings.workers.leases_max(),
            egress: self.egress.clone(),
            name_servers: settings.name_servers.clone(),
        })?;
        let circuits = Circuits::new(self.store.clone(), self.wakeup.clone());
        let ledger = Ledger::new(settings.workers.leases_max(), self.wakeup.clone());
        let deliver = Deliver::start(
            self.directory.clone(),
            self.store.clone(),
            circuits,
            Arc::new(sender),
            self.wakeup.clone(),
            ledger.clone(),
            AttemptLimits { lease_term: settings.workers.lease_term, attempt_max: settings.http_timeout },
        );
        Ok(WorkerPool::new(
            self.store.clone(),
            deliver,
            self.wakeup.clone(),
            ledger,
            self.duties.clone(),
            settings.workers.clone(),
            worker_names(),
        ))
    }

    fn assemble(self, settings: &Settings, workers: Option<Arc<WorkerPool>>) -> Application {
        let Self { store, directory, wakeup, duties, egress } = self;
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
            access: Arc::new(Access::new(store.clone())),
            endpoints: Arc::new(ManageEndpoints::new(
                store.clone(),
                store,
                directory,
                egress,
                settings.http_timeout,
                wakeup.clone(),
            )),
        };
        Application { api, wakeup, duties, workers }
    }
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
    let asks = match settings.auth {
        Some(Auth::None) => Asks::NothingOfAnyone,
        None if address.ip().is_loopback() => Asks::Nothing,
        None | Some(Auth::Keys) => Asks::ForKeys,
    };
    let open_api = async || {
        if role != Role::Worker && asks == Asks::ForKeys {
            require_key(&application.api.access).await?;
        }
        begun.note();
        anyhow::Ok(())
    };
    if ready.is_prepared {
        open_api().await?;
    }
    let operations = Operations::new(database.clone(), metrics.clone(), settings.ready_age_max);
    let router = http::router(
        operations.after(begun.clone()).watching(application.duties.clone()),
        (role != Role::Worker).then(|| application.api.clone()),
        Openness {
            door: Door::new(application.api.access.clone(), asks),
            guards_metrics: settings.metrics_auth == Auth::Keys,
            shows_docs: settings.docs,
        },
    );

    let mut tasks = JoinSet::new();
    tasks.spawn(http::serve(listener, router, stop.clone()));
    info!(%address, role = format!("{role:?}").to_lowercase(), "listening");
    if !ready.is_prepared {
        ready.migrate(&stop, Patience::Endless).await?;
        open_api().await?;
    }
    database.warn_of_durability_faults().await;
    let duties = application.duties;
    tasks.spawn(upkeep::run(database.clone(), settings.archive_retention, duties, stop.clone()));
    let listener = Uuid::new_v4();
    tasks.spawn(announce_ready(database.clone(), listener, application.wakeup.clone(), stop.clone()));
    tasks.spawn(keep_metrics_small(metrics, stop.clone()));
    if let Some(keeper) = ready.keeper(stop.clone()) {
        tasks.spawn(keeper);
    }
    if let Some(workers) = application.workers {
        let way = ready.listening.clone();
        tasks.spawn(listen_for_ready(way, listener, application.wakeup.clone(), stop.clone()));
        tasks.spawn(workers.run(stop.clone()));
    }
    info!("the service is ready");
    if role != Role::Worker && settings.docs {
        info!("documentation: http://{address}/docs");
    }

    until_stopped(tasks, stop, settings.http_timeout + SETTLE_TIME_MAX).await
}

/// Waits for `stop`, then lets the parts of the service end within `limit`. If a part ends before that, all of it stops.
async fn until_stopped(
    mut tasks: JoinSet<()>,
    stop: CancellationToken,
    limit: Duration,
) -> anyhow::Result<()> {
    let first = tasks.join_next().await;
    let is_unexpected = !stop.is_cancelled();
    if is_unexpected {
        error!(part = ?first, "a part of the service ended unexpectedly, so all of it stops");
        stop.cancel();
    }
    // attempts under way are settled in any case: they would be repeated otherwise
    let all_ended = timeout(limit, async { while tasks.join_next().await.is_some() {} }).await.is_ok();
    if !all_ended {
        bail!("not all attempts could be finished; the others are repeated when their leases end");
    }
    if is_unexpected {
        bail!("a part of the service ended unexpectedly: {first:?}");
    }
    info!("stopped");
    Ok(())
}

/// Refuses to serve an API that nobody could use.
async fn require_key(access: &Access) -> anyhow::Result<()> {
    match access.has_key().await {
        Ok(true) => Ok(()),
        Ok(false) => bail!(
            "LISTEN_ADDR: calls need an API key here, and there is none: make one with `webhook-processor keys create --name \
             admin --scope enqueue,read,operate,manage`, or set AUTH=none"
        ),
        // the next look may work, and nobody is let in until then
        Err(error) => {
            warn!(error = error.report(), "the API keys cannot be read");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::task::yield_now;

    use super::*;

    #[tokio::test]
    async fn when_a_part_ends_unexpectedly_the_others_still_finish_what_is_under_way() {
        let (mut tasks, stop) = (JoinSet::new(), CancellationToken::new());
        let finished = Arc::new(AtomicBool::new(false));
        tasks.spawn(async { panic!("on purpose") });
        let (stopped, noted) = (stop.clone(), finished.clone());
        tasks.spawn(async move {
            stopped.cancelled().await;
            yield_now().await;
            noted.store(true, Ordering::SeqCst);
        });

        let ended = until_stopped(tasks, stop, Duration::from_mins(1)).await;

        assert!(ended.unwrap_err().to_string().contains("ended unexpectedly"));
        assert!(finished.load(Ordering::SeqCst));
    }
}
