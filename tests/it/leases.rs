//! Leases: expiry, loss, and what the audit keeps of attempts whose outcome nobody knows.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use sqlx::ConnectOptions as _;
use uuid::Uuid;
use webhook_processor::application::ports::{
    CircuitStore as _, Claim, Claimed, DeliveryQueue as _, EndpointStore as _, Incoming, ProbeLease, Settled,
    StoreError, Stored, UnsuccessfulProbe, UnusedLease, WantedLease,
};
use webhook_processor::application::workers::ledger::Rooms;
use webhook_processor::application::workers::lost_answers::release_unconfirmed;
use webhook_processor::domain::attempt::{Answer, AttemptOutcome};
use webhook_processor::domain::delivery::{
    AttemptTimes, FinishedAttempt, LeasedDelivery, NewDelivery, QueueId, Work, WorkerId,
};
use webhook_processor::domain::endpoint::EndpointId;
use webhook_processor::domain::error_kind::ErrorKind;
use webhook_processor::domain::event::{Event, EventParts};
use webhook_processor::domain::evidence::Evidence;
use webhook_processor::domain::retry::Verdict;
use webhook_processor::infrastructure::postgres::Database;
use webhook_processor::infrastructure::service::Role;

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::receiver::{Reply, TestReceiver};
use crate::support::service::TestService;

fn claim(worker: usize, limit: usize) -> Claim {
    let worker_ids = vec![WorkerId::new("test", 1, 1, worker); limit];
    let rooms = Rooms { limit, share: limit, listed: vec![] };
    Claim { worker_ids, lease_term: Duration::from_mins(5), after: None, rooms }
}

/// How long ago the lease was taken whose worker was lost, if it was.
fn lost_for(delivery: &LeasedDelivery) -> Option<Duration> {
    match delivery.work {
        Work::Attempt { .. } => None,
        Work::RecordLoss { leased_for } => Some(leased_for),
    }
}

/// What a claim takes, made again as long as the store says that more may wait.
async fn take(queue: &Database, mut claim: Claim) -> Vec<LeasedDelivery> {
    let mut all = Vec::new();
    loop {
        let Claimed { deliveries, look_again } = queue.claim(&claim).await.unwrap();
        claim.worker_ids.truncate(claim.worker_ids.len() - deliveries.len());
        all.extend(deliveries);
        if !look_again {
            return all;
        }
    }
}

fn delivered(delivery: &LeasedDelivery) -> FinishedAttempt {
    let now = std::time::Instant::now();
    FinishedAttempt {
        queue_id: delivery.queue_id,
        lease: delivery.lease.clone(),
        config_id: delivery.config_id,
        webhook_url: delivery.webhook_url.clone(),
        number: delivery.attempt,
        times: AttemptTimes::Measured { started: now, ended: now },
        outcome: AttemptOutcome::Answered(Answer {
            status: 200,
            body: "ok".into(),
            retry_after: None,
            broken_off: None,
            evidence: Evidence::default(),
        }),
        verdict: Verdict::Completed,
    }
}

/// An attempt that used up nothing: its request never left this machine.
fn not_sent(delivery: &LeasedDelivery) -> FinishedAttempt {
    let outcome = AttemptOutcome::NotSent { error: "no name server answers".into(), kind: ErrorKind::Dns };
    FinishedAttempt { outcome, verdict: Verdict::WaitsOn, ..delivered(delivery) }
}

/// An API with one delivery on it, and the queue behind it.
async fn one_delivery(receiver: &str) -> (TestService, Database, String) {
    let api = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;
    let config = api.api.register(receiver, json!({"retry_base_ms": 1, "retry_cap_ms": 1})).await;
    let queue_id = api.api.credit(config).await;
    let queue = Database::new(api.database.options.clone(), 2);
    (api, queue, queue_id)
}

#[tokio::test]
async fn the_most_urgent_go_first_wherever_a_claim_begins() {
    let api = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;
    let mut configs = Vec::new();
    for priority in [0, 3] {
        let config = api.api.register("http://127.0.0.1:1", json!({"priority": priority})).await;
        api.api.credit(config).await;
        configs.push(config);
    }
    let queue = Database::new(api.database.options.clone(), 2);
    let after = Some(EndpointId::from_stored(configs[0]));

    let claimed = take(&queue, Claim { after, ..claim(1, 1) }).await;

    assert_eq!(claimed[0].config_id.get(), configs[0]);
    queue.close().await;
    api.stop().await;
}

