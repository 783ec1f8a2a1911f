//! Slots that are kept for deliveries while these are stored: a delivery that has one is stored under a lease, and is
//! attempted as soon as it is committed, without a claim.

use std::sync::Arc;
use std::time::Instant;

use chrono::{DateTime, Utc};

use super::WorkerPool;
use super::ledger::Entry;
use super::slots::Slot;
use crate::application::ports::WantedLease;
use crate::domain::delivery::{Lease, NewDelivery};

/// A worker's slot, and an entry in the ledger. Both are free again once this is dropped.
pub struct Reservation {
    workers: Arc<WorkerPool>,
    slot: Slot,
    entry: Entry,
}

impl Reservation {
    /// Keeps a slot for a delivery, unless others may wait that should go first, or its endpoint has no room.
    pub fn of(workers: &Arc<WorkerPool>, delivery: &NewDelivery) -> Option<Self> {
        if !delivery.due_at_once {
            return None;
        }
        let entry = workers.ledger.take_for_new(delivery.config_id)?;
        let Some(mut slot) = workers.slots.try_take() else {
            workers.ledger.hold_back(delivery.config_id);
            return None;
        };
        slot.hold(delivery.queue_id);
        Some(Self { workers: workers.clone(), slot, entry })
    }

    /// The lease that the delivery should be stored under.
    pub fn lease(&self) -> WantedLease<'_> {
        WantedLease { worker_id: self.slot.worker(), term: self.workers.lease_term() }
    }

    /// Attempts the delivery, which was stored under a lease from `locked_at` on by an enqueue that began at `begun`.
    pub fn attempt(self, delivery: &NewDelivery, locked_at: DateTime<Utc>, begun: Instant) {
        let Self { workers, slot, entry } = self;
        let lease = Lease { worker_id: slot.worker().clone(), locked_at };
        tokio::spawn(workers.attempt(delivery.leased(lease, begun), false, slot, entry));
    }
}
