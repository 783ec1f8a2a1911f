//! `/webhooks`: events in, deliveries out.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use chrono::{DateTime, Utc};
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::access::{Admitted, ByOperator};
use super::docs::BodyProblems;
use super::error::ApiError;
use super::extract::{ApiJson, ApiPath, ApiQuery, OptionalApiJson};
use crate::application::manage_deliveries::{DeliveryError, Replay};
use crate::application::ports::{DeliveryFilter, StatisticsScope};
use crate::contract::deliveries::DeliveryView;
use crate::contract::events::{EventBody, ReceiptView};
use crate::contract::statistics::{StatisticsView, parse_window};
use crate::contract::{Page, schemas};
use crate::domain::delivery::{Delivery, DeliveryStatus, QueueId};
use crate::domain::endpoint::EndpointId;
use crate::domain::event::{EventType, parse_time};
use crate::domain::invalid::{Faults, Invalid};
use crate::domain::replay::ReplayTarget;

const TAG: &str = "webhooks";
/// Items per page by default.
const PAGE_DEFAULT: i64 = 50;
pub(super) const PAGE_MAX: i64 = 200;

/// Accept an event.
///
/// Answers only after the event is committed. A request can be repeated safely with the same `event_id`; without one, a
/// repetition is a second event.
#[utoipa::path(post, path = "/webhooks", operation_id = "enqueue", tag = TAG, request_body = EventBody, responses(
    (status = 201, description = "Accepted", body = ReceiptView),
    (status = 200, description = "The same event was accepted before", body = ReceiptView),
    BodyProblems,
    (status = 503, description = "The event cannot be stored now; see Retry-After"),
))]
pub async fn enqueue(
    State(api): State<Api>,
    caller: Admitted,
    headers: HeaderMap,
    ApiJson(body): ApiJson<EventBody>,
) -> Result<Response, ApiError> {
    let event = body.into_event(traceparent(&headers))?;
    caller.check_config(event.config_id())?;
    let receipt = api.enqueue.accept(&event).await?;
    let location = [(header::LOCATION, format!("/webhooks/{}", receipt.queue_id))];
    if let Some(stored) = receipt.stored {
        return Ok((StatusCode::CREATED, location, Json(ReceiptView::from(Arc::unwrap_or_clone(stored))))
            .into_response());
    }
    let first = api.deliveries.show_first(receipt.queue_id).await?;
    Ok((StatusCode::OK, location, Json(ReceiptView::duplicate_of(first))).into_response())
}

/// The caller's trace, which is sent with the attempts.
pub(super) fn traceparent(headers: &HeaderMap) -> Option<String> {
    headers.get("traceparent").and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// Show a delivery with its attempts.
#[utoipa::path(get, path = "/webhooks/{queue_id}", operation_id = "show_delivery", tag = TAG,
    params(("queue_id" = uuid::Uuid, Path)), responses(
    (status = 200, description = "The delivery", body = DeliveryView),
    (status = 404, description = "No such delivery"),
))]
pub async fn show(
    State(api): State<Api>,
    caller: Admitted,
    ApiPath(queue_id): ApiPath<QueueId>,
) -> Result<Json<DeliveryView>, ApiError> {
    Ok(Json(within_reach(&api, &caller, queue_id).await?.into()))
}

/// A delivery, if its config is one that the caller reaches. If not, the answer is that of a delivery that does not exist.
async fn within_reach(api: &Api, caller: &Admitted, queue_id: QueueId) -> Result<Delivery, ApiError> {
    let delivery = api.deliveries.show(queue_id).await?;
    if caller.0.reaches(delivery.config_id) {
        Ok(delivery)
    } else {
        Err(DeliveryError::Unknown(queue_id).into())
    }
}

/// Fails like [`within_reach`]. Callers that reach all configs cost nothing.
async fn check_reach(api: &Api, caller: &Admitted, queue_id: QueueId) -> Result<(), ApiError> {
    match caller.0.bound_to() {
        None => Ok(()),
        Some(_) => within_reach(api, caller, queue_id).await.map(drop),
    }
}

