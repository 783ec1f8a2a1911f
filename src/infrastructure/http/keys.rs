//! `/api/keys`: who may use the API, and what for.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};

use super::Api;
use super::access::{Admitted, ByOperator};
use super::docs::BodyProblems;
use super::error::ApiError;
use super::extract::{ApiJson, ApiPath};
use crate::contract::Page;
use crate::contract::keys::{CreatedKeyView, KeyView, NewKeyBody};
use crate::domain::access::{Caller, KeyId, NewKey, Scope, Secret};

const TAG: &str = "keys";

/// Make an API key.
///
/// The answer holds its text, which is not stored and cannot be shown again. A key cannot make one that may do more.
#[utoipa::path(post, path = "/api/keys", operation_id = "create_key", tag = TAG, request_body = NewKeyBody, responses(
    (status = 201, description = "Made; `token` is shown this once", body = CreatedKeyView),
    BodyProblems,
))]
pub async fn create(
    State(api): State<Api>,
    Admitted(caller): Admitted,
    ByOperator(by): ByOperator,
    ApiJson(body): ApiJson<NewKeyBody>,
) -> Result<Response, ApiError> {
    let key = NewKey::try_from(body)?;
    check_no_more(&caller, &key)?;
    let secret = Secret::draw(&mut rand::rng());
    let (key, token) = api.access.create(key, secret, &by).await?;
    let headers = [(header::CACHE_CONTROL, "no-store")];
    Ok((StatusCode::CREATED, headers, Json(CreatedKeyView::new(key, &token))).into_response())
}

/// Refuses a key that may do what its maker may not.
fn check_no_more(caller: &Caller, key: &NewKey) -> Result<(), ApiError> {
    match key.scopes.iter().find(|scope: &Scope| !caller.may(*scope)) {
        None => Ok(()),
        Some(scope) => Err(ApiError::forbidden_field(
            "scopes",
            format!("must not include {scope}, which the key that asks lacks"),
        )),
    }
}

/// List API keys, including revoked ones, oldest first.
#[utoipa::path(get, path = "/api/keys", operation_id = "list_keys", tag = TAG, responses(
    (status = 200, description = "All keys, without their texts", body = Page<KeyView>),
))]
pub async fn list(State(api): State<Api>) -> Result<Json<Page<KeyView>>, ApiError> {
    let items = api.access.list().await?.into_iter().map(KeyView::from).collect();
    Ok(Json(Page { items, next_cursor: None }))
}

/// Revoke an API key.
///
/// This process refuses it at once, others within a second.
#[utoipa::path(delete, path = "/api/keys/{id}", operation_id = "revoke_key", tag = TAG,
    params(("id" = i64, Path, minimum = 1)), responses(
    (status = 204, description = "Revoked"),
    (status = 404, description = "No such key, or it was revoked before"),
))]
pub async fn revoke(
    State(api): State<Api>,
    ByOperator(by): ByOperator,
    ApiPath(id): ApiPath<KeyId>,
) -> Result<StatusCode, ApiError> {
    api.access.revoke(id, &by).await?;
    Ok(StatusCode::NO_CONTENT)
}
