//! Counts the leases of a process per endpoint, so that no endpoint takes them all.
//!
//! The share of an endpoint is half of the leases that the others leave free, or three quarters while it answers quickly.
//! So endpoints that never answer cannot take all leases, however many there are: there is always room for one more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::application::wakeup::Wakeup;
use crate::domain::delivery::LeasedDelivery;
use crate::domain::endpoint::EndpointId;

/// An endpoint that was held back is claimed from again when it has room for this fraction of all leases. That keeps
/// claims large.
const ROOM_WORTH_A_CLAIM: usize = 8;
/// An endpoint whose limit is within this many of the common one is not listed separately, because long lists slow claims
/// down. It may exceed its limit by this much, once.
const SLACK: usize = 8;
/// An attempt that ends within this time was answered quickly.
const QUICK: Duration = Duration::from_secs(1);

/// How many leases one claim may take from which endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rooms {
    /// Upper bound for all endpoints together.
    pub limit: usize,
    /// Upper bound for each endpoint that is not listed.
    pub share: usize,
    /// Endpoints with a lower bound than `share`, because they hold leases already.
    pub listed: Vec<(EndpointId, usize)>,
}

impl Rooms {
    /// Upper bound for this endpoint.
    pub fn of(&self, endpoint: EndpointId) -> usize {
        let listed = self.listed.iter().find(|(listed, _)| *listed == endpoint);
        listed.map_or(self.share, |(_, room)| *room)
    }
}

#[derive(Debug)]
pub struct Ledger {
    leases_max: usize,
    wakeup: Arc<Wakeup>,
    counts: Mutex<Counts>,
}

/// A lease that counts for its endpoint until this is dropped. The drop wakes the claimer if a claim is worth it.
#[derive(Debug)]
pub struct Entry {
    ledger: Arc<Ledger>,
    endpoint: EndpointId,
    was_quick: bool,
}

impl Entry {
    /// Notes how long after the start of the lease the attempt ended.
    pub fn ended_after(mut self, held_for: Duration) {
        self.was_quick = held_for < QUICK;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.ledger.give_back(self.endpoint, self.was_quick) {
            self.ledger.wakeup.wake_claimer();
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    total: usize,
    by_endpoint: HashMap<EndpointId, EndpointCount>,
    /// Endpoints that may have more deliveries waiting than they had room for.
    held_back: HashMap<EndpointId, HeldBack>,
    /// The last claim took less than it could, so probably nothing waits at other endpoints.
    all_else_claimed: bool,
    /// The rooms of the claim that is under way.
    being_claimed: Option<Rooms>,
}

/// Whether the claimer has been woken for an endpoint that was held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeldBack {
    Unreported,
    Reported,
}

#[derive(Debug, Clone, Copy, Default)]
struct EndpointCount {
    count: usize,
    /// When an attempt last ended quickly.
    quick_at: Option<Instant>,
    /// The endpoint has a limit on attempts in flight. Only the store knows how many more it allows.
    limited: bool,
}

impl Ledger {
    /// An empty ledger for `leases_max` leases. It wakes the claimer through `wakeup`.
    pub fn new(leases_max: usize, wakeup: Arc<Wakeup>) -> Arc<Self> {
        Arc::new(Self { leases_max, wakeup, counts: Mutex::default() })
    }

    pub fn leases_max(&self) -> usize {
        self.leases_max
    }

    /// What a claim of at most `limit` leases may take. Call [`Ledger::take`] or [`Ledger::claim_failed`] when the claim has
    /// ended, before the next call of this.
    pub fn rooms(&self, limit: usize) -> Rooms {
        let mut counts = self.counts();
        let share = counts.room(self.leases_max, EndpointCount::default()).clamp(1, limit);
        let mut listed = Vec::new();
        for (&endpoint, &by_endpoint) in &counts.by_endpoint {
            let room = counts.room(self.leases_max, by_endpoint);
            if room == 0 || room + SLACK < share {
                listed.push((endpoint, room));
            }
        }
        // the claim skips endpoints without room, so it cannot find out whether more waits for them
        counts.held_back.extend(
            listed
                .iter()
                .filter(|(_, room)| *room == 0)
                .map(|(endpoint, _)| (*endpoint, HeldBack::Unreported)),
        );
        let rooms = Rooms { limit, share, listed };
        counts.being_claimed = Some(rooms.clone());
        rooms
    }