/// Which deliveries to list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    #[param(schema_with = schemas::status_filter)]
    status: Option<String>,
    /// Only deliveries to this config.
    #[param(minimum = 1)]
    config_id: Option<i64>,
    #[param(schema_with = schemas::event_type_filter)]
    event_type: Option<String>,
    /// Only deliveries of this event.
    #[param(pattern = r"^[^\u0000]*$")]
    event_id: Option<String>,
    /// Accepted at this time or later (RFC 3339). Write the plus of a time zone as `%2B`.
    #[param(format = DateTime, pattern = "^(19[7-9][0-9]|[2-9][0-9]{3})-", example = "2026-01-31T12:00:00Z")]
    from: Option<String>,
    /// Accepted before this time (RFC 3339).
    #[param(format = DateTime, pattern = "^(19[7-9][0-9]|[2-9][0-9]{3})-", example = "2026-02-01T12:00:00Z")]
    to: Option<String>,
    /// `next_cursor` of the previous page.
    #[param(format = Uuid)]
    cursor: Option<String>,
    /// Items per page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<i64>,
}

impl ListQuery {
    fn filter(self) -> Result<(DeliveryFilter, usize), Invalid> {
        let mut faults = Faults::default();
        let limit = faults.note(page_size(self.limit));
        let filter = DeliveryFilter {
            status: self.status.and_then(|text| faults.note(text.parse::<DeliveryStatus>())),
            config_id: self.config_id.and_then(|number| faults.note(EndpointId::parse("config_id", number))),
            // a plus that the caller did not encode arrives as a space
            event_type: self
                .event_type
                .and_then(|text| faults.note(text.replace(' ', "+").parse::<EventType>())),
            event_id: self.event_id.and_then(|text| {
                let plain = if text.contains('\0') {
                    Err(Invalid::field("event_id", "must not contain NUL characters"))
                } else {
                    Ok(text)
                };
                faults.note(plain)
            }),
            from: self.from.and_then(|text| faults.note(query_time("from", &text))),
            to: self.to.and_then(|text| faults.note(query_time("to", &text))),
            before: self.cursor.and_then(|text| {
                let parsed = text.parse::<QueueId>();
                faults
                    .note(parsed.map_err(|_| Invalid::field("cursor", "must be a next_cursor of this list")))
            }),
        };
        faults.into_result()?;
        Ok((filter, limit.expect("a fault would have been noted")))
    }
}

/// A time in a query. The plus of its time zone arrives as a space, unless it was written `%2B`.
fn query_time(field: &str, text: &str) -> Result<DateTime<Utc>, Invalid> {
    match text.rsplit_once(' ') {
        Some((time, zone)) if time.contains([':']) => parse_time(field, &format!("{time}+{zone}")),
        Some(_) | None => parse_time(field, text),
    }
}

/// The number of items per page that a query asks for.
pub(super) fn page_size(limit: Option<i64>) -> Result<usize, Invalid> {
    match limit.unwrap_or(PAGE_DEFAULT) {
        limit @ 1..=PAGE_MAX => Ok(usize::try_from(limit).expect("it is between 1 and 200")),
        _ => Err(Invalid::field("limit", format!("must be from 1 to {PAGE_MAX}"))),
    }
}

/// List deliveries, newest first.
#[utoipa::path(get, path = "/webhooks", operation_id = "list_deliveries", tag = TAG, params(ListQuery), responses(
    (status = 200, description = "A page of deliveries", body = Page<DeliveryView>),
    (status = 422, description = "A filter is at fault"),
))]
pub async fn list(
    State(api): State<Api>,
    caller: Admitted,
    ApiQuery(query): ApiQuery<ListQuery>,
) -> Result<Json<Page<DeliveryView>>, ApiError> {
    let (mut filter, limit) = query.filter()?;
    filter.config_id = caller.config_of(filter.config_id)?;
    let deliveries = api.deliveries.list(&filter, limit).await?;
    Ok(Json(Page::new(deliveries, limit, |last| last.queue_id.to_string())))
}

/// What to count.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct StatisticsQuery {
    /// Count terminal deliveries of this period, such as `1h` or `7d`; without it, all that are kept. The period begins on a
    /// whole minute; above 3 hours on a whole hour, above 3 days on a whole day (UTC). `from` of the answer shows when.
    #[param(pattern = "^[1-9][0-9]{0,2}(m|h|d|w)$", example = "1h")]
    window: Option<String>,
    /// Count only this config's deliveries.
    #[param(minimum = 1)]
    config_id: Option<i64>,
}

