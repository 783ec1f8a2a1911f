//! The lease protocol, checked exhaustively: every run of two processes on two deliveries, with a few faults at any point.
//!
//! [`protocol`] is what statements do to the store, [`run`] is what processes do with them, and here is what must hold.
//! `docs/lease-protocol.md` says it in words.

mod protocol;
mod run;

use std::collections::{BTreeSet, HashSet};
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};

use stateright::{Checker, Expectation, HasDiscoveries, Model, Property};

use crate::protocol::{Answer, Circuit, Fences, Place, Record};
use crate::run::{Faults, Run, World};

/// As many as the machines that build it have at least.
const THREADS: usize = 2;

impl Model for Run {
    type State = World;
    type Action = run::Step;

    fn init_states(&self) -> Vec<World> {
        vec![self.beginning()]
    }

    fn actions(&self, world: &World, steps: &mut Vec<run::Step>) {
        steps.extend(self.steps(world));
    }

    fn next_state(&self, world: &World, step: run::Step) -> Option<World> {
        Some(self.after(world, step))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("what was accepted ends", |run: &Self, world: &World| {
                let goes_on = run.steps(world).iter().any(|step| !step.is_fault());
                let ends = |row: &protocol::Row| row.place == Place::Absent || row.is_terminal();
                goes_on || world.store.rows.iter().all(ends)
            }),
            Property::always("what is recorded is never overwritten", |_, world: &World| {
                !world.flaws.overwritten
            }),
            Property::always("only a lease that ended is recorded as lost", |_, world: &World| {
                !world.flaws.invented_loss
            }),
            Property::always("a request is recorded, or stands as a lost lease", |_, world: &World| {
                (0..world.store.rows.len()).all(|delivery| {
                    world.requests[delivery].iter().all(|request| {
                        world.holder(delivery, request.lease).is_some()
                            || world.accounts_for(delivery, request.lease)
                            || world.store.rows[delivery].is_under(request.lease)
                            || world.store.rows[delivery].abandoned == Some(request.lease)
                    })
                })
            }),
            Property::always("an answer that came is what is recorded", |_, world: &World| {
                world.store.rows.iter().zip(&world.requests).all(|(row, requests)| {
                    row.audit.iter().flatten().all(|record| match *record {
                        Record::Known { lease, answer } => requests.iter().any(|request| {
                            request.lease == lease && request.answered == (answer == Answer::Success)
                        }),
                        Record::Unknown { .. } => true,
                    })
                })
            }),
            Property::always(
                "nothing is sent again before its last request is accounted for",
                |_, world: &World| !world.flaws.sent_too_soon,
            ),
            Property::always("a delivery arrives again at most once per lost lease", |_, world: &World| {
                (0..world.store.rows.len())
                    .all(|delivery| world.duplicates(delivery) <= world.losses(delivery))
            }),
            Property::always("one probe is under way at a time", |_, world: &World| {
                world.probes_under_way() <= 1
            }),
            // the model is not empty
            Property::sometimes("a delivery is completed", |_, world: &World| {
                world.store.rows.iter().any(|row| row.place == Place::Completed)
            }),
            Property::sometimes("a delivery fails for good", |_, world: &World| {
                world.store.rows.iter().any(|row| row.place == Place::Failed)
            }),
            Property::sometimes("a delivery is sent twice", |_, world: &World| {
                (0..world.store.rows.len()).any(|delivery| world.duplicates(delivery) > 0)
            }),
            Property::sometimes("an outcome comes late and counts", |_, world: &World| {
                world.store.rows.iter().any(|row| {
                    row.audit.iter().flatten().any(
                        |record| matches!(record, Record::Known { lease, .. } if lease.at < row.clock && row.is_terminal()),
                    )
                })
            }),
        ]
    }
}

/// The protocol as it is, with so many faults of any kind.
fn protocol(deliveries: usize, faults: u8) -> Run {
    Run {
        deliveries,
        retries_max: 1,
        circuit: Circuit::Closed,
        faults: Faults { any: faults, openings: 0, failed_probes: 0 },
        fences: Fences::ALL,
        answers_first: true,
    }
}

/// The same with a circuit that is open at first, and may open again.
fn with_circuit(run: Run) -> Run {
    let faults = Faults { openings: 1, failed_probes: 1, ..run.faults };
    Run { circuit: Circuit::Open { due: true }, faults, ..run }
}

