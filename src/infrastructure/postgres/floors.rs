//! Floors: hints where a claim should begin to look in a long backlog.
//!
//! A long transaction elsewhere keeps the index entries of all deliveries that were claimed or settled since it began, and
//! each claim would step over them. A floor is where the live entries begin. There may still be deliveries below it (a retry
//! that was due before, a commit that came late). So a claim without floors is made every second, and whenever an endpoint
//! gives less than it could.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use crate::application::workers::ledger::Rooms;
use crate::domain::delivery::Priority;
use crate::domain::endpoint::EndpointId;

/// How often a claim is made without floors.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// How many floors are remembered. If more endpoints have a backlog, each backlog is probably short.
const FLOORS_MAX: usize = 16;
/// A backlog counts as long if the endpoint gives at least this many deliveries to one claim.
const BACKLOG_MIN: usize = 10;

/// A line of waiting deliveries: one endpoint at one priority, a contiguous part of the index of ready deliveries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Line {
    pub endpoint: EndpointId,
    pub priority: Priority,
}

/// A hint that no delivery of this line became ready before the given time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Floor {
    pub line: Line,
    pub ready_since: DateTime<Utc>,
}

impl Floor {
    /// The line's key for `webhook_claim`: `config_id * 4 + priority`.
    pub fn key(&self) -> i64 {
        self.line.endpoint.get() * 4 + i64::from(self.line.priority.get())
    }
}

/// A delivery that a claim found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub line: Line,
    pub ready_since: DateTime<Utc>,
    /// Whether its endpoint has limits. If so, only the database knows how much it could give.
    pub is_limited: bool,
}

/// The floors that the claims of a process have found.
#[derive(Debug, Default)]
pub(super) struct KnownFloors {
    floors: Vec<Floor>,
    swept_at: Option<Instant>,
}

impl KnownFloors {
    /// The floors for the next claim; none if it is time for a claim without floors.
    pub fn for_claim(&mut self) -> Vec<Floor> {
        if self.swept_at.is_some_and(|at| at.elapsed() < SWEEP_EVERY) {
            return self.floors.clone();
        }
        self.swept_at = Some(Instant::now());
        Vec::new()
    }

    /// Learns from a claim of at most `limit` within `rooms`. Returns whether the claim should be made again because an endpoint
    /// gave less than it could: more may wait below its floor, which is forgotten.
    pub fn learn(&mut self, used: &[Floor], limit: usize, rooms: &Rooms, found: &[Found]) -> bool {
        struct Given {
            count: usize,
            latest: DateTime<Utc>,
        }
        let mut given: HashMap<Line, Given> = HashMap::new();
        for delivery in found.iter().filter(|delivery| !delivery.is_limited) {
            let of_line =
                given.entry(delivery.line).or_insert(Given { count: 0, latest: delivery.ready_since });
            of_line.count += 1;
            of_line.latest = delivery.ready_since.max(of_line.latest);
        }
        let mut again = false;
        if found.len() < limit {
            for Floor { line, .. } in used {
                if given.get(line).map_or(0, |given| given.count) < rooms.of(line.endpoint) {
                    given.remove(line);
                    self.forget(*line);
                    again = true;
                }
            }
        }
        for (line, Given { count, latest }) in given {
            if count >= BACKLOG_MIN {
                self.forget(line);
                self.floors.push(Floor { line, ready_since: latest });
            }
        }
        let surplus = self.floors.len().saturating_sub(FLOORS_MAX);
        self.floors.drain(..surplus);
        again
    }

    fn forget(&mut self, line: Line) {
        self.floors.retain(|floor| floor.line != line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: i64) -> Line {
        Line { endpoint: EndpointId::from_stored(number), priority: Priority::default() }
    }

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(second, 0).unwrap()
    }

    fn found(number: i64, ready_since: impl Iterator<Item = i64>) -> Vec<Found> {
        ready_since
            .map(|second| Found { line: line(number), ready_since: at(second), is_limited: false })
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
        assert!(!floors.learn(&[], 50, &rooms(20), &found(1, 100..120)));
        let used = floors.for_claim();
        assert_eq!(used, [Floor { line: line(1), ready_since: at(119) }]);

        assert!(!floors.learn(&used, 50, &rooms(20), &found(1, 120..140)));
        let used = floors.for_claim();
        assert_eq!(used[0].ready_since, at(139));

        assert!(floors.learn(&used, 50, &rooms(20), &found(1, 140..159)));
        assert_eq!(floors.for_claim(), []);
    }

    #[test]
    fn a_full_claim_says_nothing_about_the_endpoints_that_it_did_not_reach() {
        let mut floors = just_swept();
        floors.learn(&[], 50, &rooms(50), &found(1, 100..120));
        let used = floors.for_claim();
        assert!(!floors.learn(&used, 50, &rooms(50), &found(2, 0..50)));
        assert_eq!(floors.for_claim().len(), 2);
    }

    #[test]
    fn few_are_remembered() {
        let mut floors = just_swept();
        for number in 1..100 {
            floors.learn(&[], 20, &rooms(20), &found(number, 0..20));
        }
        assert_eq!(floors.for_claim().len(), FLOORS_MAX);
        floors.learn(&[], 20, &rooms(20), &found(1000, 0..5));
        assert!(floors.for_claim().iter().all(|floor| floor.line != line(1000)));
    }
}