#[tokio::test]
async fn a_lease_at_enqueue_is_granted_only_where_nothing_can_hold_the_delivery_back() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let api = &service.api;
    let plain = api.register(&receiver.url, json!({})).await;
    after_the_first_claim(&service, plain).await;
    receiver.reply_always(Reply::status(200).after(Duration::from_mins(1)));
    let cases = [
        (json!({}), "processing", true),
        (json!({"max_in_flight": 5}), "processing", false),
        (json!({"rate_limit_per_second": 100}), "processing", false),
        (json!({"enabled": false}), "pending", false),
        (json!({"circuit": {"state": "open"}}), "pending", false),
    ];
    for (settings, status, at_once) in cases {
        let config = api.register(&receiver.url, json!({})).await;
        let changed = api.patch(&format!("/api/webhooks/{config}"), settings.clone()).await;
        assert_eq!(changed.status, 200, "{}", changed.text);

        let queue_id = api.credit(config).await;
        api.delivery_in(&queue_id, status).await;

        let leased: Option<bool> = service
            .database
            .scalar("select locked_at = created_at from webhook_queue_open order by queue_id desc limit 1")
            .await;
        assert_eq!(leased.unwrap_or(false), at_once, "{settings}");
    }
    let later = chrono::Utc::now() + chrono::TimeDelta::minutes(1);
    let later = json!({"event_type": "+credit", "config_id": plain, "scheduled_at": later});
    let later = api.post("/webhooks", later).await.json()["queue_id"].as_str().unwrap().to_owned();
    assert_eq!(api.get(&format!("/webhooks/{later}")).await.json()["status"], "pending");
}

#[tokio::test]
async fn a_slot_that_was_kept_for_a_duplicate_is_free_again() {
    let receiver = TestReceiver::start().await;
    let one_slot = [("WORKER_COUNT", "1"), ("WORKER_BATCH_SIZE", "1")];
    let service = TestService::start_with(Role::Serve, TestDatabase::new().await, &one_slot).await;
    let config = service.api.register(&receiver.url, json!({})).await;
    let event = json!({"event_type": "+credit", "config_id": config, "event_id": "same"});
    let first = service.api.post("/webhooks", event.clone()).await.json();
    service.api.delivery_in(first["queue_id"].as_str().unwrap(), "completed").await;
    for _ in 0..3 {
        assert_eq!(service.api.post("/webhooks", event.clone()).await.status, 200);
    }
    receiver.reply_always(Reply::status(200).after(Duration::from_mins(1)));

    service.api.credit(config).await;

    let leased: Option<bool> =
        service.database.scalar("select locked_at = created_at from webhook_queue_open").await;
    assert_eq!(leased, Some(true), "it was leased as it was stored");
}

#[tokio::test]
async fn what_was_stored_under_a_lease_that_nobody_was_told_of_is_made_ready() {
    let receiver = TestReceiver::start().await;
    let settings = [("WORKER_POLL_INTERVAL", "100ms")];
    let service = TestService::start_with(Role::Serve, TestDatabase::new().await, &settings).await;
    let config = service.api.register(&receiver.url, json!({})).await;
    let queue = Database::new(service.database.options.clone(), 2);
    let endpoint = queue.find(EndpointId::from_stored(config)).await.unwrap().unwrap();
    let event =
        Event::parse(EventParts { event_type: "+credit".into(), config_id: config, ..EventParts::default() });
    let delivery = NewDelivery::new(QueueId::new(Uuid::now_v7()), &event.unwrap(), &endpoint).unwrap();
    let (worker, lease) = (WorkerId::new("test", 1, 1, 1), Duration::from_mins(5));
    let incoming =
        Incoming { delivery: &delivery, lease: Some(WantedLease { worker_id: &worker, term: lease }) };
    let stored = queue.enqueue(&[incoming]).await.unwrap();
    assert!(matches!(stored[..], [Stored::New { locked_at: Some(_) }]), "{stored:?}");
    let leases = vec![UnusedLease { queue_id: delivery.queue_id, worker_id: worker, locked_at: None }];

    release_unconfirmed(Arc::new(queue), Arc::default(), leases, lease).await;

    let delivered = service.api.delivery_in(&delivery.queue_id.to_string(), "completed").await;
    assert_eq!(delivered["attempts"].as_array().unwrap().len(), 1);
    service.stop().await;
}

/// Workers have looked for what waits, and found nothing else.
async fn after_the_first_claim(service: &TestService, config: i64) {
    let first = service.api.credit(config).await;
    service.api.delivery_in(&first, "completed").await;
}

