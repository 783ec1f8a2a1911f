//! The endpoints that enqueues and attempts need, remembered between calls.
//!
//! A remembered endpoint may be old; that is safe because both users check its revision: the store refuses a delivery
//! that was made from an old one, and a claim tells the revision that it was judged by.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use quick_cache::sync::Cache;
use tokio::sync::Semaphore;

use super::ports::{EndpointStore, StoreError};
use crate::domain::endpoint::{Endpoint, EndpointId};

/// How many endpoints are remembered; about 1 KiB each.
const REMEMBERED_MAX: usize = 25_000;
/// How many are looked up at a time: a thousand events for one new endpoint must not take all connections.
const LOOKUPS_AT_ONCE: usize = 4;

/// Looks endpoints up.
pub struct EndpointDirectory {
    store: Arc<dyn EndpointStore>,
    remembered: Cache<EndpointId, Arc<Endpoint>>,
    lookups: Semaphore,
}

impl EndpointDirectory {
    /// A directory of what `store` keeps.
    pub fn new(store: Arc<dyn EndpointStore>) -> Self {
        Self { store, remembered: Cache::new(REMEMBERED_MAX), lookups: Semaphore::new(LOOKUPS_AT_ONCE) }
    }

    /// The endpoint as it was when it was last looked up, or now.
    pub async fn recent(&self, id: EndpointId) -> Result<Option<Arc<Endpoint>>, StoreError> {
        match self.remembered.get(&id) {
            Some(endpoint) => Ok(Some(endpoint)),
            None => self.other_than(id, None).await,
        }
    }

    /// The endpoint at another revision than `seen`, if there is one; else as it is.
    pub async fn other_than(
        &self,
        id: EndpointId,
        seen: Option<DateTime<Utc>>,
    ) -> Result<Option<Arc<Endpoint>>, StoreError> {
        let _turn = self.lookups.acquire().await.expect("the semaphore is never closed");
        match self.remembered.get(&id) {
            // someone else looked it up in the meantime
            Some(endpoint) if Some(endpoint.updated_at) != seen => Ok(Some(endpoint)),
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
            remembered => self.other_than(id, remembered.map(|endpoint| endpoint.updated_at)).await,
        }
    }

    /// The endpoint as it is now.
    pub async fn current(&self, id: EndpointId) -> Result<Option<Arc<Endpoint>>, StoreError> {
        let Some(endpoint) = self.store.find(id).await?.map(Arc::new) else { return Ok(None) };
        self.remembered.insert(id, endpoint.clone());
        Ok(Some(endpoint))
    }
}