    /// Counts the leases that a claim within `rooms` took.
    pub fn take(
        self: &Arc<Self>,
        rooms: &Rooms,
        deliveries: Vec<LeasedDelivery>,
    ) -> Vec<(LeasedDelivery, Entry)> {
        self.count(rooms, deliveries.iter().map(|delivery| (delivery.config_id, delivery.in_flight_limited)));
        let with_entry = |delivery: LeasedDelivery| {
            let entry = self.counted(delivery.config_id);
            (delivery, entry)
        };
        deliveries.into_iter().map(with_entry).collect()
    }

    /// Notes that a claim failed: it is unknown what waits.
    pub fn claim_failed(&self) {
        let mut counts = self.counts();
        counts.being_claimed = None;
        counts.all_else_claimed = false;
    }

    /// Takes a lease for a delivery that is about to be stored. Returns `None` if its endpoint has no room, or if deliveries may
    /// wait there that should go first.
    pub fn take_for_new(self: &Arc<Self>, endpoint: EndpointId) -> Option<Entry> {
        self.count_new(endpoint).then(|| self.counted(endpoint))
    }

    /// Notes that a delivery of this endpoint has to wait because no slot is free. It goes before newer ones.
    pub fn hold_back(&self, endpoint: EndpointId) {
        self.counts().held_back.insert(endpoint, HeldBack::Unreported);
    }

    /// Whether a delivery may be waiting for a lease of this endpoint to end.
    pub fn is_wanted(&self, endpoint: EndpointId) -> bool {
        let counts = self.counts();
        !counts.all_else_claimed
            || counts.held_back.contains_key(&endpoint)
            || counts.by_endpoint.get(&endpoint).is_some_and(|by_endpoint| by_endpoint.limited)
    }

    fn counted(self: &Arc<Self>, endpoint: EndpointId) -> Entry {
        Entry { ledger: self.clone(), endpoint, was_quick: false }
    }

    /// The flag of each endpoint says whether it has a limit on attempts in flight.
    fn count(&self, rooms: &Rooms, endpoints: impl IntoIterator<Item = (EndpointId, bool)>) {
        let mut taken: HashMap<EndpointId, usize> = HashMap::new();
        let mut counts = self.counts();
        for (endpoint, limited) in endpoints {
            *taken.entry(endpoint).or_default() += 1;
            counts.take(endpoint).limited |= limited;
        }
        counts.being_claimed = None;
        counts.all_else_claimed = taken.values().sum::<usize>() < rooms.limit;
        if counts.all_else_claimed {
            counts.held_back.retain(|endpoint, _| rooms.of(*endpoint) == 0);
        }
        for (endpoint, count) in taken {
            if count >= rooms.of(endpoint) {
                counts.held_back.insert(endpoint, HeldBack::Unreported);
            }
        }
    }

    fn count_new(&self, endpoint: EndpointId) -> bool {
        let mut counts = self.counts();
        let by_endpoint = counts.by_endpoint.get(&endpoint).copied().unwrap_or_default();
        if !counts.all_else_claimed || counts.held_back.contains_key(&endpoint) {
            return false;
        }
        let being_claimed = counts.being_claimed.as_ref();
        let (in_all, here) = being_claimed.map_or((0, 0), |rooms| (rooms.limit, rooms.of(endpoint)));
        // the claim may take this much from other endpoints, which leaves less room here
        if counts.room(self.leases_max.saturating_sub(in_all - here), by_endpoint) <= here {
            counts.held_back.insert(endpoint, HeldBack::Unreported);
            return false;
        }
        counts.take(endpoint);
        true
    }

