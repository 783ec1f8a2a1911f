//! What one endpoint may hold of a process's leases: at most half of what the others leave, or three quarters while it
//! answers quickly.
//!
//! So an endpoint that never answers cannot take all, nor can two of them, or three; there is always room for the next
//! one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::application::wakeup::Wakeup;
use crate::domain::delivery::LeasedDelivery;
use crate::domain::endpoint::EndpointId;

/// An endpoint that was held back is claimed from again once it has room for this part of all leases, so that claims
/// stay large.
const ROOM_WORTH_A_CLAIM: usize = 8;
/// An endpoint that may take nearly as much as others is not listed by itself, which would cost a claim that visits
/// hundreds; so it may once take this much more.
const SLACK: usize = 8;
/// A lease that is given back this soon was answered quickly.
const QUICK: Duration = Duration::from_secs(1);

/// How much may be taken from endpoints by one claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rooms {
    /// In all.
    pub limit: usize,
    /// From each that is not listed.
    pub share: usize,
    /// From those that hold so much already that it is less.
    pub listed: Vec<(EndpointId, usize)>,
}

impl Rooms {
    /// From this one.
    pub fn of(&self, endpoint: EndpointId) -> usize {
        let listed = self.listed.iter().find(|(listed, _)| *listed == endpoint);
        listed.map_or(self.share, |(_, room)| *room)
    }
}

/// Counts the leases of a process by endpoint.
#[derive(Debug)]
pub struct Shares {
    leases_max: usize,
    wakeup: Arc<Wakeup>,
    held: Mutex<Held>,
}

/// A lease that is counted for its endpoint until this is dropped; then the claimer is woken if that is worth a claim.
#[derive(Debug)]
pub struct Share {
    shares: Arc<Shares>,
    endpoint: EndpointId,
    was_quick: bool,
}

impl Share {
    /// The attempt ended, so long after the lease was taken.
    pub fn ended_after(mut self, held_for: Duration) {
        self.was_quick = held_for < QUICK;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.shares.give_back(self.endpoint, self.was_quick) {
            self.shares.wakeup.wake_claimer();
        }
    }
}

#[derive(Debug, Default)]
struct Held {
    total: usize,
    by_endpoint: HashMap<EndpointId, HeldByEndpoint>,
    /// Endpoints that may have more waiting than they were given room for, and whether that was told since.
    held_back: HashMap<EndpointId, Told>,
    /// Nothing waits anywhere else, as far as is known: the last claim took less than it could.
    all_else_claimed: bool,
    /// What the claim that is under way may take.
    being_claimed: Option<Rooms>,
}

/// Whether it was told that an endpoint is worth a claim.
type Told = bool;

#[derive(Debug, Clone, Copy, Default)]
struct HeldByEndpoint {
    count: usize,
    /// When a lease was last given back quickly.
    quick_at: Option<Instant>,
    /// Whether it limits what is in flight, everywhere: what it may give is known to the store alone.
    limited: bool,
}

impl Shares {
    /// Nothing is held of `leases_max` leases. Whoever claims is woken by `wakeup`.
    pub fn new(leases_max: usize, wakeup: Arc<Wakeup>) -> Arc<Self> {
        Arc::new(Self { leases_max, wakeup, held: Mutex::default() })
    }

    /// How many leases there are.
    pub fn leases_max(&self) -> usize {
        self.leases_max
    }

    /// What a claim of at most `limit` may take. [`Shares::take`] or [`Shares::claim_failed`] must be told of its end before
    /// the next one is made.
    pub fn rooms(&self, limit: usize) -> Rooms {
        let mut held = self.held();
        let share = held.room(self.leases_max, HeldByEndpoint::default()).clamp(1, limit);
        let mut listed = Vec::new();
        for (&endpoint, &by_endpoint) in &held.by_endpoint {
            let room = held.room(self.leases_max, by_endpoint);
            if room == 0 || room + SLACK < share {
                listed.push((endpoint, room));
            }
        }
        // nobody looks at all whether more waits for these
        held.held_back
            .extend(listed.iter().filter(|(_, room)| *room == 0).map(|(endpoint, _)| (*endpoint, false)));
        let rooms = Rooms { limit, share, listed };
        held.being_claimed = Some(rooms.clone());
        rooms
    }