#[tokio::test]
async fn a_settle_whose_lease_has_passed_to_another_worker_changes_nothing() {
    let (api, queue, queue_id) = one_delivery("http://127.0.0.1:1").await;
    let first = take(&queue, claim(1, 10)).await;
    assert!(take(&queue, claim(2, 10)).await.is_empty());
    api.database.execute("update webhook_queue_open set locked_at = now() - interval '2 min', lock_expires_at = now() - interval '1 min'").await;

    let second = take(&queue, claim(2, 10)).await;

    assert_eq!(second.len(), 1);
    assert!(lost_for(&second[0]).is_some_and(|age| age >= Duration::from_secs(119)));
    assert_eq!(queue.settle(&[&delivered(&first[0])]).await.unwrap(), [Settled::LeaseLost]);
    assert_eq!(api.api.get(&format!("/webhooks/{queue_id}")).await.json()["status"], "processing");
    assert_eq!(queue.settle(&[&delivered(&second[0])]).await.unwrap(), [Settled::Written]);
    assert_eq!(queue.settle(&[&delivered(&second[0])]).await.unwrap(), [Settled::LeaseLost]);
    api.stop().await;
}

#[tokio::test]
async fn the_same_worker_cannot_settle_by_an_older_lease_of_its_own() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    let first = take(&queue, claim(1, 10)).await;
    api.database.execute("update webhook_queue_open set locked_at = now() - interval '2 min', lock_expires_at = now() - interval '1 min'").await;
    let second = take(&queue, claim(1, 10)).await;

    assert_eq!(first[0].lease.worker_id, second[0].lease.worker_id);
    assert_eq!(queue.settle(&[&delivered(&first[0])]).await.unwrap(), [Settled::LeaseLost]);
    assert_eq!(queue.settle(&[&delivered(&second[0])]).await.unwrap(), [Settled::Written]);
    api.stop().await;
}

