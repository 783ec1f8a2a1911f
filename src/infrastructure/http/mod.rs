//! The HTTP API: its routes, one file per resource.

mod access;
mod backlog_sample;
mod bulk;
mod configs;
mod docs;
mod error;
mod extract;
mod health;
mod keys;
mod metrics;
mod observation;
mod operators;
mod server;
mod webhooks;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use tower_http::catch_panic::CatchPanicLayer;
use tracing::error;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use access::{Asks, Door};
pub use docs::openapi;
pub use operators::{Begun, Operations};
pub use server::{listen, serve};

use self::error::ApiError;
use self::observation::observe;
use crate::application::access::Access;
use crate::application::enqueue::Enqueue;
use crate::application::manage_deliveries::ManageDeliveries;
use crate::application::manage_endpoints::ManageEndpoints;

/// What the handlers of the API use.
#[derive(Clone)]
pub struct Api {
    /// Events in.
    pub enqueue: Arc<Enqueue>,
    /// Deliveries, and what people do with them.
    pub deliveries: Arc<ManageDeliveries>,
    /// Configs, which the domain calls endpoints.
    pub endpoints: Arc<ManageEndpoints>,
    /// API keys: who may do what.
    pub access: Arc<Access>,
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
        .routes(routes!(keys::create, keys::list))
        .routes(routes!(keys::revoke))
}

/// The routes of health, with their documentation. They are open to everyone.
fn health_routes() -> OpenApiRouter<Operations> {
    OpenApiRouter::new()
        .routes(routes!(health::health))
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
}

/// The route of metrics, with its documentation.
fn metrics_routes() -> OpenApiRouter<Operations> {
    OpenApiRouter::new().routes(routes!(metrics::metrics))
}

/// What is open to whom.
#[derive(Clone)]
pub struct Openness {
    /// Whom the API answers.
    pub door: Door,
    /// Whether metrics are answered only to whom the API answers, too.
    pub guards_metrics: bool,
    /// Whether `/docs` and `/openapi.json` are there.
    pub shows_docs: bool,
}

/// All routes; without an `api`, only those for operators.
pub fn router(operations: Operations, api: Option<Api>, openness: Openness) -> Router {
    let begun = operations.begun.clone();
    let Openness { door, guards_metrics, shows_docs } = openness;
    let (mut router, _) = health_routes().with_state(operations.clone()).split_for_parts();
    let (mut metrics, _) = metrics_routes().with_state(operations).split_for_parts();
    if guards_metrics {
        metrics = metrics.route_layer(from_fn_with_state(door.clone(), access::admit_to_metrics));
    }
    router = router.merge(metrics);
    if let Some(api) = api {
        let (api_router, _) = api_routes().with_state(api).split_for_parts();
        router = router.merge(
            api_router
                .route_layer(from_fn_with_state(door, access::admit))
                .route_layer(from_fn_with_state(begun, after_begin)),
        );
        if shows_docs {
            router = router.merge(docs::routes());
        }
    }
    router
        .fallback(async || ApiError::not_found("there is no such route"))
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .layer(CatchPanicLayer::custom(|_| {
            error!("a request handler panicked");
            ApiError::unexpected().into_response()
        }))
        .layer(from_fn(observe))
}
