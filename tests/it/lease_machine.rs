//! The statements of the lease protocol, in any order, on a real PostgreSQL: after each one the database must be as
//! [`protocol`] says. `tests/model` proves what follows from that.

#[path = "../model/protocol.rs"]
mod protocol;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngSeed, TestError, TestRunner};
use sqlx::AssertSqlSafe;
use tokio::runtime::Runtime;
use uuid::Uuid;
use webhook_processor::application::ports::{
    CircuitStore, Claim, Claimed, DeliveryQueue as _, EndpointStore as _, Incoming, ProbeLease, Settled,
    Stored, UnsuccessfulProbe, UnusedLease, WantedLease,
};
use webhook_processor::application::workers::ledger::Rooms;
use webhook_processor::domain::attempt::{self, AttemptOutcome};
use webhook_processor::domain::delivery::{
    self, AttemptTimes, FinishedAttempt, LeasedDelivery, NewDelivery, QueueId, WorkerId,
};
use webhook_processor::domain::endpoint::{Endpoint, EndpointId};
use webhook_processor::domain::event::{Event, EventParts};
use webhook_processor::domain::evidence::Evidence;
use webhook_processor::domain::retry::{DeadLetterReason, Verdict};
use webhook_processor::infrastructure::postgres::Database;

use self::protocol::{
    Answer, Circuit, Ending, Fences, Finished, Lease, Name, Place, Record, Row, Store, Taken, Work,
};
use crate::support::postgres::TestDatabase;

const DELIVERIES: usize = 3;
const RETRIES_MAX: u8 = 2;
/// Far longer than a run takes: time passes only where a step says so.
const LEASE_TERM: Duration = Duration::from_hours(1);
/// Longer than a lease.
const WHILE: TimeDelta = TimeDelta::hours(2);
/// Each is a run of up to [`STEPS_MAX`] statements.
const CASES: u32 = 100;
const STEPS_MAX: usize = 40;
/// Replays a run that failed.
const SEED: &str = "LEASE_MACHINE_SEED";

/// A statement, or the passage of time.
#[derive(Debug, Clone)]
enum Step {
    /// The next delivery is stored, perhaps under a lease.
    Enqueue(Option<u8>),
    Claim {
        name: u8,
        limit: usize,
    },
    TakeOverHeld(u8),
    /// The outcomes of leases that were taken at some time are written in one batch. Takeovers record losses.
    Settle {
        leases: Vec<Index>,
        success: bool,
    },
    Release(Index),
    /// The lease that a delivery may have been stored under is given back.
    ReleaseStored {
        delivery: Index,
        name: u8,
    },
    ReleaseLostClaims {
        name: u8,
        kept: Option<Index>,
    },
    Promote,
    LeaseExpires(Index),
    OpenCircuit,
    ProbeFallsDue,
    /// The circuit is informed of a probe that was sent at some time.
    NoteProbe {
        lease: Index,
        success: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let name = || 0..2_u8;
    prop_oneof![
        3 => proptest::option::of(name()).prop_map(Step::Enqueue),
        6 => (name(), 1..=2_usize).prop_map(|(name, limit)| Step::Claim { name, limit }),
        3 => name().prop_map(Step::TakeOverHeld),
        7 => (prop::collection::vec(any::<Index>(), 1..=2), prop::bool::weighted(0.2))
            .prop_map(|(leases, success)| Step::Settle { leases, success }),
        2 => any::<Index>().prop_map(Step::Release),
        2 => (any::<Index>(), name()).prop_map(|(delivery, name)| Step::ReleaseStored { delivery, name }),
        1 => (name(), proptest::option::of(any::<Index>()))
            .prop_map(|(name, kept)| Step::ReleaseLostClaims { name, kept }),
        3 => Just(Step::Promote),
        4 => any::<Index>().prop_map(Step::LeaseExpires),
        2 => Just(Step::OpenCircuit),
        3 => Just(Step::ProbeFallsDue),
        2 => (any::<Index>(), any::<bool>()).prop_map(|(lease, success)| Step::NoteProbe { lease, success }),
    ]
}

/// A lease that somebody took, and may still believe in.
struct Known {
    delivery: usize,
    taken: Taken,
}

/// The real store beside the one that says how it must be.
struct Machine {
    queue: Database,
    database: TestDatabase,
    endpoint: Endpoint,
    accepted: Vec<NewDelivery>,
    store: Store,
    known: Vec<Known>,
    /// When each lease of a delivery began, by the database's clock. Where time passes, this is moved back.
    began: HashMap<(usize, u8), DateTime<Utc>>,
}

fn worker(Name(name): Name) -> WorkerId {
    WorkerId::new("test", 1, 1, usize::from(name))
}

impl Machine {
    async fn new(database: TestDatabase) -> Self {
        let id: i64 = database
            .scalar(
                "insert into webhook_configs (name, postback_url, max_retries, circuit_cooldown_ms, circuit_cooldown_cap_ms)
                 values ('test', 'http://127.0.0.1:1/', 2, 3600000, 3600000) returning id",
            )
            .await;
        let queue = Database::new(database.options.clone(), 2);
        let endpoint = queue.find(EndpointId::from_stored(id)).await.unwrap().unwrap();
        let store = Store::new(DELIVERIES, Circuit::Closed);
        Self { queue, database, endpoint, accepted: vec![], store, known: vec![], began: HashMap::new() }
    }