#[tokio::test]
async fn a_lease_that_expired_untouched_is_recorded_as_an_unknown_outcome_and_the_delivery_goes_on() {
    let receiver = TestReceiver::start().await;
    let (api, queue, queue_id) = one_delivery(&receiver.url).await;
    take(&queue, claim(1, 10)).await;
    api.database.execute("update webhook_queue_open set locked_at = now() - interval '2 min', lock_expires_at = now() - interval '1 min'").await;

    let worker = TestService::start_with(Role::Worker, api.database.clone(), &[]).await;
    let delivery = api.api.delivery_in(&queue_id, "completed").await;

    let attempts = delivery["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 2);
    assert_eq!(attempts[0]["error"], "lease expired, outcome unknown");
    assert!(attempts[0]["duration_ms"].is_null() && attempts[0]["http_status"].is_null());
    assert_eq!(attempts[1]["http_status"], 200);
    assert_eq!(receiver.count(), 1);
    worker.stop().await;
    api.stop().await;
}

#[tokio::test]
async fn a_delivery_that_loses_its_worker_every_time_ends_as_a_dead_letter() {
    let (api, _, queue_id) = one_delivery("http://127.0.0.1:1").await;
    // no attempt of its own comes in between
    let never = json!({"retry_base_ms": 86_400_000, "retry_cap_ms": 86_400_000});
    api.api.patch("/api/webhooks/1", never).await;
    api.database.execute("update webhook_queue_open set ready_since = null").await;
    // each time the lease expires under a worker that is gone, and the next one records it
    let polls = [("WORKER_POLL_INTERVAL", "100ms")];
    let service = TestService::start_with(Role::Worker, api.database.clone(), &polls).await;
    let dead = eventually("a dead letter", async || {
        api.database
            .execute("update webhook_queue_open set worker_id = 'gone', status = 'processing', ready_since = now(),
                      locked_at = now() - interval '2 min', lock_expires_at = now() - interval '1 min'
                      where status = 'pending'")
            .await;
        let delivery = api.api.get(&format!("/webhooks/{queue_id}")).await.json();
        (delivery["status"] == "failed").then_some(delivery)
    })
    .await;

    let attempts = dead["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 7);
    assert!(attempts.iter().all(|attempt| attempt["error"] == "lease expired, outcome unknown"));
    service.stop().await;
    api.stop().await;
}

#[tokio::test]
async fn an_expired_lease_of_a_disabled_config_is_recorded_and_the_delivery_waits() {
    let receiver = TestReceiver::start().await;
    let (api, queue, queue_id) = one_delivery(&receiver.url).await;
    take(&queue, claim(1, 10)).await;
    api.database
        .execute("update webhook_queue_open set locked_at = now() - interval '2 min', lock_expires_at = now() - interval '1 min';
                  update webhook_configs set enabled = false, updated_at = clock_timestamp()")
        .await;

    let worker = TestService::start_with(Role::Worker, api.database.clone(), &[]).await;
    let delivery = api.api.delivery_in(&queue_id, "pending").await;

    assert_eq!(delivery["attempts"][0]["error"], "lease expired, outcome unknown");
    assert_eq!(receiver.count(), 0);
    worker.stop().await;
    api.stop().await;
}

#[tokio::test]
async fn two_claims_never_take_the_same_delivery() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    api.database
        .execute("insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries)
                  select gen_random_uuid(), '+credit', g::text, 1, 'http://127.0.0.1:1/', g % 4, 6 from generate_series(1, 999) g")
        .await;

    let claims = futures_util::future::join_all((0..40).map(|worker| {
        let queue = &queue;
        async move { take(queue, claim(worker, 30)).await }
    }))
    .await;

    let taken: Vec<_> = claims.iter().flatten().map(|delivery| delivery.queue_id).collect();
    let different: std::collections::HashSet<_> = taken.iter().collect();
    assert_eq!((taken.len(), different.len()), (1000, 1000));
    api.stop().await;
}

#[tokio::test]
async fn a_floor_hides_what_is_below_it_at_its_endpoint_and_nothing_else() {
    let (api, _, _) = one_delivery("http://127.0.0.1:1").await;
    let neighbour = api.api.register("http://127.0.0.1:1", json!({})).await;
    api.database
        .execute("insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries, ready_since)
                  select gen_random_uuid(), '+credit', g::text, 1, 'http://127.0.0.1:1/', 2, 6, now() + g * interval '1 hour'
                  from generate_series(1, 5) g")
        .await;
    api.api.credit(neighbour).await;
    let floor = chrono::Utc::now() + chrono::TimeDelta::minutes(150);

    let claimed_with = async |endpoint: i64, priority: i64| {
        let claimed: Vec<i64> = sqlx::query_scalar(
            "select config_id from webhook_claim(array_fill('test:1:1:1'::text, array[50]), interval '5 minutes', 0, false, 50,
                                                 '{}', '{}', array[$1], array[$2])",
        )
        .bind(endpoint * 4 + priority)
        .bind(floor)
        .fetch_all(&mut api.database.options.connect().await.unwrap())
        .await
        .unwrap();
        claimed
    };

    assert_eq!(claimed_with(1, 2).await, [1, 1, 1, neighbour]);
    // of an endpoint without deliveries, or of another priority, it means nothing
    assert_eq!(claimed_with(7, 2).await, [1, 1, 1]);
    api.stop().await;
}

#[tokio::test]
async fn a_claim_is_fair_to_an_endpoint_beside_one_with_a_long_backlog() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    let neighbour = api.api.register("http://127.0.0.1:1", json!({})).await;
    api.database
        .execute("insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries)
                  select gen_random_uuid(), '+credit', g::text, 1, 'http://127.0.0.1:1/', 2, 6 from generate_series(1, 2000) g")
        .await;
    api.api.credit(neighbour).await;

    let first = take(&queue, claim(1, 50)).await;
    let after = first.last().map(|delivery| delivery.config_id);
    let second = take(&queue, Claim { after, ..claim(1, 50) }).await;

    assert!(first.iter().all(|delivery| delivery.config_id.get() == 1));
    assert_eq!(
        second[0].config_id.get().max(second.iter().map(|d| d.config_id.get()).max().unwrap()),
        neighbour
    );
    assert_eq!(second.len(), 50);
    api.stop().await;
}

/// An attempt of which nobody knows how it ended, as its takeover records it.
fn lost(delivery: &LeasedDelivery) -> FinishedAttempt {
    let (found, leased_for) = (std::time::Instant::now(), lost_for(delivery).unwrap());
    FinishedAttempt {
        times: AttemptTimes::Lost { found, leased_for },
        outcome: AttemptOutcome::Unknown,
        verdict: Verdict::RetryIn(Duration::ZERO),
        ..delivered(delivery)
    }
}

/// Lets all leases end, as if their time had passed.
async fn end_leases(api: &TestService) {
    api.database
        .execute("update webhook_queue_open set lock_expires_at = locked_at + interval '1 microsecond' where status = 'processing'")
        .await;
}

#[tokio::test]
async fn a_known_outcome_wins_over_a_takeover_until_the_delivery_is_sent_again() {
    let (api, queue, queue_id) = one_delivery("http://127.0.0.1:1").await;
    let first = take(&queue, claim(1, 10)).await;
    end_leases(&api).await;
    let second = take(&queue, claim(2, 10)).await;
    end_leases(&api).await;
    let third = take(&queue, claim(3, 10)).await;
    assert!(lost_for(&second[0]).is_some() && lost_for(&third[0]) >= lost_for(&second[0]));

    assert_eq!(queue.settle(&[&delivered(&first[0])]).await.unwrap(), [Settled::Written]);

    let delivery = api.api.get(&format!("/webhooks/{queue_id}")).await.json();
    assert_eq!(
        (&delivery["status"], &delivery["attempts"][0]["http_status"]),
        (&json!("completed"), &json!(200))
    );
    assert_eq!(queue.settle(&[&lost(&third[0])]).await.unwrap(), [Settled::LeaseLost]);
    api.stop().await;
}

#[tokio::test]
async fn a_known_outcome_takes_the_place_of_an_unknown_one_that_was_recorded_already() {
    let (api, queue, queue_id) = one_delivery("http://127.0.0.1:1").await;
    let first = take(&queue, claim(1, 10)).await;
    end_leases(&api).await;
    let second = take(&queue, claim(2, 10)).await;
    assert_eq!(queue.settle(&[&lost(&second[0])]).await.unwrap(), [Settled::Written]);
    let unknown = api.api.get(&format!("/webhooks/{queue_id}")).await.json();
    assert_eq!((&unknown["retry_count"], &unknown["attempts"][0]["http_status"]), (&json!(1), &json!(null)));

    assert_eq!(queue.settle(&[&delivered(&first[0])]).await.unwrap(), [Settled::Written]);

    let known = api.api.get(&format!("/webhooks/{queue_id}")).await.json();
    assert_eq!((&known["status"], &known["retry_count"]), (&json!("completed"), &json!(0)));
    assert_eq!(known["attempts"].as_array().unwrap().len(), 1);
    api.stop().await;
}

#[tokio::test]
async fn what_is_known_to_use_up_no_attempt_uses_up_none_although_its_lease_was_taken_over() {
    let (api, queue, queue_id) = one_delivery("http://127.0.0.1:1").await;
    let first = take(&queue, claim(1, 10)).await;
    end_leases(&api).await;
    let second = take(&queue, claim(2, 10)).await;
    assert!(lost_for(&second[0]).is_some());

    assert_eq!(queue.settle(&[&not_sent(&first[0])]).await.unwrap(), [Settled::Written]);

    assert_eq!(queue.settle(&[&lost(&second[0])]).await.unwrap(), [Settled::LeaseLost]);
    let delivery = api.api.get(&format!("/webhooks/{queue_id}")).await.json();
    assert_eq!((&delivery["status"], &delivery["retry_count"]), (&json!("pending"), &json!(0)));
    assert_eq!(delivery["attempts"][0]["error"], "no name server answers");
    let third = take(&queue, claim(3, 10)).await;
    assert_eq!((lost_for(&third[0]), third[0].attempt), (None, 0));
    assert_eq!(
        queue.settle(&[&not_sent(&first[0])]).await.unwrap(),
        [Settled::LeaseLost],
        "it was sent again"
    );
    api.stop().await;
}

#[tokio::test]
async fn once_a_delivery_may_have_been_sent_again_the_outcome_of_a_lost_lease_counts_no_more() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    let first = take(&queue, claim(1, 10)).await;
    end_leases(&api).await;
    let second = take(&queue, claim(2, 10)).await;
    queue.settle(&[&lost(&second[0])]).await.unwrap();
    queue.promote(10).await.unwrap();
    let third = take(&queue, claim(3, 10)).await;
    assert_eq!((third.len(), lost_for(&third[0]), third[0].attempt), (1, None, 1));

    assert_eq!(queue.settle(&[&delivered(&first[0])]).await.unwrap(), [Settled::LeaseLost]);
    assert_eq!(queue.settle(&[&delivered(&third[0])]).await.unwrap(), [Settled::Written]);
    api.stop().await;
}

#[tokio::test]
async fn leases_that_nobody_uses_are_given_back_and_those_in_use_are_kept() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    for _ in 0..3 {
        api.api.credit(1).await;
    }
    let claimed = take(&queue, claim(1, 3)).await;
    let other = take(&queue, claim(2, 10)).await;
    assert_eq!((claimed.len(), other.len()), (3, 1));

    let workers = [WorkerId::new("test", 1, 1, 1)];
    assert_eq!(queue.release_lost_claims(&workers, &[claimed[0].queue_id]).await.unwrap(), 2);

    let again = take(&queue, claim(3, 10)).await;
    assert_eq!(again.len(), 2);
    assert!(again.iter().all(|delivery| lost_for(delivery).is_none() && delivery.attempt == 0));
    api.stop().await;
}

#[tokio::test]
async fn what_nobody_sent_is_no_loss_even_if_its_lease_has_been_taken_over() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    let unused = |delivery: &LeasedDelivery| UnusedLease {
        queue_id: delivery.queue_id,
        worker_id: delivery.lease.worker_id.clone(),
        locked_at: Some(delivery.lease.locked_at),
    };
    // commits stalled for longer than the lease: a claim, or an enqueue, whose answer was lost
    for by_name in [false, true] {
        let first = take(&queue, claim(1, 10)).await;
        end_leases(&api).await;
        let takeover = take(&queue, claim(2, 10)).await;
        assert!(lost_for(&takeover[0]).is_some());

        if by_name {
            let workers = [WorkerId::new("test", 1, 1, 1)];
            assert_eq!(queue.release_lost_claims(&workers, &[]).await.unwrap(), 1);
        } else {
            assert_eq!(queue.release(&[unused(&first[0])]).await.unwrap(), [first[0].queue_id]);
        }

        assert_eq!(queue.settle(&[&lost(&takeover[0])]).await.unwrap(), [Settled::LeaseLost]);
        let again = take(&queue, claim(3, 10)).await;
        assert_eq!((lost_for(&again[0]), again[0].attempt), (None, 0));
        queue.release(&[unused(&again[0])]).await.unwrap();
    }
    api.stop().await;
}

#[tokio::test]
async fn a_takeover_that_is_given_back_leaves_the_loss_to_be_recorded() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    let first = take(&queue, claim(1, 10)).await;
    end_leases(&api).await;
    let second = take(&queue, claim(2, 10)).await;
    let unused = UnusedLease {
        queue_id: second[0].queue_id,
        worker_id: second[0].lease.worker_id.clone(),
        locked_at: Some(second[0].lease.locked_at),
    };

    assert_eq!(queue.release(&[unused]).await.unwrap(), [second[0].queue_id]);

    let third = take(&queue, claim(3, 10)).await;
    assert!(lost_for(&third[0]).is_some());
    assert_eq!(queue.settle(&[&delivered(&first[0])]).await.unwrap(), [Settled::Written]);
    api.stop().await;
}