/// How many faults the runs of two deliveries have: one, unless whoever has hours and memory asks for more by `FAULTS`.
fn faults_beside_two_deliveries() -> u8 {
    std::env::var("FAULTS").map_or(1, |text| text.parse().expect("FAULTS is a number"))
}

/// Explores all runs, and shows how a promise is broken.
fn prove(run: Run) {
    let checker = run.checker().threads(THREADS).spawn_bfs().join();
    println!("{} states, {} steps deep: {run:?}", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
}

/// Explores runs until one breaks this promise, and shows how.
fn assert_breaks(run: Run, promise: &'static str) {
    let until = HasDiscoveries::AnyOf(BTreeSet::from([promise]));
    let checker = run.checker().threads(THREADS).finish_when(until).spawn_bfs().join();
    let path = checker.assert_any_discovery(promise);
    println!(
        "{} states until this run is found to break \"{promise}\":\n{path}",
        checker.unique_state_count()
    );
}

#[test]
fn every_promise_holds_for_one_delivery_whatever_two_faults_there_are() {
    prove(protocol(1, 2));
}

#[test]
fn every_promise_holds_for_two_deliveries_whatever_fault_there_is() {
    prove(protocol(2, faults_beside_two_deliveries()));
}

#[test]
fn every_promise_holds_for_a_delivery_that_probes_a_circuit_whatever_two_faults_there_are() {
    prove(with_circuit(protocol(1, 2)));
}

#[test]
fn every_promise_holds_for_two_deliveries_that_probe_a_circuit_whatever_fault_there_is() {
    // without retries, to keep it small: then nothing that was lost is sent again
    let run = Run { retries_max: 0, ..with_circuit(protocol(2, faults_beside_two_deliveries())) };
    let checker = run.checker().threads(THREADS).spawn_bfs().join();
    println!("{} states, {} steps deep: {run:?}", checker.unique_state_count(), checker.max_depth());
    for property in run.properties().iter().filter(|property| property.expectation == Expectation::Always) {
        checker.assert_no_discovery(property.name);
    }
}

/// Steps use something up: leases, attempts, faults. So a run ends, and what is to happen in the end does happen.
#[test]
fn no_run_is_endless() {
    let run = with_circuit(protocol(1, 1));
    let fingerprint = |world: &World| BuildHasherDefault::<DefaultHasher>::new().hash_one(world);
    let (mut open, mut closed) = (HashSet::new(), HashSet::new());
    let mut path = vec![(run.beginning(), None::<Vec<World>>)];
    while let Some((world, unexplored)) = path.last_mut() {
        let print = fingerprint(world);
        if unexplored.is_none() {
            assert!(open.insert(print), "a run comes back to {world:#?}");
            let next = run.steps(world).into_iter().map(|step| run.after(world, step));
            *unexplored = Some(next.filter(|next| !closed.contains(&fingerprint(next))).collect());
        }
        match unexplored.as_mut().expect("it is known now").pop() {
            Some(next) if closed.contains(&fingerprint(&next)) => {}
            Some(next) => path.push((next, None)),
            None => {
                open.remove(&print);
                closed.insert(print);
                path.pop();
            }
        }
    }
    println!("{} states", closed.len());
}

#[test]
fn a_settle_without_its_fence_breaks_a_promise() {
    let fences = Fences { settle: false, ..Fences::ALL };
    assert_breaks(Run { fences, ..protocol(1, 2) }, "only a lease that ended is recorded as lost");
}

#[test]
fn a_release_without_its_fence_breaks_a_promise() {
    let fences = Fences { release: false, ..Fences::ALL };
    assert_breaks(Run { fences, ..protocol(1, 2) }, "a request is recorded, or stands as a lost lease");
}

#[test]
fn a_circuit_that_heeds_a_probe_that_is_long_over_is_probed_twice_at_a_time() {
    let fences = Fences { circuit: false, ..Fences::ALL };
    let run = Run { fences, retries_max: 0, ..with_circuit(protocol(2, 1)) };
    assert_breaks(run, "one probe is under way at a time");
}

#[test]
fn a_time_limit_that_outweighs_an_answer_breaks_a_promise() {
    let run = Run { answers_first: false, ..protocol(1, 1) };
    assert_breaks(run, "an answer that came is what is recorded");
}