    /// Begins anew with an empty store.
    async fn clear(&mut self) {
        self.database
            .execute(
                "delete from webhook_queue; delete from webhook_probes;
                 update webhook_configs set circuit_state = 'closed', circuit_reason = null, circuit_probe_error = null,
                   circuit_probe_at = null, circuit_changed_at = null, circuit_failed_probes = 0",
            )
            .await;
        self.accepted.clear();
        self.known.clear();
        self.began.clear();
        self.store = Store::new(DELIVERIES, Circuit::Closed);
    }

    /// Does one step on both sides. What the real one answers must be what the other one says.
    async fn take(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Enqueue(name) => self.enqueue(name.map(Name)).await?,
            Step::Claim { name, limit } => self.claim(Name(*name), *limit).await?,
            Step::TakeOverHeld(name) => self.take_over_held(Name(*name)).await?,
            Step::Settle { leases, success } => self.settle(leases, *success).await?,
            Step::Release(lease) => {
                if !self.known.is_empty() {
                    let Known { delivery, taken } = lease.get(&self.known);
                    self.release(*delivery, taken.lease.name, Some(taken.lease.at)).await?;
                }
            }
            Step::ReleaseStored { delivery, name } => {
                if !self.accepted.is_empty() {
                    self.release(delivery.index(self.accepted.len()), Name(*name), None).await?;
                }
            }
            Step::ReleaseLostClaims { name, kept } => {
                let kept =
                    kept.filter(|_| !self.accepted.is_empty()).map(|kept| kept.index(self.accepted.len()));
                let kept: Vec<usize> = kept.into_iter().collect();
                let ids: Vec<QueueId> = kept.iter().map(|&kept| self.accepted[kept].queue_id).collect();
                let released = self.queue.release_lost_claims(&[worker(Name(*name))], &ids).await.unwrap();
                let expected = self.store.release_lost_claims(&[Name(*name)], &kept, Fences::ALL);
                prop_assert_eq!(released, expected as u64);
            }
            Step::Promote => self.promote().await?,
            Step::LeaseExpires(delivery) => {
                if !self.accepted.is_empty() {
                    self.expire(delivery.index(self.accepted.len())).await;
                }
            }
            Step::OpenCircuit => {
                let url = "http://127.0.0.1:1/";
                self.queue.open(self.endpoint.id, url, "failures", Duration::ZERO).await.unwrap();
                self.store.open_circuit();
            }
            Step::ProbeFallsDue => self.let_a_probe_fall_due().await,
            Step::NoteProbe { lease, success } => self.note_probe(lease, *success).await,
        }
        Ok(())
    }

