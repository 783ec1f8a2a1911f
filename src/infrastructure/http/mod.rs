//! The HTTP API: its routes, one file per resource.

mod backlog_sample;
mod bulk;
mod configs;
mod docs;
mod error;
mod extract;
mod health;
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

pub use docs::openapi;
pub use operators::{Begun, Operations};
pub use server::{listen, serve};

use self::error::ApiError;
use self::observation::observe;
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
        .routes(routes!(health::health))
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
        .routes(routes!(metrics::metrics))
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