    /// A claim within `rooms` took leases on these deliveries.
    pub fn take(
        self: &Arc<Self>,
        rooms: &Rooms,
        deliveries: Vec<LeasedDelivery>,
    ) -> Vec<(LeasedDelivery, Share)> {
        self.count(rooms, deliveries.iter().map(|delivery| (delivery.config_id, delivery.in_flight_limited)));
        let with_share = |delivery: LeasedDelivery| {
            let share = self.counted(delivery.config_id);
            (delivery, share)
        };
        deliveries.into_iter().map(with_share).collect()
    }

    /// A claim took nothing, and nobody knows what waits.
    pub fn claim_failed(&self) {
        let mut held = self.held();
        held.being_claimed = None;
        held.all_else_claimed = false;
    }

    /// Takes a lease for a delivery that is about to be stored, if its endpoint has room and nothing waits there, as far as
    /// is known, that should go first.
    pub fn take_for_new(self: &Arc<Self>, endpoint: EndpointId) -> Option<Share> {
        self.count_new(endpoint).then(|| self.counted(endpoint))
    }

    /// A delivery of this endpoint has to wait, for want of a slot, and goes before newer ones.
    pub fn hold_back(&self, endpoint: EndpointId) {
        self.held().held_back.insert(endpoint, false);
    }

    /// Whether something may wait for a lease of this endpoint to end.
    pub fn is_wanted(&self, endpoint: EndpointId) -> bool {
        let held = self.held();
        !held.all_else_claimed
            || held.held_back.contains_key(&endpoint)
            || held.by_endpoint.get(&endpoint).is_some_and(|by_endpoint| by_endpoint.limited)
    }

    fn counted(self: &Arc<Self>, endpoint: EndpointId) -> Share {
        Share { shares: self.clone(), endpoint, was_quick: false }
    }

    /// Of each endpoint is told whether it limits what is in flight.
    fn count(&self, rooms: &Rooms, endpoints: impl IntoIterator<Item = (EndpointId, bool)>) {
        let mut taken: HashMap<EndpointId, usize> = HashMap::new();
        let mut held = self.held();
        for (endpoint, limited) in endpoints {
            *taken.entry(endpoint).or_default() += 1;
            held.take(endpoint).limited |= limited;
        }
        held.being_claimed = None;
        held.all_else_claimed = taken.values().sum::<usize>() < rooms.limit;
        if held.all_else_claimed {
            held.held_back.retain(|endpoint, _| rooms.of(*endpoint) == 0);
        }
        for (endpoint, count) in taken {
            if count >= rooms.of(endpoint) {
                held.held_back.insert(endpoint, false);
            }
        }
    }

    fn count_new(&self, endpoint: EndpointId) -> bool {
        let mut held = self.held();
        let by_endpoint = held.by_endpoint.get(&endpoint).copied().unwrap_or_default();
        if !held.all_else_claimed || held.held_back.contains_key(&endpoint) {
            return false;
        }
        let being_claimed = held.being_claimed.as_ref();
        let (in_all, here) = being_claimed.map_or((0, 0), |rooms| (rooms.limit, rooms.of(endpoint)));
        // of what the claim takes, it may take so much from others
        if held.room(self.leases_max.saturating_sub(in_all - here), by_endpoint) <= here {
            held.held_back.insert(endpoint, false);
            return false;
        }
        held.take(endpoint);
        true
    }