/// Deliveries of the first config: `count` at each of these priorities.
async fn fill(api: &TestService, count: i32, priorities: &'static [i16]) {
    sqlx::query(
        "insert into webhook_queue (queue_id, event_type, event_id, config_id, webhook_url, priority, max_retries)
         select gen_random_uuid(), '+credit', g::text, 1, 'http://127.0.0.1:1/', p, 6
         from generate_series(1, $1) g, unnest($2) p",
    )
    .bind(count)
    .bind(priorities)
    .execute(&api.database.pool)
    .await
    .unwrap();
}

#[tokio::test]
async fn the_share_of_an_endpoint_holds_for_all_priorities_together() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    let neighbour = api.api.register("http://127.0.0.1:1", json!({"priority": 3})).await;
    fill(&api, 30, &[0, 1, 2, 3]).await;
    api.api.credit(neighbour).await;

    let rooms = Rooms { limit: 50, share: 10, listed: vec![] };
    let claimed = take(&queue, Claim { rooms, ..claim(1, 50) }).await;
    let of_first = claimed.iter().filter(|delivery| delivery.config_id.get() == 1);
    assert_eq!(of_first.clone().count(), 10);
    assert!(of_first.clone().all(|delivery| delivery.priority.get() == 0), "the most urgent go first");
    assert!(claimed.iter().any(|delivery| delivery.config_id.get() == neighbour));

    let listed = vec![(EndpointId::from_stored(1), 5)];
    let rooms = Rooms { limit: 50, share: 10, listed };
    let claimed = take(&queue, Claim { rooms, ..claim(1, 50) }).await;
    assert_eq!(claimed.iter().filter(|delivery| delivery.config_id.get() == 1).count(), 5);
    api.stop().await;
}

