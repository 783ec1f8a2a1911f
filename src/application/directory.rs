//! The endpoints that enqueues and attempts need, remembered between calls.
//!
//! A remembered endpoint may be out of date. That is safe because both users check its revision: the store refuses a
//! delivery that was made from an old revision, and a claim returns the revision that it saw.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use quick_cache::sync::Cache;

use super::batching::{BatchError, Batcher, ProcessBatch};
use super::ports::{EndpointStore, StoreError};
use crate::domain::endpoint::{Endpoint, EndpointId};

/// How many endpoints are remembered; about 1 KiB each.
const REMEMBERED_MAX: usize = 25_000;
/// How many endpoints one query looks up.
const LOOKUPS_MAX: usize = 500;
/// How many lookups may wait.
const WAITING_MAX: usize = 10_000;

pub struct EndpointDirectory {
    remembered: Arc<Cache<EndpointId, Arc<Endpoint>>>,
    /// Batched, so that deliveries to thousands of endpoints do not cost a query each.
    lookups: Batcher<EndpointId, Option<Arc<Endpoint>>>,
}

impl EndpointDirectory {
    pub fn start(store: Arc<dyn EndpointStore>) -> Self {
        let remembered = Arc::new(Cache::new(REMEMBERED_MAX));
        let look_up = LookUp { store, remembered: remembered.clone() };
        Self { remembered, lookups: Batcher::start(look_up, LOOKUPS_MAX, WAITING_MAX) }
    }

    /// The endpoint as it was when it was last looked up, or now.
    pub async fn recent(&self, id: EndpointId) -> Result<Option<Arc<Endpoint>>, StoreError> {
        match self.remembered.get(&id) {
            Some(endpoint) => Ok(Some(endpoint)),
            None => self.current(id).await,
        }
    }

    /// The endpoint at another revision than `seen`. If it has not changed, it is returned as it is.
    pub async fn other_than(
        &self,
        id: EndpointId,
        seen: DateTime<Utc>,
    ) -> Result<Option<Arc<Endpoint>>, StoreError> {
        match self.remembered.get(&id) {
            // someone else looked it up in the meantime
            Some(endpoint) if endpoint.updated_at != seen => Ok(Some(endpoint)),
            Some(_) | None => self.current(id).await,
        }
    }

    /// The endpoint at this revision, or at a newer one if it has changed since.
    pub async fn at(
        &self,
        id: EndpointId,
        revision: DateTime<Utc>,
    ) -> Result<Option<Arc<Endpoint>>, StoreError> {
        match self.remembered.get(&id) {
            Some(endpoint) if endpoint.updated_at >= revision => Ok(Some(endpoint)),
            Some(_) | None => self.current(id).await,
        }
    }

    /// The endpoint as it is now.
    pub async fn current(&self, id: EndpointId) -> Result<Option<Arc<Endpoint>>, StoreError> {
        self.lookups.process_when_room(id, 1).await.map_err(|error| match error {
            BatchError::Store(error) => error,
            BatchError::Full | BatchError::Stopped => {
                StoreError::Unavailable(Arc::new(anyhow::Error::new(error)))
            }
        })
    }
}

struct LookUp {
    store: Arc<dyn EndpointStore>,
    remembered: Arc<Cache<EndpointId, Arc<Endpoint>>>,
}

#[async_trait]
impl ProcessBatch<EndpointId, Option<Arc<Endpoint>>> for LookUp {
    async fn process(&self, ids: &[EndpointId]) -> Result<Vec<Option<Arc<Endpoint>>>, StoreError> {
        let found = self.store.find_all(ids).await?;
        let found: HashMap<EndpointId, Arc<Endpoint>> =
            found.into_iter().map(|endpoint| (endpoint.id, Arc::new(endpoint))).collect();
        for (id, endpoint) in &found {
            self.remembered.insert(*id, endpoint.clone());
        }
        Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
    }
}