    /// Returns whether the endpoint was held back, by the ledger or by its limits, and is now worth a claim.
    fn give_back(&self, endpoint: EndpointId, was_quick: bool) -> bool {
        let mut counts = self.counts();
        let mut by_endpoint = counts.give_back(endpoint);
        if was_quick {
            by_endpoint.quick_at = Some(Instant::now());
        }
        let was_the_last = by_endpoint.count == 0;
        if let Some(kept) = counts.by_endpoint.get_mut(&endpoint) {
            *kept = by_endpoint;
        }
        let worth_a_claim =
            was_the_last || counts.room(self.leases_max, by_endpoint) >= self.leases_max / ROOM_WORTH_A_CLAIM;
        let was_held_back = worth_a_claim
            && counts
                .held_back
                .get_mut(&endpoint)
                .is_some_and(|state| std::mem::replace(state, HeldBack::Reported) == HeldBack::Unreported);
        was_held_back || by_endpoint.limited
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        // a panic elsewhere leaves plain counts behind
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    fn take(&mut self, endpoint: EndpointId) -> &mut EndpointCount {
        self.total += 1;
        let by_endpoint = self.by_endpoint.entry(endpoint).or_default();
        by_endpoint.count += 1;
        by_endpoint
    }

    /// Returns what the endpoint holds after that. An endpoint that holds nothing is forgotten.
    fn give_back(&mut self, endpoint: EndpointId) -> EndpointCount {
        self.total -= 1;
        let by_endpoint = self.by_endpoint.get_mut(&endpoint).expect("what is given back was taken");
        by_endpoint.count -= 1;
        let by_endpoint = *by_endpoint;
        if by_endpoint.count == 0 {
            self.by_endpoint.remove(&endpoint);
        }
        by_endpoint
    }

    /// How many more leases an endpoint with this count may take.
    fn room(&self, leases_max: usize, EndpointCount { count, quick_at, .. }: EndpointCount) -> usize {
        let left_by_others = leases_max.saturating_sub(self.total - count);
        let quarters = if quick_at.is_some_and(|at| at.elapsed() < QUICK) { 3 } else { 2 };
        (left_by_others * quarters).div_ceil(4).saturating_sub(count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SLOW: bool = false;
    const QUICK: bool = true;

    fn endpoint(number: i64) -> EndpointId {
        EndpointId::from_stored(number)
    }

    /// Takes for an endpoint as much as single claims of 50 give it.
    fn take_all(ledger: &Ledger, number: i64) -> usize {
        let mut taken = 0;
        loop {
            let rooms = ledger.rooms(50);
            let room = rooms.of(endpoint(number));
            if room == 0 {
                ledger.count(&rooms, []);
                return taken;
            }
            ledger.count(&rooms, vec![(endpoint(number), false); room]);
            taken += room;
        }
    }

    #[test]
    fn each_endpoint_that_hangs_leaves_half_to_the_next() {
        let ledger = Ledger::new(500, Arc::default());
        let taken: Vec<_> = (1..=4).map(|number| take_all(&ledger, number)).collect();
        assert!(taken[0] >= 250 && taken[0] < 300, "{taken:?}");
        assert!(taken[3] >= 10, "{taken:?}");
        assert!(taken.iter().sum::<usize>() < 500, "{taken:?}");
    }

    #[test]
    fn an_endpoint_that_answers_quickly_may_hold_more() {
        let ledger = Ledger::new(500, Arc::default());
        let slow = take_all(&ledger, 1);
        ledger.give_back(endpoint(1), SLOW);
        assert_eq!(take_all(&ledger, 1), 1);
        ledger.give_back(endpoint(1), QUICK);
        let more = take_all(&ledger, 1);
        assert!((370..380).contains(&(slow - 1 + more)), "{slow}, then {more} more");
    }

    #[test]
    fn an_endpoint_that_was_held_back_is_worth_a_claim_once_it_has_room() {
        let ledger = Ledger::new(100, Arc::default());
        let taken = take_all(&ledger, 1);
        let given_back = (0..taken).position(|_| ledger.give_back(endpoint(1), SLOW)).unwrap();
        assert!((10..taken).contains(&given_back), "{given_back} of {taken}");
        assert!(!ledger.give_back(endpoint(1), SLOW), "it is told once");
    }

    #[test]
    fn an_endpoint_with_more_waiting_than_its_share_is_worth_a_claim_when_that_has_ended() {
        let ledger = Ledger::new(100, Arc::default());
        take_all(&ledger, 1);
        take_all(&ledger, 2);
        let rooms = ledger.rooms(50);
        ledger.count(&rooms, vec![(endpoint(3), false); rooms.share]);

        let told: Vec<_> = (0..rooms.share).map(|_| ledger.give_back(endpoint(3), SLOW)).collect();

        assert_eq!(told.iter().filter(|told| **told).count(), 1);
        assert!(told.iter().skip(rooms.share / 2).any(|told| *told), "{told:?}");
    }

    #[test]
    fn a_single_lease_can_be_used() {
        let ledger = Ledger::new(1, Arc::default());
        let rooms = ledger.rooms(1);
        assert_eq!(rooms, Rooms { limit: 1, share: 1, listed: vec![] });
        ledger.count(&rooms, [(endpoint(1), false)]);
        assert_eq!(ledger.rooms(1).listed, [(endpoint(1), 0)]);
        assert!(ledger.give_back(endpoint(1), SLOW));
    }

    #[test]
    fn an_endpoint_that_limits_what_is_in_flight_is_worth_a_claim_whenever_a_lease_ends() {
        let ledger = Ledger::new(100, Arc::default());
        ledger.count(&ledger.rooms(50), [(endpoint(1), true), (endpoint(1), true), (endpoint(2), false)]);
        assert!(ledger.give_back(endpoint(1), SLOW) && ledger.give_back(endpoint(1), SLOW));
        assert!(!ledger.give_back(endpoint(2), SLOW));
        ledger.count(&ledger.rooms(50), [(endpoint(1), false)]);
        assert!(!ledger.give_back(endpoint(1), SLOW), "the limits were removed");
    }

    #[test]
    fn a_new_delivery_gets_a_lease_while_nothing_waits_and_its_endpoint_has_room() {
        let ledger = Ledger::new(100, Arc::default());
        assert!(!ledger.count_new(endpoint(1)), "nobody has looked yet");
        ledger.count(&ledger.rooms(50), []);
        let taken = (0..1000).take_while(|_| ledger.count_new(endpoint(1))).count();
        assert_eq!(taken, 50, "half is for the others");
        ledger.give_back(endpoint(1), SLOW);
        assert!(!ledger.count_new(endpoint(1)), "the one that found no room goes first");
        assert!(ledger.count_new(endpoint(2)));
        assert!((0..50).any(|_| ledger.give_back(endpoint(1), SLOW)), "and is worth a claim");

        ledger.count(&ledger.rooms(50), [(endpoint(1), false)]);
        assert!(ledger.count_new(endpoint(1)), "the claim left nothing behind");
        let rooms = ledger.rooms(10);
        ledger.count(&rooms, vec![(endpoint(3), false); 10]);
        assert!(!ledger.count_new(endpoint(1)), "the claim took as much as it could");
    }

    #[test]
    fn a_new_delivery_leaves_a_claim_that_is_under_way_what_it_may_take() {
        let ledger = Ledger::new(100, Arc::default());
        ledger.count(&ledger.rooms(50), []);
        let rooms = ledger.rooms(20);
        let taken = (0..1000).take_while(|_| ledger.count_new(endpoint(1))).count();
        assert_eq!(taken + rooms.of(endpoint(1)), 50, "as much as without the claim");
    }

    #[test]
    fn an_endpoint_that_had_to_wait_for_a_lease_waits_for_the_next_claim() {
        let ledger = Ledger::new(100, Arc::default());
        ledger.count(&ledger.rooms(50), []);
        ledger.hold_back(endpoint(1));
        assert!(!ledger.count_new(endpoint(1)));
        ledger.count(&ledger.rooms(50), [(endpoint(1), false)]);
        assert!(ledger.count_new(endpoint(1)));
    }

    proptest! {
        #[test]
        fn what_is_held_is_counted_right(steps in prop::collection::vec((0..4, 1_i64..5), 1..200)) {
            let ledger = Ledger::new(50, Arc::default());
            let mut model: HashMap<i64, usize> = HashMap::new();
            for (step, number) in steps {
                let count = model.entry(number).or_default();
                match step {
                    0 => {
                        ledger.count(&ledger.rooms(50), [(endpoint(number), false)]);
                        *count += 1;
                    }
                    1 => *count += usize::from(ledger.count_new(endpoint(number))),
                    2 => ledger.hold_back(endpoint(number)),
                    _ if *count > 0 => {
                        ledger.give_back(endpoint(number), SLOW);
                        *count -= 1;
                    }
                    _ => {}
                }
            }
            let counts = ledger.counts();
            prop_assert_eq!(counts.total, model.values().sum::<usize>());
            for (number, count) in model {
                prop_assert_eq!(counts.by_endpoint.get(&endpoint(number)).map_or(0, |entry| entry.count), count);
            }
        }
    }
}