#[tokio::test]
async fn a_share_that_spans_priorities_is_filled_from_the_most_urgent_on() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    fill(&api, 4, &[0, 1, 2]).await;
    let rooms = Rooms { limit: 50, share: 6, listed: vec![] };

    let claimed = take(&queue, Claim { rooms, ..claim(1, 50) }).await;

    let mut priorities: Vec<_> = claimed.iter().map(|delivery| delivery.priority.get()).collect();
    priorities.sort_unstable();
    assert_eq!(priorities, [0, 0, 0, 0, 1, 1]);
    api.stop().await;
}

#[tokio::test]
async fn an_open_circuit_is_probed_by_one_delivery_whatever_the_priorities_and_within_its_limit() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    api.api.patch("/api/webhooks/1", json!({"max_in_flight": 1})).await;
    fill(&api, 3, &[0, 1, 2, 3]).await;
    api.database
        .execute("update webhook_configs set circuit_state = 'open', circuit_reason = 'x', circuit_probe_at = now() - interval '1 s'")
        .await;

    let probes = take(&queue, claim(1, 50)).await;

    assert_eq!(probes.iter().filter(|delivery| delivery.probe).count(), 1);
    assert_eq!((probes.len(), probes[0].priority.get()), (1, 0));
    // an attempt that is still under way counts for the limit, too
    api.database
        .execute(
            "update webhook_configs set circuit_state = 'open', circuit_probe_at = now() - interval '1 s'",
        )
        .await;
    assert!(take(&queue, claim(1, 50)).await.is_empty());
    api.stop().await;
}

