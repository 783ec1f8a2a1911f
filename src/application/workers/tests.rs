//! The claimer's rules, on a store in memory: no database is needed to see them kept or broken.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use tokio::sync::Semaphore;

use super::ledger::Rooms;
use super::*;
use crate::application::circuits::Circuits;
use crate::application::deliver::AttemptLimits;
use crate::application::directory::EndpointDirectory;
use crate::application::ports::{
    Change, CircuitStore, Claim, Claimed, EndpointStore, HeldCircuit, Incoming, ProbeLease, Promotion,
    Sender, Settled, StoreError, Stored, UnsuccessfulProbe, UnusedLease,
};
use crate::domain::attempt::{Answer, AttemptOutcome};
use crate::domain::circuit::CircuitCommand;
use crate::domain::delivery::{FinishedAttempt, Lease, LeasedDelivery, NewDelivery, Priority, QueueId, Work};
use crate::domain::endpoint::{Endpoint, EndpointId};
use crate::domain::endpoint_settings::{EndpointParts, EndpointSettings};
use crate::domain::evidence::Evidence;

const URL: &str = "http://receiver.example/";

/// A queue of deliveries of one endpoint.
#[derive(Default)]
struct Store {
    waiting: Mutex<VecDeque<QueueId>>,
    claims: Mutex<Vec<Claim>>,
    /// What the next claims answer instead of deliveries.
    claim_errors: Mutex<VecDeque<StoreError>>,
    settled: AtomicUsize,
    looked_for: Mutex<Vec<WorkerId>>,
    /// How many claims see but one delivery of those that wait, and say so.
    short_sighted: AtomicUsize,
    /// Done in the middle of the first claim.
    amid_claim: Mutex<Option<fn(&Store)>>,
    wakeup: Arc<Wakeup>,
}

impl Store {
    fn add(&self, count: usize) {
        self.waiting.lock().unwrap().extend((0..count).map(|_| QueueId::new(uuid::Uuid::now_v7())));
    }

    fn claims(&self) -> Vec<Claim> {
        self.claims.lock().unwrap().clone()
    }

    fn settled(&self) -> usize {
        self.settled.load(Ordering::SeqCst)
    }
}

fn lost() -> std::sync::Arc<anyhow::Error> {
    Arc::new(anyhow::anyhow!("on purpose"))
}

fn endpoint() -> Endpoint {
    Endpoint::of(EndpointParts { postback_url: Some(Some(URL.into())), ..EndpointParts::default() })
}

#[async_trait]
impl DeliveryQueue for Store {
    async fn claim(&self, claim: &Claim) -> Result<Claimed, StoreError> {
        self.claims.lock().unwrap().push(claim.clone());
        if let Some(error) = self.claim_errors.lock().unwrap().pop_front() {
            return Err(error);
        }
        let short_sighted = |left: usize| left.checked_sub(1);
        let look_again =
            self.short_sighted.fetch_update(Ordering::SeqCst, Ordering::SeqCst, short_sighted).is_ok();
        let limit = if look_again { 1 } else { claim.worker_ids.len() };
        let room = claim.rooms.of(EndpointId::from_stored(1)).min(limit);
        let taken: Vec<QueueId> = {
            let mut waiting = self.waiting.lock().unwrap();
            let count = room.min(waiting.len());
            waiting.drain(..count).collect()
        };
        if let Some(amid) = self.amid_claim.lock().unwrap().take() {
            amid(self);
        }
        let lease = |worker_id: &WorkerId| Lease { worker_id: worker_id.clone(), locked_at: Utc::now() };
        let deliveries = taken
            .into_iter()
            .zip(&claim.worker_ids)
            .map(|(queue_id, worker_id)| LeasedDelivery {
                queue_id,
                lease: lease(worker_id),
                config_id: EndpointId::from_stored(1),
                config_revision: DateTime::UNIX_EPOCH,
                event_id: "e".into(),
                webhook_url: URL.into(),
                traceparent: None,
                attempt: 0,
                max_retries: 6,
                priority: Priority::default(),
                probe: false,
                in_flight_limited: false,
                claimed_at: Instant::now(),
                work: Work::Attempt { waited: Duration::ZERO, starts_at: None },
            })
            .collect();
        Ok(Claimed { deliveries, look_again })
    }

    async fn take_over_held(
        &self,
        _: &WorkerId,
        _: Duration,
        _: usize,
    ) -> Result<Vec<LeasedDelivery>, StoreError> {
        Ok(vec![])
    }

    async fn settle(&self, attempts: &[&FinishedAttempt]) -> Result<Vec<Settled>, StoreError> {
        self.settled.fetch_add(attempts.len(), Ordering::SeqCst);
        Ok(vec![Settled::Written; attempts.len()])
    }