    /// Answers whether the endpoint had been held back, here or by its limits, and is worth a claim now.
    fn give_back(&self, endpoint: EndpointId, was_quick: bool) -> bool {
        let mut held = self.held();
        let mut by_endpoint = held.give_back(endpoint);
        if was_quick {
            by_endpoint.quick_at = Some(Instant::now());
        }
        let was_the_last = by_endpoint.count == 0;
        if let Some(kept) = held.by_endpoint.get_mut(&endpoint) {
            *kept = by_endpoint;
        }
        let worth_a_claim =
            was_the_last || held.room(self.leases_max, by_endpoint) >= self.leases_max / ROOM_WORTH_A_CLAIM;
        let was_held_back = worth_a_claim
            && held.held_back.get_mut(&endpoint).is_some_and(|told| !std::mem::replace(told, true));
        was_held_back || by_endpoint.limited
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // a panic elsewhere leaves plain counts behind
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn take(&mut self, endpoint: EndpointId) -> &mut HeldByEndpoint {
        self.total += 1;
        let by_endpoint = self.by_endpoint.entry(endpoint).or_default();
        by_endpoint.count += 1;
        by_endpoint
    }

    /// Answers what the endpoint holds then; one that holds nothing is forgotten.
    fn give_back(&mut self, endpoint: EndpointId) -> HeldByEndpoint {
        self.total -= 1;
        let by_endpoint = self.by_endpoint.get_mut(&endpoint).expect("what is given back was taken");
        by_endpoint.count -= 1;
        let by_endpoint = *by_endpoint;
        if by_endpoint.count == 0 {
            self.by_endpoint.remove(&endpoint);
        }
        by_endpoint
    }

    /// How many more an endpoint may take that holds so many.
    fn room(&self, leases_max: usize, HeldByEndpoint { count, quick_at, .. }: HeldByEndpoint) -> usize {
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
    fn take_all(shares: &Shares, number: i64) -> usize {
        let mut taken = 0;
        loop {
            let rooms = shares.rooms(50);
            let room = rooms.of(endpoint(number));
            if room == 0 {
                shares.count(&rooms, []);
                return taken;
            }
            shares.count(&rooms, vec![(endpoint(number), false); room]);
            taken += room;
        }
    }

    #[test]
    fn each_endpoint_that_hangs_leaves_half_to_the_next() {
        let shares = Shares::new(500, Arc::default());
        let taken: Vec<_> = (1..=4).map(|number| take_all(&shares, number)).collect();
        assert!(taken[0] >= 250 && taken[0] < 300, "{taken:?}");
        assert!(taken[3] >= 10, "{taken:?}");
        assert!(taken.iter().sum::<usize>() < 500, "{taken:?}");
    }

    #[test]
    fn an_endpoint_that_answers_quickly_may_hold_more() {
        let shares = Shares::new(500, Arc::default());
        let slow = take_all(&shares, 1);
        shares.give_back(endpoint(1), SLOW);
        assert_eq!(take_all(&shares, 1), 1);
        shares.give_back(endpoint(1), QUICK);
        let more = take_all(&shares, 1);
        assert!((370..380).contains(&(slow - 1 + more)), "{slow}, then {more} more");
    }

    #[test]
    fn an_endpoint_that_was_held_back_is_worth_a_claim_once_it_has_room() {
        let shares = Shares::new(100, Arc::default());
        let taken = take_all(&shares, 1);
        let given_back = (0..taken).position(|_| shares.give_back(endpoint(1), SLOW)).unwrap();
        assert!((10..taken).contains(&given_back), "{given_back} of {taken}");
        assert!(!shares.give_back(endpoint(1), SLOW), "it is told once");
    }

    #[test]
    fn an_endpoint_with_more_waiting_than_its_share_is_worth_a_claim_when_that_has_ended() {
        let shares = Shares::new(100, Arc::default());
        take_all(&shares, 1);
        take_all(&shares, 2);
        let rooms = shares.rooms(50);
        shares.count(&rooms, vec![(endpoint(3), false); rooms.share]);

        let told: Vec<_> = (0..rooms.share).map(|_| shares.give_back(endpoint(3), SLOW)).collect();

        assert_eq!(told.iter().filter(|told| **told).count(), 1);
        assert!(told.iter().skip(rooms.share / 2).any(|told| *told), "{told:?}");
    }

    #[test]
    fn a_single_lease_can_be_used() {
        let shares = Shares::new(1, Arc::default());
        let rooms = shares.rooms(1);
        assert_eq!(rooms, Rooms { limit: 1, share: 1, listed: vec![] });
        shares.count(&rooms, [(endpoint(1), false)]);
        assert_eq!(shares.rooms(1).listed, [(endpoint(1), 0)]);
        assert!(shares.give_back(endpoint(1), SLOW));
    }

    #[test]
    fn an_endpoint_that_limits_what_is_in_flight_is_worth_a_claim_whenever_a_lease_ends() {
        let shares = Shares::new(100, Arc::default());
        shares.count(&shares.rooms(50), [(endpoint(1), true), (endpoint(1), true), (endpoint(2), false)]);
        assert!(shares.give_back(endpoint(1), SLOW) && shares.give_back(endpoint(1), SLOW));
        assert!(!shares.give_back(endpoint(2), SLOW));
        shares.count(&shares.rooms(50), [(endpoint(1), false)]);
        assert!(!shares.give_back(endpoint(1), SLOW), "the limits were removed");
    }

    #[test]
    fn a_new_delivery_gets_a_lease_while_nothing_waits_and_its_endpoint_has_room() {
        let shares = Shares::new(100, Arc::default());
        assert!(!shares.count_new(endpoint(1)), "nobody has looked yet");
        shares.count(&shares.rooms(50), []);
        let taken = (0..1000).take_while(|_| shares.count_new(endpoint(1))).count();
        assert_eq!(taken, 50, "half is for the others");
        shares.give_back(endpoint(1), SLOW);
        assert!(!shares.count_new(endpoint(1)), "the one that found no room goes first");
        assert!(shares.count_new(endpoint(2)));
        assert!((0..50).any(|_| shares.give_back(endpoint(1), SLOW)), "and is worth a claim");

        shares.count(&shares.rooms(50), [(endpoint(1), false)]);
        assert!(shares.count_new(endpoint(1)), "the claim left nothing behind");
        let rooms = shares.rooms(10);
        shares.count(&rooms, vec![(endpoint(3), false); 10]);
        assert!(!shares.count_new(endpoint(1)), "the claim took as much as it could");
    }

    #[test]
    fn a_new_delivery_leaves_a_claim_that_is_under_way_what_it_may_take() {
        let shares = Shares::new(100, Arc::default());
        shares.count(&shares.rooms(50), []);
        let rooms = shares.rooms(20);
        let taken = (0..1000).take_while(|_| shares.count_new(endpoint(1))).count();
        assert_eq!(taken + rooms.of(endpoint(1)), 50, "as much as without the claim");
    }

    #[test]
    fn an_endpoint_that_had_to_wait_for_a_lease_waits_for_the_next_claim() {
        let shares = Shares::new(100, Arc::default());
        shares.count(&shares.rooms(50), []);
        shares.hold_back(endpoint(1));
        assert!(!shares.count_new(endpoint(1)));
        shares.count(&shares.rooms(50), [(endpoint(1), false)]);
        assert!(shares.count_new(endpoint(1)));
    }

    proptest! {
        #[test]
        fn what_is_held_is_counted_right(steps in prop::collection::vec((0..4, 1_i64..5), 1..200)) {
            let shares = Shares::new(50, Arc::default());
            let mut model: HashMap<i64, usize> = HashMap::new();
            for (step, number) in steps {
                let count = model.entry(number).or_default();
                match step {
                    0 => {
                        shares.count(&shares.rooms(50), [(endpoint(number), false)]);
                        *count += 1;
                    }
                    1 => *count += usize::from(shares.count_new(endpoint(number))),
                    2 => shares.hold_back(endpoint(number)),
                    _ if *count > 0 => {
                        shares.give_back(endpoint(number), SLOW);
                        *count -= 1;
                    }
                    _ => {}
                }
            }
            let held = shares.held();
            prop_assert_eq!(held.total, model.values().sum::<usize>());
            for (number, count) in model {
                prop_assert_eq!(held.by_endpoint.get(&endpoint(number)).map_or(0, |held| held.count), count);
            }
        }
    }
}
