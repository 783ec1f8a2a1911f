//! Slots that are kept for deliveries while these are being stored.
//!
//! A delivery that has one is stored under a lease. It is attempted as soon as it is committed, without a claim.

use std::sync::Arc;
use std::time::Instant;

use chrono::{DateTime, Utc};

use super::WorkerPool;
use super::ledger::Entry;
use super::slots::Slot;
use crate::application::ports::WantedLease;
use crate::domain::delivery::{Lease, NewDelivery};

/// A worker's slot with an entry in the ledger. Dropping it frees both.
pub struct Reservation {
    workers: Arc<WorkerPool>,
    slot: Slot,
    entry: Entry,
}

impl Reservation {
    /// Keeps a slot for a delivery, unless its endpoint has no room or other deliveries may wait that should go first.
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

    /// The lease to store the delivery under.
    pub fn lease(&self) -> WantedLease<'_> {
        WantedLease { worker_id: self.slot.worker(), term: self.workers.lease_term() }
    }

    /// Attempts the delivery. `locked_at` is when its lease began, by the database's clock; `begun` is when the enqueue began.
    pub fn attempt(self, delivery: &NewDelivery, locked_at: DateTime<Utc>, begun: Instant) {
        let Self { workers, slot, entry } = self;
        let lease = Lease { worker_id: slot.worker().clone(), locked_at };
        tokio::spawn(workers.attempt(delivery.leased(lease, begun), false, slot, entry));
    }
}