    async fn release_lost_claims(&self, workers: &[WorkerId], _: &[QueueId]) -> Result<u64, StoreError> {
        self.looked_for.lock().unwrap().extend_from_slice(workers);
        Ok(0)
    }

    async fn promote(&self, _: usize) -> Result<Promotion, StoreError> {
        Ok(Promotion { promoted: 0, next_due_in: None })
    }

    async fn release(&self, _: &[UnusedLease]) -> Result<Vec<QueueId>, StoreError> {
        Ok(vec![])
    }

    async fn enqueue(&self, _: &[Incoming<'_>]) -> Result<Vec<Stored>, StoreError> {
        unreachable!("nothing is accepted here")
    }

    async fn can_settle(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn recorded(&self, _: &[&FinishedAttempt]) -> Result<Vec<QueueId>, StoreError> {
        unreachable!("no settle is in doubt")
    }

    async fn reroute(&self, _: &NewDelivery, _: &str) -> Result<Option<Stored>, StoreError> {
        unreachable!("nothing is sent elsewhere")
    }
}

#[async_trait]
impl EndpointStore for Store {
    async fn find_all(&self, _: &[EndpointId]) -> Result<Vec<Endpoint>, StoreError> {
        Ok(vec![endpoint()])
    }

    async fn register(&self, _: &EndpointSettings, _: &Change<'_>) -> Result<Endpoint, StoreError> {
        unreachable!("there is one endpoint")
    }

    async fn list(&self, _: Option<EndpointId>, _: usize) -> Result<Vec<Endpoint>, StoreError> {
        unreachable!("nobody asks")
    }

    async fn change(
        &self,
        _: EndpointId,
        _: DateTime<Utc>,
        _: &EndpointSettings,
        _: Option<CircuitCommand>,
        _: &Change<'_>,
    ) -> Result<Option<Endpoint>, StoreError> {
        unreachable!("it stays as it is")
    }

    async fn delete(&self, _: EndpointId, _: &Change<'_>) -> Result<bool, StoreError> {
        unreachable!("it stays")
    }
}

#[async_trait]
impl CircuitStore for Store {
    async fn open(
        &self,
        _: EndpointId,
        _: &str,
        _: &str,
        _: Duration,
    ) -> Result<Option<Duration>, StoreError> {
        unreachable!("nothing fails")
    }

    async fn reopen(
        &self,
        _: EndpointId,
        _: ProbeLease,
        _: &UnsuccessfulProbe,
    ) -> Result<Option<Duration>, StoreError> {
        unreachable!("nothing fails")
    }

    async fn probe_another(&self, _: EndpointId, _: ProbeLease) -> Result<(), StoreError> {
        unreachable!("nothing fails")
    }

    async fn probe_now(&self, _: EndpointId, _: &Change<'_>) -> Result<bool, StoreError> {
        unreachable!("nothing fails")
    }

    async fn close(&self, _: EndpointId) -> Result<bool, StoreError> {
        unreachable!("nothing fails")
    }

    async fn held(&self, _: usize) -> Result<Vec<HeldCircuit>, StoreError> {
        unreachable!("nobody asks")
    }
}

/// A receiver that answers as often as it has permits.
struct Receiver {
    answers: Semaphore,
    in_flight: AtomicUsize,
    in_flight_max: AtomicUsize,
}

impl Receiver {
    fn with_answers(count: usize) -> Arc<Self> {
        let counter = AtomicUsize::default;
        Arc::new(Self { answers: Semaphore::new(count), in_flight: counter(), in_flight_max: counter() })
    }
}

#[async_trait]
impl Sender for Receiver {
    async fn send(&self, _: &LeasedDelivery, _: &Endpoint) -> Option<AttemptOutcome> {
        let in_flight = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.in_flight_max.fetch_max(in_flight, Ordering::SeqCst);
        self.answers.acquire().await.unwrap().forget();
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        Some(AttemptOutcome::Answered(Answer {
            status: 200,
            body: String::new(),
            retry_after: None,
            broken_off: None,
            evidence: Evidence::default(),
        }))
    }
}

struct Running {
    store: Arc<Store>,
    stop: CancellationToken,
    run: tokio::task::JoinHandle<()>,
}

/// Two workers of four slots each, who look again only when they are woken.
fn start(store: Store, receiver: &Arc<Receiver>) -> Running {
    let (wakeup, store) = (store.wakeup.clone(), Arc::new(store));
    let lease_term = Duration::from_mins(5);
    let settings =
        WorkerSettings { count: 2, batch_size: 4, poll_interval: Duration::from_hours(1), lease_term };
    let ledger = Ledger::new(settings.leases_max(), wakeup.clone());
    let deliver = Deliver::start(
        Arc::new(EndpointDirectory::start(store.clone())),
        store.clone(),
        Circuits::new(store.clone(), wakeup.clone()),
        receiver.clone(),
        wakeup.clone(),
        ledger.clone(),
        AttemptLimits { lease_term, attempt_max: Duration::from_secs(30) },
    );
    let names = WorkerNames { host: "test".into(), pid: 1 };
    let pool = Arc::new(WorkerPool::new(
        store.clone(),
        deliver,
        wakeup.clone(),
        ledger,
        Arc::default(),
        settings,
        names,
    ));
    let stop = CancellationToken::new();
    let run = tokio::spawn(pool.run(stop.clone()));
    Running { store, stop, run }
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(20), "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_claim_asks_for_no_more_than_there_are_free_slots_and_one_endpoint_leaves_room_for_others() {
    let receiver = Receiver::with_answers(0);
    let store = Store::default();
    store.add(20);
    let running = start(store, &receiver);

    eventually("requests", || receiver.in_flight.load(Ordering::SeqCst) == 4).await;
    receiver.answers.add_permits(20);
    eventually("all are settled", || running.store.settled() == 20).await;

    // half of eight slots, or three quarters of them once it answers quickly
    assert!((4..=6).contains(&receiver.in_flight_max.load(Ordering::SeqCst)));
    let claims = running.store.claims();
    assert!(claims.iter().all(|claim| claim.worker_ids.len() <= 2), "a quarter of the slots at a time");
    assert!(claims.iter().all(|claim| matches!(&claim.rooms, Rooms { limit, share, .. } if share <= limit)));
    running.stop.cancel();
    running.run.await.unwrap();
}

#[tokio::test]
async fn after_a_failed_claim_its_slots_are_free_and_it_is_tried_again() {
    let receiver = Receiver::with_answers(10);
    let store = Store::default();
    store
        .claim_errors
        .lock()
        .unwrap()
        .extend([StoreError::Unavailable(lost()), StoreError::Unexpected(lost())]);
    store.add(10);
    let running = start(store, &receiver);

    eventually("all are settled", || running.store.settled() == 10).await;
    running.stop.cancel();
    running.run.await.unwrap();
}

#[tokio::test]
async fn after_a_claim_whose_answer_was_lost_the_workers_have_other_names_and_the_old_ones_are_looked_for() {
    let receiver = Receiver::with_answers(1);
    let store = Store::default();
    store.claim_errors.lock().unwrap().push_back(StoreError::InDoubt(lost()));
    store.add(1);
    let running = start(store, &receiver);

    eventually("it is settled", || running.store.settled() == 1).await;
    let claims = running.store.claims();
    assert!(claims[1].worker_ids.iter().all(|name| !claims[0].worker_ids.contains(name)));
    eventually("a look", || !running.store.looked_for.lock().unwrap().is_empty()).await;
    assert!(running.store.looked_for.lock().unwrap().contains(&claims[0].worker_ids[0]));
    running.stop.cancel();
    running.run.await.unwrap();
}

#[tokio::test]
async fn what_becomes_ready_while_a_claim_looks_is_claimed_by_the_next_one_without_a_poll() {
    let receiver = Receiver::with_answers(1);
    let store = Store::default();
    *store.amid_claim.lock().unwrap() = Some(|store| {
        store.add(1);
        store.wakeup.wake_claimer();
    });
    let running = start(store, &receiver);

    eventually("it is settled", || running.store.settled() == 1).await;
    running.stop.cancel();
    running.run.await.unwrap();
}

#[tokio::test]
async fn a_claim_that_saw_a_part_of_what_waits_is_completed_at_once_with_the_slots_that_are_left() {
    let receiver = Receiver::with_answers(2);
    let store = Store { short_sighted: AtomicUsize::new(1), ..Store::default() };
    store.add(2);
    let running = start(store, &receiver);

    eventually("both are settled", || running.store.settled() == 2).await;
    let claims = running.store.claims();
    assert_eq!((claims[0].worker_ids.len(), claims[1].worker_ids.len()), (2, 1));
    running.stop.cancel();
    running.run.await.unwrap();
}

#[tokio::test]
async fn asked_to_stop_it_claims_no_more_and_settles_what_is_under_way() {
    let receiver = Receiver::with_answers(0);
    let store = Store::default();
    store.add(20);
    let running = start(store, &receiver);
    eventually("requests", || receiver.in_flight.load(Ordering::SeqCst) == 4).await;

    running.stop.cancel();
    receiver.answers.add_permits(20);
    running.run.await.unwrap();

    assert_eq!(running.store.settled(), 4);
    assert_eq!(running.store.waiting.lock().unwrap().len(), 16);
}
