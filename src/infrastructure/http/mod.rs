//! The HTTP API: routes, what all requests share, and the server. One file per resource.

mod bulk;
mod configs;
mod docs;
mod error;
mod extract;
mod operations;
mod server;
mod webhooks;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use metrics_exporter_prometheus::PrometheusHandle;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::{Instrument as _, error, info_span};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

pub use docs::openapi;
pub use server::{listen, serve};

use self::error::ApiError;
use self::operations::{BacklogSample, CircuitGauges};
use super::postgres::Database;
use crate::application::duties::Duties;
use crate::application::enqueue::Enqueue;
use crate::application::manage_deliveries::ManageDeliveries;
use crate::application::manage_endpoints::ManageEndpoints;
use crate::application::ports::{CircuitStore, DeliveryRecords};

/// Identifies a request in answers and logs.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A longer request id of a caller is replaced by one of ours.
const REQUEST_ID_BYTES_MAX: usize = 64;

/// What the handlers of the API use.
#[derive(Clone)]
pub struct Api {
    /// Events in.
    pub enqueue: Arc<Enqueue>,
    /// Deliveries, and what people do with them.
    pub deliveries: Arc<ManageDeliveries>,
    /// Configs, which the domain calls endpoints.
    pub endpoints: Arc<ManageEndpoints>,
}

/// What the handlers for operators use.
#[derive(Clone)]
pub struct Operations {
    database: Database,
    metrics: PrometheusHandle,
    records: Arc<dyn DeliveryRecords>,
    backlog: Arc<BacklogSample>,
    circuits: Arc<dyn CircuitStore>,
    circuit_gauges: Arc<CircuitGauges>,
    ready_age_max: Duration,
    begun: Begun,
    duties: Arc<Duties>,
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

    fn has(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Notes that the database is ready.
    pub fn note(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Answers 503 until the database is ready. The reason is for operators: the log and /health/ready show it.
async fn after_begin(State(begun): State<Begun>, request: Request, next: Next) -> Response {
    if begun.has() {
        return next.run(request).await;
    }
    ApiError::unavailable("the service is starting and waits for its database; try again").into_response()
}

/// The routes for callers, with their OpenAPI documentation.
fn api_routes() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(docs::description())
        .routes(routes!(webhooks::enqueue, webhooks::list))
        .routes(routes!(bulk::enqueue_batch))
        .routes(routes!(webhooks::statistics))
        .routes(routes!(webhooks::show))
        .routes(routes!(webhooks::retry))
        .routes(routes!(webhooks::cancel))
        .routes(routes!(webhooks::replay))
        .routes(routes!(configs::register, configs::list))
        .routes(routes!(configs::register_alias))
        .routes(routes!(configs::show, configs::change, configs::delete))
        .routes(routes!(configs::probe))
}

/// The routes for operators, with their OpenAPI documentation.
fn operations_routes() -> OpenApiRouter<Operations> {
    OpenApiRouter::new()
        .routes(routes!(operations::health))
        .routes(routes!(operations::live))
        .routes(routes!(operations::ready))
        .routes(routes!(operations::metrics))
}

/// All routes; without an `api`, only those for operators.
pub fn router(operations: Operations, api: Option<Api>) -> Router {
    let begun = operations.begun.clone();
    let (operations_router, _) = operations_routes().with_state(operations).split_for_parts();
    let router = match api {
        None => operations_router,
        Some(api) => {
            let (api_router, _) = api_routes().with_state(api).split_for_parts();
            let api_router = api_router.route_layer(from_fn_with_state(begun, after_begin));
            operations_router.merge(api_router).merge(docs::routes())
        }
    };
    router
        .fallback(async || ApiError::not_found("there is no such route"))
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .layer(CatchPanicLayer::custom(|_| {
            error!("a request handler panicked");
            ApiError::unexpected().into_response()
        }))
        .layer(from_fn(observe))
}

/// Gives each request an id, a log span and a metric. The span leaves out the query, which may hold private data.
async fn observe(mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(&request);
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "other".to_owned(), |path| path.as_str().to_owned());
    let method = method_label(request.method());
    let span = info_span!(
        "request",
        request_id = id.to_str().unwrap_or_default(),
        method,
        path = request.uri().path()
    );

    let mut response = next.run(request).instrument(span).await;

    let status = response.status().as_u16().to_string();
    metrics::histogram!("http_request_duration_seconds", "route" => route, "method" => method, "status" => status)
        .record(started.elapsed());
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// A method as a label of a metric. Callers can invent methods, and each new label would use memory permanently.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// The caller's request id if it is short and plain, else a new one.
fn request_id(request: &Request) -> HeaderValue {
    let given = request.headers().get(REQUEST_ID).filter(|id| {
        (1..=REQUEST_ID_BYTES_MAX).contains(&id.len())
            && id.as_bytes().iter().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(b))
    });
    given.cloned().unwrap_or_else(|| {
        HeaderValue::try_from(Uuid::now_v7().to_string()).expect("a UUID is a header value")
    })
}
