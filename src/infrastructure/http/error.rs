//! One error type for the whole API, answered as `application/problem+json` (RFC 9457).

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tracing::{error, warn};
use utoipa::ToSchema;

use crate::application::access::AccessError;
use crate::application::enqueue::EnqueueError;
use crate::application::manage_deliveries::DeliveryError;
use crate::application::manage_endpoints::EndpointError;
use crate::application::ports::StoreError;
use crate::contract::json::Unreadable;
use crate::domain::invalid::{FieldError, Invalid};

pub(super) const PROBLEM_JSON: &str = "application/problem+json";
/// After how many seconds a caller should try again.
const RETRY_AFTER_SECONDS: &str = "2";

/// An error, as the API answers it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Problem {
    /// Always `about:blank`: the status says what kind of problem it is.
    #[serde(rename = "type")]
    #[schema(example = "about:blank")]
    kind: &'static str,
    /// The status in words.
    #[schema(example = "Unprocessable Entity")]
    title: Cow<'static, str>,
    /// The HTTP status.
    #[schema(example = 422)]
    status: u16,
    /// What happened, in a sentence.
    detail: String,
    /// The fields at fault, if any are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<FieldProblem>,
}

/// A field at fault.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct FieldProblem {
    /// Its path.
    #[schema(example = "url_params.amount")]
    field: String,
    /// What was expected.
    #[schema(example = "must be a string, a number, a boolean or null")]
    message: String,
}

/// Why a request failed.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    detail: String,
    errors: Vec<FieldProblem>,
    /// A header that belongs to the status.
    header: Option<Box<(HeaderName, HeaderValue)>>,
}

impl ApiError {
    fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), errors: vec![], header: None }
    }

    pub(super) fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// A 401. `challenge` says how to present a key (RFC 6750).
    pub(super) fn unauthorized(detail: &str, challenge: &'static str) -> Self {
        let header = (header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        Self { header: Some(Box::new(header)), ..Self::new(StatusCode::UNAUTHORIZED, detail) }
    }

    pub(super) fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, detail)
    }

    /// A 403 for one field.
    pub(super) fn forbidden_field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { status: StatusCode::FORBIDDEN, ..Self::field(field, message) }
    }

    /// A 429; the caller may try again after `wait`.
    pub(super) fn too_many_requests(detail: &str, wait: Duration) -> Self {
        let seconds = wait.as_secs() + 1;
        let header = (header::RETRY_AFTER, HeaderValue::from(seconds));
        Self { header: Some(Box::new(header)), ..Self::new(StatusCode::TOO_MANY_REQUESTS, detail) }
    }

    pub(super) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    pub(super) fn method_not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "this route does not support the method")
    }

    pub(super) fn too_slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")
    }

    pub(super) fn too_large(bytes_max: usize) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body must have at most {bytes_max} bytes"))
    }

    pub(super) fn too_many(items_max: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("an array must have at most {items_max} events; a stream of lines may have more"),
        )
    }

    pub(super) fn unsupported_media_type(expected: &str) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, format!("the content type must be {expected}"))
    }

    pub(super) fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, detail)
    }

    /// Says nothing about the cause, which is in the log under the request's id.
    pub(super) fn unexpected() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "something went wrong; the log has details under this answer's x-request-id",
        )
    }

    /// A 422 for one field.
    pub(super) fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Invalid::field(field, message).into()
    }

    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    pub(super) fn problem(&self) -> Problem {
        Problem {
            kind: "about:blank",
            title: self.status.canonical_reason().unwrap_or("Error").into(),
            status: self.status.as_u16(),
            detail: self.detail.clone(),
            errors: self.errors.clone(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self.problem()).expect("a problem is plain data");
        let mut response = (self.status, [(header::CONTENT_TYPE, PROBLEM_JSON)], body).into_response();
        if let Some((name, value)) = self.header.map(|header| *header) {
            response.headers_mut().insert(name, value);
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECONDS));
        }
        response
    }
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> Self {
        let errors = invalid.errors().iter().map(|FieldError { field, message }| FieldProblem {
            field: field.clone(),
            message: message.clone(),
        });
        Self {
            status: StatusCode::UNPROCESSABLE_ENTITY,
            detail: invalid.to_string(),
            errors: errors.collect(),
            header: None,
        }
    }
}

impl From<Unreadable> for ApiError {
    fn from(error: Unreadable) -> Self {
        match error {
            Unreadable::NotJson(_) => Self::bad_request(error.to_string()),
            Unreadable::Invalid(invalid) => invalid.into(),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => {
                if is_first_of_this_second() {
                    warn!(error = error.report(), "the database is unavailable");
                }
                Self::unavailable("the database is unavailable; try again")
            }
            StoreError::InDoubt(_) => {
                if is_first_of_this_second() {
                    warn!(error = error.report(), "the database did not answer in time");
                }
                Self::unavailable(
                    "the database did not answer in time; the change may have been made all the same, so check, or send the event again with its event_id",
                )
            }
            StoreError::Refused(_) | StoreError::Unexpected(_) => {
                error!(error = error.report(), "the database refused");
                Self::unexpected()
            }
        }
    }
}

/// Limits log lines to one per second, so that an outage under load does not fill the log.
fn is_first_of_this_second() -> bool {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    LAST.swap(now, Ordering::Relaxed) != now
}

impl From<EnqueueError> for ApiError {
    fn from(error: EnqueueError) -> Self {
        match error {
            EnqueueError::UnknownEndpoint(_) => Self::field("config_id", error.to_string()),
            EnqueueError::Invalid(invalid) => invalid.into(),
            EnqueueError::Cancelled(_) => Self::new(StatusCode::CONFLICT, error.to_string()),
            EnqueueError::Overloaded => {
                Self::unavailable("too many events are waiting to be stored; try again")
            }
            EnqueueError::TimedOut => Self::unavailable(
                "the event could not be stored in time; it may be stored all the same, so send it again with its event_id",
            ),
            EnqueueError::Store(error) => error.into(),
        }
    }
}

impl From<AccessError> for ApiError {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Unknown(_) => Self::not_found(error.to_string()),
            AccessError::Invalid(invalid) => invalid.into(),
            AccessError::Store(error) => error.into(),
        }
    }
}

impl From<DeliveryError> for ApiError {
    fn from(error: DeliveryError) -> Self {
        match error {
            DeliveryError::Unknown(_) => Self::not_found(error.to_string()),
            DeliveryError::Conflict(reason) => Self::new(StatusCode::CONFLICT, reason),
            DeliveryError::Enqueue(error) => error.into(),
            DeliveryError::Store(error) => error.into(),
        }
    }
}

impl From<EndpointError> for ApiError {
    fn from(error: EndpointError) -> Self {
        match error {
            EndpointError::Unknown(_) => Self::not_found(error.to_string()),
            EndpointError::Invalid(invalid) => invalid.into(),
            EndpointError::Contended(_) | EndpointError::Conflict(_) => {
                Self::new(StatusCode::CONFLICT, error.to_string())
            }
            EndpointError::Store(error) => error.into(),
        }
    }
}