#[tokio::test]
async fn a_config_that_someone_keeps_locked_is_not_probed_and_holds_up_no_other() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    let other = api.api.register("http://127.0.0.1:1", json!({})).await;
    api.api.credit(other).await;
    api.database
        .execute("update webhook_configs set circuit_state = 'open', circuit_reason = 'x', circuit_probe_at = now() - interval '1 s' where id = 1")
        .await;
    let mut lock = api.database.pool.begin().await.unwrap();
    sqlx::query("update webhook_configs set name = 'x' where id = 1").execute(&mut *lock).await.unwrap();

    let claimed = queue.claim(&claim(1, 10)).await.unwrap().deliveries;

    assert_eq!(claimed.iter().map(|delivery| delivery.config_id.get()).collect::<Vec<_>>(), [other]);
    lock.rollback().await.unwrap();
    assert!(take(&queue, claim(2, 10)).await[0].probe);
    api.stop().await;
}

#[tokio::test]
async fn no_more_are_in_flight_than_the_limit_after_a_loss_where_priorities_are_mixed() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    api.database.execute("delete from webhook_queue_open").await;
    api.api.patch("/api/webhooks/1", json!({"max_in_flight": 5})).await;
    fill(&api, 3, &[0]).await;
    assert_eq!(take(&queue, claim(1, 50)).await.len(), 3);
    end_leases(&api).await;
    fill(&api, 40, &[2]).await;

    let mut to_send = 0;
    for _ in 0..6 {
        let claimed = take(&queue, claim(1, 50)).await;
        to_send += claimed.iter().filter(|delivery| lost_for(delivery).is_none()).count();
        for delivery in claimed.iter().filter(|delivery| lost_for(delivery).is_some()) {
            queue.settle(&[&lost(delivery)]).await.unwrap();
        }
    }
    assert_eq!(to_send, 5);
    api.stop().await;
}

#[tokio::test]
async fn a_rate_is_not_held_up_by_a_clock_that_was_ahead_once() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    api.api.patch("/api/webhooks/1", json!({"rate_limit_per_second": 10})).await;
    fill(&api, 5, &[2]).await;
    assert!(!take(&queue, claim(1, 50)).await.is_empty());
    api.database.execute("update webhook_limit_states set next_start_at = now() + interval '1 hour'").await;

    let more = eventually("more is granted", async || {
        let claimed = take(&queue, claim(1, 50)).await;
        (!claimed.is_empty()).then_some(claimed)
    })
    .await;

    let Work::Attempt { starts_at, .. } = more[0].work else { panic!("no worker was lost") };
    assert!(starts_at.unwrap() < std::time::Instant::now() + Duration::from_secs(5));
    api.stop().await;
}

#[tokio::test]
async fn a_claim_that_waits_for_a_lock_gives_up_by_itself_and_leaves_nothing_behind() {
    let (api, queue, queue_id) = one_delivery("http://127.0.0.1:1").await;
    let mut lock = api.database.pool.begin().await.unwrap();
    sqlx::query("lock table webhook_queue_open").execute(&mut *lock).await.unwrap();

    let refused = queue.claim(&claim(1, 10)).await.unwrap_err();

    assert!(matches!(refused, StoreError::Unavailable(_)), "it is known that nothing was done: {refused:?}");
    lock.rollback().await.unwrap();
    assert_eq!(api.api.get(&format!("/webhooks/{queue_id}")).await.json()["status"], "pending");
    api.stop().await;
}