    async fn enqueue(&mut self, name: Option<Name>) -> Result<(), TestCaseError> {
        let next = self.accepted.len();
        if next == DELIVERIES {
            return Ok(());
        }
        let config_id = self.endpoint.id.get();
        let parts = EventParts { event_type: "+credit".into(), config_id, ..EventParts::default() };
        let event = Event::parse(parts).unwrap();
        let delivery = NewDelivery::new(QueueId::new(Uuid::now_v7()), &event, &self.endpoint).unwrap();
        let worker_id = name.map(worker);
        let lease = worker_id.as_ref().map(|worker_id| WantedLease { worker_id, term: LEASE_TERM });

        let stored = self.queue.enqueue(&[Incoming { delivery: &delivery, lease }]).await.unwrap();

        let taken = self.store.enqueue(next, name);
        let Stored::New { locked_at } = stored[0] else { panic!("it is new: {stored:?}") };
        prop_assert_eq!(locked_at.is_some(), taken.is_some());
        self.accepted.push(delivery);
        if let (Some(began), Some(taken)) = (locked_at, taken) {
            self.remember(next, taken, began);
        }
        Ok(())
    }

    fn remember(&mut self, delivery: usize, taken: Taken, began: DateTime<Utc>) {
        self.began.insert((delivery, taken.lease.at), began);
        self.known.push(Known { delivery, taken });
    }

    async fn claim(&mut self, name: Name, limit: usize) -> Result<(), TestCaseError> {
        let mut claim = Claim {
            worker_ids: vec![worker(name); limit],
            lease_term: LEASE_TERM,
            after: None,
            rooms: Rooms { limit, share: limit, listed: vec![] },
        };
        let mut leased = Vec::new();
        loop {
            let Claimed { deliveries, look_again } = self.queue.claim(&claim).await.unwrap();
            claim.worker_ids.truncate(claim.worker_ids.len() - deliveries.len());
            leased.extend(deliveries);
            if !look_again {
                break;
            }
        }
        let free: Vec<usize> = (0..DELIVERIES).filter(|&delivery| self.store.may_claim(delivery)).collect();
        let room = if self.store.circuit == Circuit::Closed { limit } else { 1 };
        prop_assert_eq!(leased.len(), free.len().min(room), "what may be claimed: {:?}", free);
        if self.store.circuit != Circuit::Closed {
            let fresh = free.iter().any(|&delivery| self.store.rows[delivery].attempt == 0);
            prop_assert!(
                leased.iter().all(|probe| (probe.attempt == 0) == fresh),
                "what is fresh is probed with"
            );
        }
        for leased in leased {
            let delivery = self.number_of(&leased);
            prop_assert!(self.store.may_claim(delivery), "delivery {} was claimed", delivery);
            self.taken(delivery, name, &leased)?;
        }
        Ok(())
    }

    async fn take_over_held(&mut self, name: Name) -> Result<(), TestCaseError> {
        let leased = self.queue.take_over_held(&worker(name), LEASE_TERM, DELIVERIES).await.unwrap();
        let lost = (0..DELIVERIES).filter(|&delivery| self.store.may_take_over_held(delivery)).count();
        prop_assert_eq!(leased.len(), lost);
        for leased in leased {
            let delivery = self.number_of(&leased);
            prop_assert!(self.store.may_take_over_held(delivery), "delivery {} was taken over", delivery);
            self.taken(delivery, name, &leased)?;
        }
        Ok(())
    }

    fn number_of(&self, leased: &LeasedDelivery) -> usize {
        let number = self.accepted.iter().position(|accepted| accepted.queue_id == leased.queue_id);
        number.expect("only what was accepted can be claimed")
    }

    fn taken(&mut self, delivery: usize, name: Name, leased: &LeasedDelivery) -> Result<(), TestCaseError> {
        let taken = self.store.take(delivery, name);
        let work = match leased.work {
            delivery::Work::Attempt { .. } => Work::Attempt { probe: leased.probe },
            delivery::Work::RecordLoss { .. } => Work::RecordLoss,
        };
        prop_assert_eq!((taken.number, taken.work), (leased.attempt, work));
        prop_assert_eq!(&leased.lease.worker_id, &worker(name));
        self.remember(delivery, taken, leased.lease.locked_at);
        Ok(())
    }

