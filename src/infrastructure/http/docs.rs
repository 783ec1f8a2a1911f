//! The OpenAPI document, made from the code, and pages to read it.

use axum::Router;
use utoipa::OpenApi;
use utoipa_swagger_ui::SwaggerUi;

use super::{api_routes, operations_routes};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "webhook-processor",
        description = "Events in, webhooks out: every event is stored before it is acknowledged, delivered with retries, \
                       and every attempt is recorded. Errors are `application/problem+json` (RFC 9457); every answer \
                       carries `x-request-id`; times are RFC 3339 in UTC.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0")
    ),
    tags(
        (name = "webhooks", description = "Events and their deliveries"),
        (name = "configs", description = "Where deliveries go, and how"),
        (name = "operations", description = "Health and metrics"),
    )
)]
struct Description;

/// Title, description and tags, without routes.
pub(super) fn description() -> utoipa::openapi::OpenApi {
    Description::openapi()
}

/// The whole document.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = api_routes().into_openapi();
    document.merge(operations_routes().into_openapi());
    document
}

/// `/openapi.json` and `/docs`.
pub(super) fn routes(document: utoipa::openapi::OpenApi) -> Router {
    Router::new().merge(SwaggerUi::new("/docs").url("/openapi.json", document))
}