#[tokio::test]
async fn of_a_known_outcome_and_a_loss_in_one_batch_the_known_one_is_written() {
    let (api, queue, queue_id) = one_delivery("http://127.0.0.1:1").await;
    let first = take(&queue, claim(1, 10)).await;
    end_leases(&api).await;
    let second = take(&queue, claim(2, 10)).await;

    let settled = queue.settle(&[&lost(&second[0]), &delivered(&first[0])]).await.unwrap();

    assert_eq!(settled, [Settled::LeaseLost, Settled::Written]);
    let delivery = api.api.get(&format!("/webhooks/{queue_id}")).await.json();
    assert_eq!(
        (&delivery["status"], &delivery["attempts"][0]["http_status"]),
        (&json!("completed"), &json!(200))
    );
    api.stop().await;
}

#[tokio::test]
async fn a_probe_that_is_given_back_is_made_up_for_at_once() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    api.database
        .execute("update webhook_configs set circuit_state = 'open', circuit_reason = 'x', circuit_probe_at = now() - interval '1 s'")
        .await;
    let probe = take(&queue, claim(1, 10)).await;
    assert!(probe[0].probe);

    assert_eq!(queue.release_lost_claims(&[WorkerId::new("test", 1, 1, 1)], &[]).await.unwrap(), 1);

    let again = take(&queue, claim(2, 10)).await;
    assert!(again.len() == 1 && again[0].probe);
    api.stop().await;
}

/// Opens the circuit of the one endpoint and takes the first probe.
async fn probe(api: &TestService, queue: &Database) -> LeasedDelivery {
    api.database
        .execute("update webhook_configs set circuit_state = 'open', circuit_reason = 'x', circuit_probe_at = now() - interval '1 s'")
        .await;
    let probe = take(queue, claim(1, 10)).await.pop().unwrap();
    assert!(probe.probe);
    probe
}

#[tokio::test]
async fn a_failed_probe_is_recorded_although_its_lease_has_been_taken_over() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    let probe = probe(&api, &queue).await;
    end_leases(&api).await;
    let other = WorkerId::new("test", 1, 1, 2);
    let takeover = queue.take_over_held(&other, Duration::from_mins(5), 10).await.unwrap();

    let failed = FinishedAttempt { verdict: Verdict::WaitsOn, ..delivered(&probe) };
    assert_eq!(queue.settle(&[&failed]).await.unwrap(), [Settled::Written]);

    assert_eq!(queue.settle(&[&lost(&takeover[0])]).await.unwrap(), [Settled::LeaseLost]);
    let (probes, attempts): (i64, i64) = sqlx::query_as(
        "select count(*) filter (where probe), count(*) filter (where not probe) from webhook_attempts",
    )
    .fetch_one(&api.database.pool)
    .await
    .unwrap();
    assert_eq!((probes, attempts), (1, 0));
    api.stop().await;
}

#[tokio::test]
async fn a_look_for_a_lease_that_is_not_there_brings_no_second_probe() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    api.api.credit(1).await;
    let probe = probe(&api, &queue).await;
    // stored without a lease, of which its process was not told; now under a lease of the same worker
    let unused =
        UnusedLease { queue_id: probe.queue_id, worker_id: probe.lease.worker_id.clone(), locked_at: None };

    assert_eq!(queue.release(&[unused]).await.unwrap(), []);

    assert!(take(&queue, claim(2, 10)).await.is_empty(), "a probe is under way");
    api.stop().await;
}

#[tokio::test]
async fn a_probe_that_fails_after_another_was_sent_does_not_move_the_circuit() {
    let (api, queue, _) = one_delivery("http://127.0.0.1:1").await;
    api.api.credit(1).await;
    let late = probe(&api, &queue).await;
    end_leases(&api).await;
    api.database.execute("update webhook_configs set circuit_probe_at = now() - interval '1 s'").await;
    let present = take(&queue, claim(2, 10)).await.pop().unwrap();
    let term = Duration::from_mins(5);
    let lease_of = |probe: &LeasedDelivery| ProbeLease { began: probe.lease.locked_at, term };
    let failed = UnsuccessfulProbe { error: "x".into(), receiver_fails: true, retry_after: Duration::ZERO };

    assert_eq!(queue.reopen(late.config_id, lease_of(&late), &failed).await.unwrap(), None);
    queue.probe_another(late.config_id, lease_of(&late)).await.unwrap();

    let state: String = api.database.scalar("select circuit_state from webhook_configs").await;
    assert_eq!(state, "half_open");
    assert!(queue.reopen(late.config_id, lease_of(&present), &failed).await.unwrap().is_some());
    api.stop().await;
}