    async fn settle(&mut self, leases: &[Index], success: bool) -> Result<(), TestCaseError> {
        if self.known.is_empty() {
            return Ok(());
        }
        let mut batch: Vec<(usize, Finished)> = Vec::new();
        for lease in leases {
            let &Known { delivery, taken } = lease.get(&self.known);
            let finished = finished(taken, success);
            // a worker writes one outcome of one attempt
            if batch.iter().all(|&(of, other)| of != delivery || order(other) != order(finished)) {
                batch.push((delivery, finished));
            }
        }
        let attempts: Vec<FinishedAttempt> =
            batch.iter().map(|(delivery, finished)| self.attempt(*delivery, *finished)).collect();

        let settled = self.queue.settle(&attempts.iter().collect::<Vec<_>>()).await.unwrap();

        let mut written: Vec<_> = batch.into_iter().zip(settled).collect();
        // the order in which a batch is written
        written.sort_by_key(|((_, finished), _)| order(*finished));
        for ((delivery, finished), settled) in written {
            let expected = self.store.settle(delivery, finished, Fences::ALL);
            prop_assert_eq!(settled == Settled::Written, expected, "{:?} of delivery {}", finished, delivery);
        }
        Ok(())
    }

    fn attempt(&self, delivery: usize, finished: Finished) -> FinishedAttempt {
        let NewDelivery { queue_id, config_id, webhook_url, .. } = &self.accepted[delivery];
        let now = Instant::now();
        FinishedAttempt {
            queue_id: *queue_id,
            lease: delivery::Lease {
                worker_id: worker(finished.lease.name),
                locked_at: self.began[&(delivery, finished.lease.at)],
            },
            config_id: *config_id,
            webhook_url: webhook_url.clone(),
            number: finished.number,
            times: match finished.answer {
                Some(_) => AttemptTimes::Measured { started: now, ended: now },
                None => AttemptTimes::Lost { found: now, leased_for: LEASE_TERM },
            },
            outcome: finished.answer.map_or(AttemptOutcome::Unknown, |answer| {
                AttemptOutcome::Answered(attempt::Answer {
                    status: if answer == Answer::Success { 200 } else { 503 },
                    body: text(finished.lease, answer),
                    retry_after: None,
                    broken_off: None,
                    evidence: Evidence::default(),
                })
            }),
            verdict: match finished.ending {
                Ending::Completed => Verdict::Completed,
                Ending::Retry => Verdict::RetryIn(Duration::from_hours(1)),
                Ending::DeadLetter => Verdict::DeadLetter(DeadLetterReason::RetriesExhausted),
                Ending::WaitsOn => Verdict::WaitsOn,
            },
        }
    }

    async fn release(&mut self, delivery: usize, name: Name, at: Option<u8>) -> Result<(), TestCaseError> {
        let queue_id = self.accepted[delivery].queue_id;
        let locked_at = at.map(|at| self.began[&(delivery, at)]);
        let unused = UnusedLease { queue_id, worker_id: worker(name), locked_at };
        let released = self.queue.release(&[unused]).await.unwrap();
        prop_assert_eq!(!released.is_empty(), self.store.release(delivery, name, at, Fences::ALL));
        Ok(())
    }

    async fn promote(&mut self) -> Result<(), TestCaseError> {
        self.database
            .execute("update webhook_queue_open set next_retry_at = now() where ready_since is null")
            .await;
        let promoted = self.queue.promote(DELIVERIES).await.unwrap().promoted;
        let due = |&delivery: &usize| self.store.rows[delivery].place == Place::Pending { ready: false };
        let due: Vec<usize> = (0..DELIVERIES).filter(due).collect();
        prop_assert_eq!(promoted, due.len());
        for delivery in due {
            self.store.promote(delivery);
        }
        Ok(())
    }

