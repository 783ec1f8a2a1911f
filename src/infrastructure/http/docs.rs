//! The OpenAPI document, generated from the code, and a page to read it.

use std::collections::BTreeMap;

use axum::Router;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::middleware::map_response;
use axum::response::{IntoResponse as _, Response};
use http_body_util::BodyExt as _;
use tracing::error;
use utoipa::openapi::path::Operation;
use utoipa::openapi::response::{Response as Answer, ResponseBuilder};
use utoipa::openapi::schema::{ArrayItems, ObjectBuilder, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Content, PathItem, Ref, RefOr, Schema};
use utoipa::{IntoResponses, Modify, OpenApi};
use utoipa_swagger_ui::SwaggerUi;

use super::access::{METRICS_SCOPE, scope_of};
use super::error::{ApiError, PROBLEM_JSON, Problem};
use super::{api_routes, health_routes, metrics_routes};

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
        (name = "keys", description = "API keys: who may do what"),
        (name = "operations", description = "Health and metrics"),
    ),
    components(schemas(Problem)),
    modifiers(&ApiKeys)
)]
struct Description;

/// The name of the way to present a key.
const API_KEY: &str = "api_key";

/// Declares how keys are presented.
struct ApiKeys;

impl Modify for ApiKeys {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let bearer = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some("An API key, `whk_…`. On loopback none is needed, unless AUTH=keys is set."))
            .build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme(API_KEY, SecurityScheme::Http(bearer));
    }
}

/// Title, description and tags, without routes.
pub(super) fn description() -> utoipa::openapi::OpenApi {
    Description::openapi()
}

/// All routes, for callers and for operators.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = api_routes().into_openapi();
    document.merge(health_routes().into_openapi());
    document.merge(metrics_routes().into_openapi());
    for (path, item) in &mut document.paths.paths {
        describe_access(path, item);
        describe_problems(item);
    }
    document.components.iter_mut().flat_map(|all| all.schemas.values_mut()).for_each(put_together);
    document
}

/// Merges an `allOf` of objects, which flattened fields produce, into one object.
fn put_together(schema: &mut RefOr<Schema>) {
    match schema {
        RefOr::T(Schema::Object(object)) => object.properties.values_mut().for_each(put_together),
        RefOr::T(Schema::Array(array)) => {
            if let ArrayItems::RefOrSchema(item) = &mut array.items {
                put_together(item);
            }
        }
        RefOr::T(Schema::AllOf(all)) => {
            all.items.iter_mut().for_each(put_together);
            let mut whole =
                ObjectBuilder::new().schema_type(Type::Object).description(all.description.clone()).build();
            for part in &all.items {
                let RefOr::T(Schema::Object(part)) = part else { return };
                whole.properties.extend(part.properties.clone());
                whole.required.extend(part.required.clone());
            }
            *schema = whole.into();
        }
        RefOr::T(_) | RefOr::Ref(_) => {}
    }
}

/// The operations of a path, with their methods.
fn operations_of(item: &mut PathItem) -> impl Iterator<Item = (&'static str, &mut Operation)> {
    let operations = [
        ("GET", &mut item.get),
        ("POST", &mut item.post),
        ("PUT", &mut item.put),
        ("PATCH", &mut item.patch),
        ("DELETE", &mut item.delete),
    ];
    operations.into_iter().filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

/// Says which scope each route needs.
fn describe_access(path: &str, item: &mut PathItem) {
    for (method, operation) in operations_of(item) {
        let scope = if path == "/metrics" { Some(METRICS_SCOPE) } else { scope_of(method, path) };
        let Some(scope) = scope else { continue };
        operation.security = Some(vec![SecurityRequirement::new(API_KEY, [scope.as_str()])]);
        let answers = &mut operation.responses.responses;
        for (status, description) in [
            ("401", "No valid API key".to_owned()),
            ("403", format!("The key lacks the scope `{scope}`, or is not bound to the config")),
            ("429", "Too many wrong keys came from this address; see Retry-After".to_owned()),
        ] {
            answers.insert(status.to_owned(), ResponseBuilder::new().description(description).build().into());
        }
    }
}

/// Documents the body of each error as a problem, unless its route documents another body.
fn describe_problems(path: &mut PathItem) {
    for (_, operation) in operations_of(path) {
        for (status, answer) in &mut operation.responses.responses {
            if let RefOr::T(answer) = answer
                && status.starts_with(['4', '5'])
                && answer.content.is_empty()
            {
                let problem = Content::new(Some(Ref::from_schema_name("Problem")));
                answer.content.insert(PROBLEM_JSON.to_owned(), problem.into());
            }
        }
    }
}

/// The errors of a route with a JSON body.
pub(super) struct BodyProblems;

impl IntoResponses for BodyProblems {
    fn responses() -> BTreeMap<String, RefOr<Answer>> {
        let problems = [
            ("400", "Not JSON"),
            ("413", "More than 64 KiB"),
            ("415", "Not application/json"),
            ("422", "A field is at fault"),
        ];
        let answer = |(status, description): (&str, &str)| {
            (status.to_owned(), ResponseBuilder::new().description(description).build().into())
        };
        problems.map(answer).into()
    }
}

/// `/openapi.json` and `/docs`.
pub(super) fn routes() -> Router {
    Router::new()
        .merge(SwaggerUi::new("/docs").url("/openapi.json", openapi()))
        .layer(map_response(with_our_title))
}

/// Replaces the page's title, which names Swagger UI.
async fn with_our_title(response: Response) -> Response {
    let is_page =
        response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/html"));
    if !is_page {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    match body.collect().await {
        Ok(page) => {
            let page = String::from_utf8_lossy(&page.to_bytes())
                .replace("<title>Swagger UI</title>", "<title>webhook-processor: API</title>");
            parts.headers.remove(CONTENT_LENGTH);
            Response::from_parts(parts, page.into())
        }
        Err(cause) => {
            error!(error = %cause, "the documentation page cannot be read");
            ApiError::unexpected().into_response()
        }
    }
}
