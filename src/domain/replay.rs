//! Replays: deliveries that repeat another one.

use std::sync::Arc;

use super::access::Operator;
use super::delivery::{Delivery, NewDelivery, QueueId};
use super::endpoint::Endpoint;
use super::event::EventType;
use super::invalid::Invalid;
use super::postback_url;
use super::url_params::UrlParams;

/// Where a replay goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplayTarget {
    /// To the URL that the delivery went to.
    SameUrl,
    /// To the present URL of its endpoint, with the parameters of the delivery.
    CurrentUrl,
}

/// Why a delivery cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum CannotReplay {
    /// A field of the delivery was stored by another version of this program, or by hand.
    #[error("the {0} of the delivery is not one of today's")]
    Unreadable(&'static str),
    /// Its endpoint no longer has a URL for it, or the URL becomes too long with its parameters.
    #[error(transparent)]
    NoUrl(#[from] Invalid),
}

impl NewDelivery {
    /// The delivery that repeats `old`, under the present limits of `endpoint`. Its key is the id of `old`.
    pub fn replay(
        queue_id: QueueId,
        old: &Delivery,
        endpoint: &Endpoint,
        target: ReplayTarget,
    ) -> Result<Self, CannotReplay> {
        let event_type: EventType =
            old.event_type.parse().map_err(|_| CannotReplay::Unreadable("event type"))?;
        let webhook_url = match target {
            ReplayTarget::SameUrl => old.webhook_url.clone(),
            ReplayTarget::CurrentUrl => {
                let params: UrlParams = serde_json::from_str(old.url_params.get())
                    .map_err(|_| CannotReplay::Unreadable("parameters"))?;
                postback_url::build(endpoint.url_for(event_type)?, &params)?
            }
        };
        Ok(Self {
            queue_id,
            event_type,
            event_id: old.event_id.clone(),
            named: true,
            config_id: old.config_id,
            config_revision: endpoint.updated_at,
            webhook_url,
            url_params: old.url_params.get().to_owned(),
            priority: old.priority,
            max_retries: endpoint.settings.retry.max_retries(),
            // a scheduled delivery keeps its time until its first attempt
            scheduled_at: old.state.next_retry_at().filter(|_| old.attempts.is_empty()),
            correlation_id: old.correlation_id.clone(),
            traceparent: old.traceparent.clone(),
            replay_of: Some(old.queue_id),
            replayed_by: None,
            due_at_once: endpoint.is_unhindered(),
        })
    }

    /// The same, because `operator` asked for it.
    #[must_use]
    pub fn asked_for_by(self, operator: Arc<Operator>) -> Self {
        Self { replayed_by: Some(operator), ..self }
    }
}