    /// Lets the time of a lease pass: it and its probe were begun that much earlier.
    async fn expire(&mut self, delivery: usize) {
        let Place::Leased { lease, over: false } = self.store.rows[delivery].place else { return };
        let (began, queue_id) = (self.began[&(delivery, lease.at)], self.accepted[delivery].queue_id.get());
        self.database
            .execute_with(
                "update webhook_configs set circuit_probe_at = circuit_probe_at - interval '2 hours'
                 from webhook_queue_open q where q.queue_id = $1 and circuit_probe_at = q.lock_expires_at",
                queue_id,
            )
            .await;
        self.database
            .execute_with(
                "update webhook_queue_open
                 set locked_at = locked_at - interval '2 hours', lock_expires_at = lock_expires_at - interval '2 hours',
                     created_at = case when created_at = locked_at then created_at - interval '2 hours' else created_at end
                 where queue_id = $1 and status = 'processing'",
                queue_id,
            )
            .await;
        self.began.insert((delivery, lease.at), began - WHILE);
        self.store.expire(delivery);
    }

    async fn let_a_probe_fall_due(&mut self) {
        match self.store.circuit {
            Circuit::HalfOpen { probe: Some((delivery, lease)), due: false }
                if self.store.rows[delivery].is_under(lease) =>
            {
                self.expire(delivery).await;
            }
            Circuit::Open { due: false } | Circuit::HalfOpen { due: false, .. } => {
                if let Circuit::HalfOpen { probe: Some((delivery, lease)), .. } = self.store.circuit {
                    let began = self.began.get_mut(&(delivery, lease.at)).expect("the probe has a lease");
                    *began -= WHILE;
                }
                self.database
                    .execute(
                        "update webhook_configs set circuit_probe_at = circuit_probe_at - interval '2 hours'",
                    )
                    .await;
                self.store.probe_falls_due();
            }
            Circuit::Closed | Circuit::Open { due: true } | Circuit::HalfOpen { due: true, .. } => {}
        }
    }

    async fn note_probe(&mut self, lease: &Index, success: bool) {
        let is_probe = |known: &&Known| known.taken.work == Work::Attempt { probe: true };
        let probes: Vec<&Known> = self.known.iter().filter(is_probe).collect();
        if probes.is_empty() {
            return;
        }
        let Known { delivery, taken } = *lease.get(&probes);
        let (delivery, lease) = (*delivery, taken.lease);
        if success {
            CircuitStore::close(&self.queue, self.endpoint.id).await.unwrap();
            // what recovers is limited for ten seconds
            self.database
                .execute(
                    "update webhook_configs set circuit_changed_at = circuit_changed_at - interval '1 hour'",
                )
                .await;
            self.store.close_circuit();
        } else {
            let probe = UnsuccessfulProbe {
                error: "no answer".into(),
                receiver_fails: true,
                retry_after: Duration::ZERO,
            };
            let lease_of_probe = ProbeLease { began: self.began[&(delivery, lease.at)], term: LEASE_TERM };
            self.queue.reopen(self.endpoint.id, lease_of_probe, &probe).await.unwrap();
            self.store.reopen_circuit(delivery, lease, Fences::ALL);
        }
    }

    /// Compares all that is stored.
    async fn check(&self) -> Result<(), TestCaseError> {
        let ids: Vec<Uuid> = self.accepted.iter().map(|accepted| accepted.queue_id.get()).collect();
        let real: Vec<String> =
            sqlx::query_scalar(PICTURE).bind(ids).fetch_all(&self.database.pool).await.unwrap();
        let rows = self.store.rows.iter().enumerate().take(self.accepted.len());
        let mut expected: Vec<String> = rows.map(|(delivery, row)| self.picture(delivery, row)).collect();
        expected.push(format!(
            "circuit: {}",
            match self.store.circuit {
                Circuit::Closed => "closed".to_owned(),
                Circuit::Open { due } => format!("open, due {due}"),
                Circuit::HalfOpen { due, .. } => format!("half_open, due {due}"),
            }
        ));
        prop_assert_eq!(real, expected);
        Ok(())
    }

