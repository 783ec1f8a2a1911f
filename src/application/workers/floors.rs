//! From where on to look for deliveries of endpoints with a long backlog.
//!
//! A transaction elsewhere that runs for long keeps the index entries of all that was claimed and settled since it
//! began, and each claim would step over them. A floor is a hint where the live ones begin. Deliveries below it exist
//! all the same (a retry of the past, a commit that came late), so a claim without floors is made every second, and
//! whenever an endpoint gives less than it could.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use super::shares::Rooms;
use crate::domain::delivery::{LeasedDelivery, Priority};
use crate::domain::endpoint::EndpointId;

/// How often a claim is made without floors.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// How many floors are remembered: a backlog of many endpoints is no long backlog of one.
const FLOORS_MAX: usize = 16;
/// What an endpoint must give to one claim before its backlog counts as long.
const BACKLOG_MIN: usize = 10;

/// At this endpoint and priority nothing waits that has been ready for longer.
pub type Floor = (EndpointId, Priority, DateTime<Utc>);

/// The floors that the claims of a process have found; none at first.
#[derive(Debug, Default)]
pub struct KnownFloors {
    floors: Vec<Floor>,
    swept_at: Option<Instant>,
}

impl KnownFloors {
    /// Those that the next claim may use.
    pub fn for_claim(&mut self) -> Vec<Floor> {
        if self.swept_at.is_some_and(|at| at.elapsed() < SWEEP_EVERY) {
            return self.floors.clone();
        }
        self.swept_at = Some(Instant::now());
        Vec::new()
    }

    /// Learns from a claim of at most `limit` within `rooms`. Answers whether it should be made again: an endpoint gave
    /// less than it could, so more may wait below its floor, which is forgotten.
    pub fn learn(&mut self, used: &[Floor], limit: usize, rooms: &Rooms, claimed: &[LeasedDelivery]) -> bool {
        let mut given: HashMap<(EndpointId, Priority), (usize, DateTime<Utc>)> = HashMap::new();
        for delivery in claimed.iter().filter(|delivery| !delivery.is_limited()) {
            let (count, latest) =
                given.entry((delivery.config_id, delivery.priority)).or_insert((0, delivery.ready_since));
            *count += 1;
            *latest = delivery.ready_since.max(*latest);
        }
        let mut again = false;
        if claimed.len() < limit {
            for (endpoint, priority, _) in used {
                let count = given.get(&(*endpoint, *priority)).map_or(0, |(count, _)| *count);
                if count < rooms.of(*endpoint) {
                    given.remove(&(*endpoint, *priority));
                    self.forget(*endpoint, *priority);
                    again = true;
                }
            }
        }
        for ((endpoint, priority), (count, latest)) in given {
            if count >= BACKLOG_MIN {
                self.forget(endpoint, priority);
                self.floors.push((endpoint, priority, latest));
            }
        }
        let surplus = self.floors.len().saturating_sub(FLOORS_MAX);
        self.floors.drain(..surplus);
        again
    }

    fn forget(&mut self, endpoint: EndpointId, priority: Priority) {
        self.floors.retain(|floor| (floor.0, floor.1) != (endpoint, priority));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::delivery::tests::leased;

    fn endpoint(number: i64) -> EndpointId {
        EndpointId::from_stored(number)
    }

    fn claimed(number: i64, ready_since: impl Iterator<Item = i64>) -> Vec<LeasedDelivery> {
        ready_since
            .map(|second| LeasedDelivery {
                config_id: endpoint(number),
                ready_since: DateTime::from_timestamp(second, 0).unwrap(),
                ..leased()
            })
            .collect()
    }

    fn just_swept() -> KnownFloors {
        let mut floors = KnownFloors::default();
        assert_eq!(floors.for_claim(), [], "the first claim is a sweep");
        floors
    }

    fn rooms(share: usize) -> Rooms {
        Rooms { limit: share, share, listed: vec![] }
    }

    #[test]
    fn a_long_backlog_has_a_floor_until_it_gives_less_than_it_could() {
        let mut floors = just_swept();
        assert!(!floors.learn(&[], 50, &rooms(20), &claimed(1, 100..120)));
        let used = floors.for_claim();
        assert_eq!(used, [(endpoint(1), leased().priority, DateTime::from_timestamp(119, 0).unwrap())]);

        assert!(!floors.learn(&used, 50, &rooms(20), &claimed(1, 120..140)));
        let used = floors.for_claim();
        assert_eq!(used[0].2.timestamp(), 139);

        assert!(floors.learn(&used, 50, &rooms(20), &claimed(1, 140..159)));
        assert_eq!(floors.for_claim(), []);
    }

    #[test]
    fn a_full_claim_says_nothing_about_the_endpoints_that_it_did_not_reach() {
        let mut floors = just_swept();
        floors.learn(&[], 50, &rooms(50), &claimed(1, 100..120));
        let used = floors.for_claim();
        assert!(!floors.learn(&used, 50, &rooms(50), &claimed(2, 0..50)));
        assert_eq!(floors.for_claim().len(), 2);
    }

    #[test]
    fn few_are_remembered() {
        let mut floors = just_swept();
        for number in 1..100 {
            floors.learn(&[], 20, &rooms(20), &claimed(number, 0..20));
        }
        assert_eq!(floors.for_claim().len(), FLOORS_MAX);
        floors.learn(&[], 20, &rooms(20), &claimed(1000, 0..5));
        assert!(floors.for_claim().iter().all(|floor| floor.0 != endpoint(1000)));
    }
}