/// Count deliveries and attempts: exactly, and within milliseconds even with a long history.
#[utoipa::path(get, path = "/webhooks/stats", operation_id = "count", tag = TAG, params(StatisticsQuery), responses(
    (status = 200, description = "The counts", body = StatisticsView),
    (status = 404, description = "No such config"),
    (status = 422, description = "A parameter is at fault"),
))]
pub async fn statistics(
    State(api): State<Api>,
    caller: Admitted,
    ApiQuery(query): ApiQuery<StatisticsQuery>,
) -> Result<Json<StatisticsView>, ApiError> {
    let mut faults = Faults::default();
    let window = query.window.and_then(|text| faults.note(parse_window(&text)));
    let config_id = query.config_id.and_then(|number| faults.note(EndpointId::parse("config_id", number)));
    faults.into_result()?;
    let config_id = caller.config_of(config_id)?;
    if let Some(id) = config_id {
        api.endpoints.ensure_known(id).await?;
    }
    Ok(Json(api.deliveries.statistics(&StatisticsScope { window, config_id }).await?.into()))
}

/// Attempt a waiting delivery now.
#[utoipa::path(post, path = "/webhooks/{queue_id}/retry", operation_id = "retry_delivery", tag = TAG,
    params(("queue_id" = uuid::Uuid, Path)), responses(
    (status = 200, description = "Its next attempt is due now", body = DeliveryView),
    (status = 404, description = "No such delivery"),
    (status = 409, description = "It is not waiting for a later time"),
))]
pub async fn retry(
    State(api): State<Api>,
    caller: Admitted,
    ByOperator(by): ByOperator,
    ApiPath(queue_id): ApiPath<QueueId>,
) -> Result<Json<DeliveryView>, ApiError> {
    check_reach(&api, &caller, queue_id).await?;
    Ok(Json(api.deliveries.retry_now(queue_id, &by).await?.into()))
}

/// Cancel a delivery that is not being attempted.
#[utoipa::path(post, path = "/webhooks/{queue_id}/cancel", operation_id = "cancel_delivery", tag = TAG,
    params(("queue_id" = uuid::Uuid, Path)), responses(
    (status = 200, description = "It is cancelled", body = DeliveryView),
    (status = 404, description = "No such delivery"),
    (status = 409, description = "It is being attempted, or terminal already"),
))]
pub async fn cancel(
    State(api): State<Api>,
    caller: Admitted,
    ByOperator(by): ByOperator,
    ApiPath(queue_id): ApiPath<QueueId>,
) -> Result<Json<DeliveryView>, ApiError> {
    check_reach(&api, &caller, queue_id).await?;
    Ok(Json(api.deliveries.cancel(queue_id, &by).await?.into()))
}

/// Where a replay goes.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReplayBody {
    /// Whether to use the config's current URL instead of the one that was requested. Then a waiting delivery can be replayed,
    /// too: it is cancelled in the same transaction.
    #[serde(default)]
    #[schema(example = false, default = false)]
    current_url: bool,
}

/// Send a terminal delivery again, as a new one that refers to it.
///
/// A delivery is replayed only once, even if this request is repeated; to send it a third time, replay the replay. The body
/// may be left out.
#[utoipa::path(post, path = "/webhooks/{queue_id}/replay", operation_id = "replay_delivery", tag = TAG, params(("queue_id" = uuid::Uuid, Path)),
    request_body = Option<ReplayBody>, responses(
    (status = 201, description = "The new delivery", body = DeliveryView),
    (status = 200, description = "It was replayed before, as this delivery", body = DeliveryView),
    (status = 404, description = "No such delivery"),
    (status = 409, description = "It is still open, or its config was deleted"),
    BodyProblems,
))]
pub async fn replay(
    State(api): State<Api>,
    caller: Admitted,
    ByOperator(by): ByOperator,
    ApiPath(queue_id): ApiPath<QueueId>,
    OptionalApiJson(body): OptionalApiJson<ReplayBody>,
) -> Result<Response, ApiError> {
    check_reach(&api, &caller, queue_id).await?;
    let current_url = body.is_some_and(|body| body.current_url);
    let target = if current_url { ReplayTarget::CurrentUrl } else { ReplayTarget::SameUrl };
    let (status, delivery) = match api.deliveries.replay(queue_id, target, &by).await? {
        Replay::New(delivery) => (StatusCode::CREATED, delivery),
        Replay::Before(delivery) => (StatusCode::OK, delivery),
    };
    let location = [(header::LOCATION, format!("/webhooks/{}", delivery.queue_id))];
    Ok((status, location, Json(DeliveryView::from(delivery))).into_response())
}