    /// A row as [`PICTURE`] shows it.
    fn picture(&self, delivery: usize, row: &Row) -> String {
        let lease = |lease: Option<Lease>| {
            lease.map_or("none".to_owned(), |lease| {
                format!(
                    "{} {}",
                    worker(lease.name).as_str(),
                    self.began[&(delivery, lease.at)].timestamp_micros()
                )
            })
        };
        let (status, held, over) = match row.place {
            Place::Absent => unreachable!("it was accepted"),
            Place::Pending { ready: true } => ("pending, ready", None, false),
            Place::Pending { ready: false } => ("pending", None, false),
            Place::Leased { lease, over } => ("processing, ready", Some(lease), over),
            Place::Completed => ("completed", None, false),
            Place::Failed => ("failed", None, false),
        };
        let audit = row.audit.iter().flatten().map(|record| match *record {
            Record::Known { lease, answer } => text(lease, answer),
            Record::Unknown { .. } => "unknown".to_owned(),
        });
        let probes = row.probes.iter().map(|lease| text(*lease, Answer::Failure));
        format!(
            "{status}; lease {}, over {over}; abandoned {}; attempt {}: {}; probes: {}",
            lease(held),
            lease(row.abandoned),
            row.attempt,
            audit.collect::<Vec<_>>().join(", "),
            probes.collect::<Vec<_>>().join(", "),
        )
    }
}

/// All that the protocol is about, in the order in which deliveries were accepted, then the circuit.
const PICTURE: &str = "
    select q.status || case when q.ready_since is not null then ', ready' else '' end
           || '; lease ' || coalesce(q.worker_id || ' ' || (extract(epoch from q.locked_at) * 1000000)::bigint, 'none')
           || ', over ' || coalesce(q.lock_expires_at < now(), false)
           || '; abandoned ' || coalesce(q.abandoned_by || ' ' || (extract(epoch from q.abandoned_at) * 1000000)::bigint, 'none')
           || '; attempt ' || q.retry_count || ': ' || coalesce(
             (select string_agg(case when a.duration_ms is null then 'unknown' else a.response_body end, ', ' order by a.attempt)
              from webhook_attempts a where a.queue_id = q.queue_id and not a.probe), '')
           || '; probes: ' || coalesce(
             (select string_agg(p.response_body, ', ' order by p.number) from webhook_probes p where p.queue_id = q.queue_id), ''),
           accepted.number
    from unnest($1::uuid[]) with ordinality as accepted (queue_id, number)
    join webhook_queue q on q.queue_id = accepted.queue_id
    union all
    select 'circuit: ' || circuit_state || coalesce(', due ' || (circuit_probe_at <= now()), ''), null from webhook_configs
    order by 2 nulls last";

/// What the receiver says to the request under a lease.
fn text(lease: Lease, answer: Answer) -> String {
    format!("{answer:?} under lease {}", lease.at)
}

/// How the attempt under a lease ends.
fn finished(taken: Taken, success: bool) -> Finished {
    let Taken { lease, number, work } = taken;
    let answer = if success { Answer::Success } else { Answer::Failure };
    let (answer, ending) = match (work, answer) {
        (Work::Attempt { .. }, Answer::Success) => (Some(answer), Ending::Completed),
        (Work::Attempt { probe: true }, Answer::Failure) => (Some(answer), Ending::WaitsOn),
        (Work::Attempt { probe: false }, Answer::Failure) if number < RETRIES_MAX => {
            (Some(answer), Ending::Retry)
        }
        (Work::Attempt { probe: false }, Answer::Failure) => (Some(answer), Ending::DeadLetter),
        (Work::RecordLoss, _) if number < RETRIES_MAX => (None, Ending::Retry),
        (Work::RecordLoss, _) => (None, Ending::DeadLetter),
    };
    Finished { lease, number, answer, ending }
}

