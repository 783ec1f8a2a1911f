//! The slots of a process. Each slot lets a worker hold one lease.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::domain::delivery::{QueueId, WorkerId};

/// How long a claim waits for more free slots if more deliveries wait than fit.
const REFILL_WAIT: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub struct Slots {
    state: Mutex<State>,
    /// At most as many permits as there are free slots.
    permits: Arc<Semaphore>,
    total: usize,
}

#[derive(Debug)]
struct State {
    /// The workers' names. A worker's number is its index.
    workers: Vec<WorkerId>,
    /// For each free slot, the number of its worker.
    free: Vec<usize>,
    /// How many slots are in use per delivery. There may be two: a delivery can be claimed again just before its slot is free.
    held: HashMap<QueueId, usize>,
    /// Deliveries whose outcome could not be written, each with the end of its lease.
    unsettled: Vec<(QueueId, Instant)>,
}

/// A worker's right to hold one more lease. Dropping it frees the slot.
#[derive(Debug)]
pub struct Slot {
    number: usize,
    worker: WorkerId,
    delivery: Option<QueueId>,
    slots: Arc<Slots>,
    /// Dropped after the slot's own `drop` has returned the worker, so that a permit always finds one.
    _permit: OwnedSemaphorePermit,
}

impl Slots {
    /// `each` free slots per worker.
    pub fn new(workers: &[WorkerId], each: usize) -> Arc<Self> {
        // workers take turns, so that they share the work
        let free: Vec<usize> = (0..workers.len()).cycle().take(workers.len() * each).collect();
        let total = free.len();
        let state = State { workers: workers.to_vec(), free, held: HashMap::new(), unsettled: Vec::new() };
        Arc::new(Self { state: Mutex::new(state), permits: Arc::new(Semaphore::new(total)), total })
    }

    /// Waits for a free slot, then takes all that are free, up to `max`. If `more_waits` than fits, it waits a little for half
    /// of `max`, so that claims stay large.
    pub async fn take(self: &Arc<Self>, max: usize, more_waits: bool) -> Vec<Slot> {
        const OPEN: &str = "the semaphore is never closed";
        let half = u32::try_from(max.div_ceil(2)).expect("settings keep it small");
        let many = self.permits.clone().acquire_many_owned(half);
        let mut permits = match if more_waits { timeout(REFILL_WAIT, many).await.ok() } else { None } {
            Some(permits) => permits.expect(OPEN),
            None => self.permits.clone().acquire_owned().await.expect(OPEN),
        };
        while permits.num_permits() < max
            && let Ok(one_more) = self.permits.clone().try_acquire_owned()
        {
            permits.merge(one_more);
        }
        let mut taken = Vec::with_capacity(permits.num_permits());
        while let Some(permit) = permits.split(1) {
            taken.push(self.slot(permit));
        }
        taken
    }

    /// Takes a free slot, unless none is free or others wait for one.
    pub fn try_take(self: &Arc<Self>) -> Option<Slot> {
        Some(self.slot(self.permits.clone().try_acquire_owned().ok()?))
    }

    /// Waits until all slots are free and takes them for good.
    pub async fn close(&self) {
        let total = u32::try_from(self.total).expect("settings keep it small");
        self.permits.acquire_many(total).await.expect("the semaphore is never closed").forget();
    }

    /// Gives the workers new names and returns the old ones. Slots in use keep the old names until they are free. So a lease
    /// under an old name that is not in [`Slots::held`] is used by nobody.
    pub fn rename(&self, workers: Vec<WorkerId>) -> Vec<WorkerId> {
        std::mem::replace(&mut self.state().workers, workers)
    }

    pub fn first_worker(&self) -> Option<WorkerId> {
        self.state().workers.first().cloned()
    }

    /// The deliveries whose leases are in use, or were left to expire.
    pub fn held(&self) -> Vec<QueueId> {
        let (mut state, now) = (self.state(), Instant::now());
        state.unsettled.retain(|(_, until)| *until > now);
        state.held.keys().copied().chain(state.unsettled.iter().map(|(delivery, _)| *delivery)).collect()
    }

