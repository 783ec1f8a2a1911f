//! Registers, shows, changes and deletes endpoints.

use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::directory::EndpointDirectory;
use super::ports::{Change, CircuitStore, EndpointStore, StoreError};
use super::wakeup::Wakeup;
use crate::domain::access::{Action, Operator};
use crate::domain::circuit::CircuitState;
use crate::domain::egress::Egress;
use crate::domain::endpoint::{Endpoint, EndpointId, EndpointUrl};
use crate::domain::endpoint_settings::{EndpointParts, EndpointSettings};
use crate::domain::invalid::{Faults, Invalid};

/// A change is given up after losing this many races against others.
const RACES_MAX: usize = 5;

/// Why a request about an endpoint was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// There is no such endpoint, or it was deleted.
    #[error("there is no config {0}")]
    Unknown(EndpointId),
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// Every try lost a race against another change.
    #[error("config {0} is being changed by others")]
    Contended(EndpointId),
    /// The circuit's state does not allow it.
    #[error("{0}")]
    Conflict(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

pub struct ManageEndpoints {
    store: Arc<dyn EndpointStore>,
    circuits: Arc<dyn CircuitStore>,
    directory: Arc<EndpointDirectory>,
    egress: Egress,
    timeout_max: Duration,
    wakeup: Arc<Wakeup>,
}

impl ManageEndpoints {
    /// `timeout_max` is the longest time limit that an endpoint may set.
    pub fn new(
        store: Arc<dyn EndpointStore>,
        circuits: Arc<dyn CircuitStore>,
        directory: Arc<EndpointDirectory>,
        egress: Egress,
        timeout_max: Duration,
        wakeup: Arc<Wakeup>,
    ) -> Self {
        Self { store, circuits, directory, egress, timeout_max, wakeup }
    }

    /// The longest time limit that an endpoint may set.
    pub fn timeout_max(&self) -> Duration {
        self.timeout_max
    }

    pub async fn register(&self, parts: EndpointParts, by: &Operator) -> Result<Endpoint, EndpointError> {
        if parts.circuit.state.is_some() {
            return Err(Invalid::field(
                "circuit.state",
                "must not be given: a new config's circuit is closed",
            )
            .into());
        }
        let timeout_ms = parts.timeout_ms;
        let settings = EndpointSettings::parse(parts)?;
        self.check_timeout(timeout_ms)?;
        self.check_urls(&settings.urls().collect::<Vec<_>>())?;
        let change = Change::new(by, Action::RegisterConfig).to(settings.for_the_record());
        Ok(self.store.register(&settings, &change).await?)
    }

    /// One endpoint that is not deleted.
    pub async fn show(&self, id: EndpointId) -> Result<Endpoint, EndpointError> {
        let endpoint = self.store.find(id).await?;
        endpoint.filter(|endpoint| endpoint.deleted_at.is_none()).ok_or(EndpointError::Unknown(id))
    }

    /// Fails if there has never been such an endpoint. A deleted endpoint and its history are still known.
    pub async fn ensure_known(&self, id: EndpointId) -> Result<(), EndpointError> {
        self.store.find(id).await?.map(drop).ok_or(EndpointError::Unknown(id))
    }

    /// At most `limit` endpoints, in the order of their ids, after `after`.
    pub async fn list(
        &self,
        after: Option<EndpointId>,
        limit: usize,
    ) -> Result<Vec<Endpoint>, EndpointError> {
        Ok(self.store.list(after, limit).await?)
    }

    /// The same, of those in `ids`, which are in order.
    pub async fn list_of(
        &self,
        ids: &[EndpointId],
        after: Option<EndpointId>,
        limit: usize,
    ) -> Result<Vec<Endpoint>, EndpointError> {
        let ids: Vec<EndpointId> = ids.iter().copied().filter(|id| Some(*id) > after).collect();
        let mut endpoints = self.store.find_all(&ids).await?;
        endpoints.retain(|endpoint| endpoint.deleted_at.is_none());
        endpoints.sort_unstable_by_key(|endpoint| endpoint.id);
        endpoints.truncate(limit);
        Ok(endpoints)
    }

    /// Changes the settings that `parts` names. Deliveries that were accepted before keep their URL.
    pub async fn change(
        &self,
        id: EndpointId,
        parts: EndpointParts,
        by: &Operator,
    ) -> Result<Endpoint, EndpointError> {
        let command = parts.circuit_command()?;
        for _ in 0..RACES_MAX {
            let current = self.show(id).await?;
            let settings = current.settings.changed(parts.clone())?;
            self.check_timeout(parts.timeout_ms)?;
            self.check_urls(&settings.urls_that_differ(&current.settings))?;
            let change = Change::new(by, Action::ChangeConfig)
                .from(current.settings.for_the_record())
                .to(settings.for_the_record());
            let changed = self.store.change(id, current.updated_at, &settings, command, &change).await?;
            if let Some(changed) = changed {
                self.directory.current(id).await?;
                if let Some(command) = command {
                    info!(config_id = id.get(), state = %changed.circuit.state, ?command, "circuit changed by hand");
                }
                // deliveries may have waited for this change
                self.wakeup.announce();
                return Ok(changed);
            }
        }
        Err(EndpointError::Contended(id))
    }

    /// Deletes an endpoint. Some process cancels its open deliveries soon after.
    pub async fn delete(&self, id: EndpointId, by: &Operator) -> Result<(), EndpointError> {
        let current = self.show(id).await?;
        let change = Change::new(by, Action::DeleteConfig).from(current.settings.for_the_record());
        let deleted = self.store.delete(id, &change).await?;
        self.directory.current(id).await?;
        if deleted { Ok(()) } else { Err(EndpointError::Unknown(id)) }
    }

    /// Makes the probe of a circuit due now. The circuit must be open because of failures; the probe is the next waiting
    /// delivery. Of a paused endpoint nothing is claimed, so it is refused.
    pub async fn probe(&self, id: EndpointId, by: &Operator) -> Result<Endpoint, EndpointError> {
        let refused = |reason| EndpointError::Conflict(format!("config {id} cannot be probed: {reason}"));
        if !self.show(id).await?.settings.enabled {
            return Err(refused("it is paused: enable it first"));
        }
        let probed = self.circuits.probe_now(id, &Change::new(by, Action::ProbeConfig)).await?;
        let endpoint = self.show(id).await?;
        if probed {
            // any process may claim the delivery
            self.wakeup.announce();
            return Ok(endpoint);
        }
        let reason = match endpoint.circuit.state {
            CircuitState::Closed => "its circuit is closed: deliveries are attempted anyway",
            CircuitState::HalfOpen => "a probe is under way",
            CircuitState::Open => "its circuit was opened by hand: close it by hand",
        };
        Err(refused(reason))
    }

    /// Refuses a limit above `timeout_max`, which would be cut down to it.
    fn check_timeout(&self, timeout_ms: Option<i64>) -> Result<(), Invalid> {
        let limit_ms = i64::try_from(self.timeout_max.as_millis()).unwrap_or(i64::MAX);
        match timeout_ms {
            Some(given) if given > limit_ms => Err(Invalid::field(
                "timeout_ms",
                format!("must be at most {limit_ms}, since HTTP_TIMEOUT is {:?}", self.timeout_max),
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// Refuses URLs that the sender would refuse. Host names are checked at each attempt.
    fn check_urls(&self, urls: &[(&'static str, &EndpointUrl)]) -> Result<(), Invalid> {
        let mut faults = Faults::default();
        for (field, url) in urls {
            if let Err(forbidden) = self.egress.check(url.url()) {
                faults.push(*field, forbidden.to_string());
            }
        }
        faults.into_result()
    }
}
