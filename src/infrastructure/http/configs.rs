//! `/api/webhooks`: configs, which say where deliveries go.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use super::Api;
use super::access::{Admitted, ByOperator};
use super::docs::BodyProblems;
use super::error::ApiError;
use super::extract::{ApiJson, ApiPath, ApiQuery};
use super::webhooks::page_size;
use crate::application::manage_endpoints::EndpointError;
use crate::contract::Page;
use crate::contract::configs::{ConfigBody, ConfigView, NewConfigBody};
use crate::domain::access::Caller;
use crate::domain::endpoint::{Endpoint, EndpointId};
use crate::domain::endpoint_settings::EndpointParts;
use crate::domain::invalid::{Faults, Invalid};

const TAG: &str = "configs";

/// Register a config.
#[utoipa::path(post, path = "/api/webhooks/register", operation_id = "register_config", tag = TAG,
    request_body = NewConfigBody, responses(
    (status = 201, description = "Registered", body = ConfigView),
    BodyProblems,
))]
pub async fn register_alias(
    state: State<Api>,
    by: ByOperator,
    parts: ApiJson<EndpointParts>,
) -> Result<Response, ApiError> {
    register(state, by, parts).await
}

/// Register a config (the same as `/api/webhooks/register`).
#[utoipa::path(post, path = "/api/webhooks", operation_id = "create_config", tag = TAG, request_body = NewConfigBody, responses(
    (status = 201, description = "Registered", body = ConfigView),
    BodyProblems,
))]
pub async fn register(
    State(api): State<Api>,
    ByOperator(by): ByOperator,
    ApiJson(parts): ApiJson<EndpointParts>,
) -> Result<Response, ApiError> {
    let endpoint = api.endpoints.register(parts, &by).await?;
    let location = [(header::LOCATION, format!("/api/webhooks/{}", endpoint.id))];
    Ok((StatusCode::CREATED, location, Json(view(&api, endpoint))).into_response())
}

/// Which configs to list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// `next_cursor` of the previous page.
    #[param(pattern = "^[1-9][0-9]{0,17}$")]
    cursor: Option<String>,
    /// Items per page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<i64>,
}

/// List configs, oldest first.
#[utoipa::path(get, path = "/api/webhooks", operation_id = "list_configs", tag = TAG, params(ListQuery), responses(
    (status = 200, description = "A page of configs", body = Page<ConfigView>),
    (status = 422, description = "A parameter is at fault"),
))]
pub async fn list(
    State(api): State<Api>,
    Admitted(caller): Admitted,
    ApiQuery(query): ApiQuery<ListQuery>,
) -> Result<Json<Page<ConfigView>>, ApiError> {
    let mut faults = Faults::default();
    let limit = faults.note(page_size(query.limit));
    let after = query.cursor.and_then(|text| {
        let id = text.parse().ok().and_then(|number| EndpointId::parse("cursor", number).ok());
        faults.note(id.ok_or_else(|| Invalid::field("cursor", "must be a next_cursor of this list")))
    });
    faults.into_result()?;
    let limit = limit.expect("a fault would have been noted");
    let endpoints = match caller.bound_to() {
        None => api.endpoints.list(after, limit).await?,
        Some(bound) => api.endpoints.list_of(bound, after, limit).await?,
    };
    let page = Page::new(endpoints, limit, |last: &Endpoint| last.id.to_string());
    let items = page.items.into_iter().map(|endpoint| view(&api, endpoint)).collect();
    Ok(Json(Page { items, next_cursor: page.next_cursor }))
}

/// A config, with the time limit that applies in this process.
fn view(api: &Api, endpoint: Endpoint) -> ConfigView {
    ConfigView::new(endpoint, api.endpoints.timeout_max())
}

/// A config that the caller does not reach is answered like one that does not exist.
fn check_reach(caller: &Caller, id: EndpointId) -> Result<(), ApiError> {
    if caller.reaches(id) { Ok(()) } else { Err(EndpointError::Unknown(id).into()) }
}

/// A config's id in a path.
pub struct ConfigId(EndpointId);

impl std::str::FromStr for ConfigId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let number = text.parse().map_err(|_| ())?;
        EndpointId::parse("id", number).map(Self).map_err(|_| ())
    }
}

/// Show a config.
#[utoipa::path(get, path = "/api/webhooks/{id}", operation_id = "show_config", tag = TAG,
    params(("id" = i64, Path, minimum = 1)), responses(
    (status = 200, description = "The config", body = ConfigView),
    (status = 404, description = "No such config"),
))]
pub async fn show(
    State(api): State<Api>,
    Admitted(caller): Admitted,
    ApiPath(ConfigId(id)): ApiPath<ConfigId>,
) -> Result<Json<ConfigView>, ApiError> {
    check_reach(&caller, id)?;
    Ok(Json(view(&api, api.endpoints.show(id).await?)))
}

/// Change the fields of a config that the body contains.
///
/// Deliveries that were accepted before keep their URL. `null` removes a URL.
#[utoipa::path(patch, path = "/api/webhooks/{id}", operation_id = "change_config", tag = TAG,
    params(("id" = i64, Path, minimum = 1)), request_body = ConfigBody, responses(
    (status = 200, description = "Changed", body = ConfigView),
    (status = 404, description = "No such config"),
    BodyProblems,
))]
pub async fn change(
    State(api): State<Api>,
    ByOperator(by): ByOperator,
    ApiPath(ConfigId(id)): ApiPath<ConfigId>,
    ApiJson(parts): ApiJson<EndpointParts>,
) -> Result<Json<ConfigView>, ApiError> {
    Ok(Json(view(&api, api.endpoints.change(id, parts, &by).await?)))
}

/// Probe a config's open circuit now.
///
/// Sends the delivery that has waited longest, preferably one that has used up no attempt. If the receiver is still failing,
/// no attempt is used up.
#[utoipa::path(post, path = "/api/webhooks/{id}/probe", operation_id = "probe_config", tag = TAG,
    params(("id" = i64, Path, minimum = 1)), responses(
    (status = 200, description = "The probe is due now", body = ConfigView),
    (status = 404, description = "No such config"),
    (status = 409, description = "Its circuit is not open by failures, or it is paused"),
))]
pub async fn probe(
    State(api): State<Api>,
    Admitted(caller): Admitted,
    ByOperator(by): ByOperator,
    ApiPath(ConfigId(id)): ApiPath<ConfigId>,
) -> Result<Json<ConfigView>, ApiError> {
    check_reach(&caller, id)?;
    Ok(Json(view(&api, api.endpoints.probe(id, &by).await?)))
}

/// Delete a config.
///
/// Nothing is accepted for it any more, and its open deliveries are cancelled within seconds. What was delivered stays
/// in the audit.
#[utoipa::path(delete, path = "/api/webhooks/{id}", operation_id = "delete_config", tag = TAG,
    params(("id" = i64, Path, minimum = 1)), responses(
    (status = 204, description = "Deleted"),
    (status = 404, description = "No such config"),
))]
pub async fn delete(
    State(api): State<Api>,
    ByOperator(by): ByOperator,
    ApiPath(ConfigId(id)): ApiPath<ConfigId>,
) -> Result<StatusCode, ApiError> {
    api.endpoints.delete(id, &by).await?;
    Ok(StatusCode::NO_CONTENT)
}