    fn slot(self: &Arc<Self>, permit: OwnedSemaphorePermit) -> Slot {
        let mut state = self.state();
        let number = state.free.pop().expect("there is a free slot for each permit");
        let worker = state.workers[number].clone();
        Slot { number, worker, delivery: None, slots: self.clone(), _permit: permit }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // no code panics while it holds this lock
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    /// Notes the delivery that the slot is used for.
    pub fn hold(&mut self, delivery: QueueId) {
        self.delivery = Some(delivery);
        *self.slots.state().held.entry(delivery).or_default() += 1;
    }

    /// Frees the slot but leaves the lease, which lasts `until` its end: the delivery was sent and its outcome could not be
    /// written. If the lease were given back, the delivery would be sent again as if nothing had happened.
    pub fn leave_lease(self, until: Instant) {
        if let Some(delivery) = self.delivery {
            let (mut state, now) = (self.slots.state(), Instant::now());
            state.unsettled.retain(|(_, until)| *until > now);
            state.unsettled.push((delivery, until));
        }
    }

    pub fn worker(&self) -> &WorkerId {
        &self.worker
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.slots.state();
        state.free.push(self.number);
        if let Some(delivery) = self.delivery {
            let count = state.held.get_mut(&delivery).expect("a slot that holds it has counted it");
            *count -= 1;
            if *count == 0 {
                state.held.remove(&delivery);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workers() -> Vec<WorkerId> {
        (1..=3).map(|number| WorkerId::new("test", 0, 0, number)).collect()
    }

    #[tokio::test]
    async fn no_worker_ever_has_more_than_its_slots() {
        let slots = Slots::new(&workers(), 4);
        let first = slots.take(8, false).await;
        let second = slots.take(8, false).await;
        assert_eq!((first.len(), second.len()), (8, 4));
        drop(first);
        let third = slots.take(100, false).await;
        for worker in workers() {
            let held = second.iter().chain(&third).filter(|slot| *slot.worker() == worker).count();
            assert_eq!(held, 4);
        }
    }

    #[tokio::test]
    async fn new_names_are_for_slots_that_are_taken_later_and_what_the_others_hold_is_known() {
        let slots = Slots::new(&workers(), 1);
        let mut held = slots.try_take().unwrap();
        let delivery = QueueId::new(uuid::Uuid::now_v7());
        held.hold(delivery);
        let renamed: Vec<_> = (1..=3).map(|number| WorkerId::new("test", 0, 1, number)).collect();

        assert_eq!(slots.rename(renamed.clone()), workers());

        assert!(workers().contains(held.worker()));
        assert_eq!(slots.held(), [delivery]);
        let mut again = slots.try_take().unwrap();
        again.hold(delivery);
        drop(held);
        assert_eq!(slots.held(), [delivery], "another slot holds it still");
        drop(again);
        assert_eq!(slots.held(), []);
        let now = Instant::now();
        for (until, held) in [(now + Duration::from_mins(1), vec![delivery]), (now, vec![])] {
            let mut left = slots.try_take().unwrap();
            left.hold(delivery);
            left.leave_lease(until);
            assert_eq!(slots.held(), held);
            slots.state().unsettled.clear();
        }
        let taken = slots.take(3, false).await;
        assert!(taken.iter().all(|slot| renamed.contains(slot.worker())));
    }

    #[tokio::test]
    async fn one_free_slot_is_enough_but_more_are_waited_for_where_more_waits() {
        let slots = Slots::new(&workers(), 4);
        let mut held = slots.take(12, false).await;
        held.pop();
        assert_eq!(slots.take(6, true).await.len(), 1, "it does not wait for long");
        let (taken, ()) = tokio::join!(slots.take(6, true), async {
            for _ in 0..3 {
                tokio::task::yield_now().await;
                held.pop();
            }
        });
        assert!(taken.len() >= 3);
        drop((held, taken));
        slots.close().await;
        assert!(slots.try_take().is_none());
    }
}