/// In which order a batch is written; what is equal is written by one statement.
fn order(finished: Finished) -> (u8, bool, u8) {
    let ending = match finished.ending {
        Ending::Retry => 0,
        Ending::Completed | Ending::DeadLetter => 1,
        Ending::WaitsOn => 2,
    };
    (finished.number, finished.answer.is_none(), ending)
}

/// Runs cases on a database of their own, which `change` has changed, until one fails.
fn run(seed: u64, cases: u32, shrinks: u32, change: Option<&str>) -> Result<(), TestError<Vec<Step>>> {
    let runtime = Runtime::new().unwrap();
    let machine = runtime.block_on(async {
        let database = TestDatabase::new().await;
        if let Some(change) = change {
            sqlx::raw_sql(AssertSqlSafe(change.to_owned())).execute(&database.pool).await.unwrap();
        }
        tokio::sync::Mutex::new(Machine::new(database).await)
    });
    let config = Config {
        cases,
        max_shrink_iters: shrinks,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(seed),
        ..Config::default()
    };
    TestRunner::new(config).run(&prop::collection::vec(step(), 1..=STEPS_MAX), |steps| {
        runtime.block_on(async {
            let mut machine = machine.lock().await;
            machine.clear().await;
            for step in &steps {
                machine.take(step).await?;
                machine.check().await?;
            }
            Ok(())
        })
    })
}

#[test]
fn the_store_does_what_the_protocol_says_whatever_is_asked_in_whatever_order() {
    let given = std::env::var(SEED).ok().map(|seed| seed.parse().expect("a number"));
    let seed = given.unwrap_or_else(rand::random);
    println!("{SEED}={seed} replays this");
    run(seed, CASES, 300, None).unwrap_or_else(|fault| panic!("{SEED}={seed} replays this\n{fault}"));
}

/// Replaces a part of the source of functions, which must be there.
fn without_fence(functions: &[&str], fence: &str, instead: &str) -> String {
    let replaced = functions.iter().map(|function| {
        format!(
            "do $do$ declare
               old text := (select pg_get_functiondef(oid) from pg_proc where proname = '{function}');
               new text := regexp_replace(old, $re${fence}$re$, $to${instead}$to$);
             begin
               assert new <> old, 'there is no such fence in {function}';
               execute new;
             end $do$;"
        )
    });
    replaced.collect()
}

/// A database with this change is found to break the protocol. The seed is always the same.
fn assert_found(change: &str) {
    let found = run(1, 20 * CASES, 0, Some(change));
    assert!(matches!(found, Err(TestError::Fail(..))), "it was not found: {found:?}");
}

#[test]
fn a_settle_without_its_fence_is_found() {
    let functions: Vec<String> = (0..=RETRIES_MAX)
        .flat_map(|number| ["retry", "terminal"].map(|ending| format!("webhook_settle_{number}_{ending}")))
        .collect();
    let functions: Vec<&str> = functions.iter().map(String::as_str).collect();
    let change = without_fence(
        &functions,
        r"AND \(q\.worker_id = o\.worker.*?IN \(\d, \d \+ 1\)\)",
        "AND q.status = 'processing'",
    );
    assert_found(&change);
}

#[test]
fn a_release_without_its_fence_is_found() {
    let change = without_fence(
        &["webhook_release"],
        r"AND q\.locked_at = kept\.locked_at\s+AND \(q\.worker_id.*?kept\.given_back\)\s+RETURNING",
        "RETURNING",
    );
    assert_found(&change);
}

#[test]
fn a_release_that_makes_up_for_a_probe_under_another_lease_is_found() {
    let change = without_fence(&["webhook_release"], r"AND q\.locked_at = coalesce\(.*?END\)", "");
    assert_found(&change);
}

#[test]
fn a_probe_that_is_forgotten_because_its_lease_was_taken_over_is_found() {
    let change = without_fence(&["webhook_settle_probe"], r"OR q\.abandoned_by.*?o\.locked_at\)", ")");
    assert_found(&change);
}
