//! What the routes for operators work with.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;

use super::backlog_sample::BacklogSample;
use super::metrics::CircuitGauges;
use crate::application::duties::Duties;
use crate::application::ports::{CircuitStore, DeliveryRecords};
use crate::infrastructure::postgres::Database;

/// Groups these routes in the OpenAPI document.
pub const TAG: &str = "operations";

/// The health and the metrics of a process, and of its database.
#[derive(Clone)]
pub struct Operations {
    pub(super) database: Database,
    pub(super) metrics: PrometheusHandle,
    pub(super) records: Arc<dyn DeliveryRecords>,
    pub(super) backlog: Arc<BacklogSample>,
    pub(super) circuits: Arc<dyn CircuitStore>,
    pub(super) circuit_gauges: Arc<CircuitGauges>,
    pub(super) ready_age_max: Duration,
    pub(super) begun: Begun,
    pub(super) duties: Arc<Duties>,
}

impl Operations {
    /// Health and metrics of this process and of its database.
    pub fn new(database: Database, metrics: PrometheusHandle, ready_age_max: Duration) -> Self {
        let records: Arc<dyn DeliveryRecords> = Arc::new(database.clone());
        Self {
            circuits: Arc::new(database.clone()),
            circuit_gauges: Arc::default(),
            database,
            metrics,
            backlog: Arc::new(BacklogSample::new(records.clone())),
            records,
            ready_age_max,
            begun: Begun::already(),
            duties: Arc::default(),
        }
    }

    /// Makes the process not ready while one of these duties keeps failing.
    #[must_use]
    pub fn watching(mut self, duties: Arc<Duties>) -> Self {
        self.duties = duties;
        self
    }

    /// Makes the API answer 503 until `begun` is noted.
    #[must_use]
    pub fn after(mut self, begun: Begun) -> Self {
        self.begun = begun;
        self
    }
}

/// Whether the database has been ready once. Before that, the API cannot answer anything.
#[derive(Debug, Clone, Default)]
pub struct Begun(Arc<AtomicBool>);

impl Begun {
    /// For a process whose database is ready already.
    fn already() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }

    pub(super) fn has(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Notes that the database is ready.
    pub fn note(&self) {
        self.0.store(true, Ordering::Release);
    }
}
