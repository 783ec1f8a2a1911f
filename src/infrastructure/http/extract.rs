//! Reads bodies, queries and path parameters within limits, and reports errors by field.

use std::str::FromStr;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::error::ApiError;
use crate::contract::json::parse_object;

/// The largest JSON body of a single item.
pub const BODY_BYTES_MAX: usize = 64 * 1024;
/// How long a body may take to arrive.
const BODY_TIME_MAX: Duration = Duration::from_secs(10);

/// A JSON body of at most [`BODY_BYTES_MAX`].
pub struct ApiJson<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        if !has_media_type(&parts, "application/json") {
            return Err(ApiError::unsupported_media_type("application/json"));
        }
        let bytes = read_body(body, BODY_BYTES_MAX).await?;
        Ok(Self(parse_object(&bytes)?))
    }
}

/// A JSON body that may be left out.
pub struct OptionalApiJson<T>(pub Option<T>);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for OptionalApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let bytes = read_body(body, BODY_BYTES_MAX).await?;
        if bytes.is_empty() {
            return Ok(Self(None));
        }
        if !has_media_type(&parts, "application/json") {
            return Err(ApiError::unsupported_media_type("application/json"));
        }
        Ok(Self(Some(parse_object(&bytes)?)))
    }
}

/// Whether the content type is `expected`, with any parameters.
pub fn has_media_type(parts: &Parts, expected: &str) -> bool {
    let content_type =
        parts.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    content_type.split(';').next().is_some_and(|media_type| media_type.trim().eq_ignore_ascii_case(expected))
}

/// Reads a whole body of at most `bytes_max`, within the time limit.
pub async fn read_body(body: Body, bytes_max: usize) -> Result<Bytes, ApiError> {
    match timeout(BODY_TIME_MAX, Limited::new(body, bytes_max).collect()).await {
        Err(_) => Err(ApiError::too_slow()),
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::too_large(bytes_max)),
        Ok(Err(_)) => Err(ApiError::bad_request("the body broke off")),
    }
}

/// Query parameters. Unknown ones are refused: a misspelt filter would otherwise select everything.
pub struct ApiQuery<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for ApiQuery<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let query = axum::extract::Query::<T>::try_from_uri(&parts.uri);
        query.map(|query| Self(query.0)).map_err(|rejection| {
            use std::error::Error as _;
            let cause = rejection.source().map_or_else(|| rejection.to_string(), ToString::to_string);
            match cause.split_once(": ") {
                Some((name, message)) => ApiError::field(name, query_fault(message)),
                None => ApiError::field(cause.split('`').nth(1).unwrap_or("query"), &cause),
            }
        })
    }
}

/// The fault of a parameter in words for callers: the parser's words about numbers are Rust's.
fn query_fault(message: &str) -> &str {
    let is_about_a_number = ["invalid digit", "number too", "cannot parse integer"]
        .iter()
        .any(|start| message.starts_with(start));
    if is_about_a_number { "must be a whole number" } else { message }
}

/// A path parameter. A malformed one is answered like an unknown one.
pub struct ApiPath<T>(pub T);

impl<T: FromStr + Send, S: Send + Sync> FromRequestParts<S> for ApiPath<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let parsed = path.ok().and_then(|Path(text)| text.parse().ok());
        parsed.map(Self).ok_or_else(|| ApiError::not_found("nothing has this id"))
    }
}
