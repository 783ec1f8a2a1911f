//! Endpoints apart from each other: circuits, limits, and what is held back by them.

use std::time::Duration;

use serde_json::{Value, json};
use webhook_processor::application::ports::CircuitStore as _;
use webhook_processor::domain::endpoint::EndpointId;
use webhook_processor::infrastructure::postgres::Database;
use webhook_processor::infrastructure::service::Role;

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::receiver::{Reply, TestReceiver};
use crate::support::service::{ApiClient, TestService};

/// A circuit that opens at the third failure in a row, and is probed soon.
fn touchy() -> Value {
    json!({"retry_base_ms": 1, "retry_cap_ms": 1,
           "circuit": {"failure_rate": 0.5, "attempts_min": 3, "cooldown_ms": 100, "cooldown_cap_ms": 200}})
}

async fn circuit(api: &ApiClient, config: i64) -> Value {
    api.get(&format!("/api/webhooks/{config}")).await.json()["circuit"].clone()
}

/// The circuit, once it is in this state.
async fn circuit_in(api: &ApiClient, config: i64, state: &str) -> Value {
    eventually(&format!("circuit {state}"), async || {
        let circuit = circuit(api, config).await;
        (circuit["state"] == state).then_some(circuit)
    })
    .await
}

async fn credits(api: &ApiClient, config: i64, count: usize) {
    let events = vec![json!({"event_type": "+credit", "config_id": config}); count];
    for batch in events.chunks(1000) {
        let answer = api.post("/webhooks/batch", json!(batch)).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
}

async fn completed(service: &TestService, count: i64) {
    eventually(&format!("{count} completed"), async || {
        let completed: i64 =
            service.database.scalar("select count(*) from webhook_queue where status = 'completed'").await;
        (completed == count).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_circuit_opens_after_failures_holds_deliveries_without_attempts_and_closes_on_success() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&receiver.url, touchy()).await;
    assert_eq!(circuit(&service.api, config).await["state"], "closed");
    receiver.reply_always(Reply::status(503));

    credits(&service.api, config, 30).await;
    let open = eventually("a failed probe", async || {
        let circuit = circuit(&service.api, config).await;
        (circuit["probe_error"] == "the receiver answered 503").then_some(circuit)
    })
    .await;
    assert_ne!(open["state"], "closed");
    assert!(open["probe_at"].is_string() && open["changed_at"].is_string(), "{open}");
    let metrics = service.api.get("/metrics").await.text;
    assert!(metrics.contains(&format!("webhook_circuit_held{{config_id=\"{config}\"")), "{metrics}");
    let failed_probes = eventually("more failed probes", async || {
        let probes: i64 = service.database.scalar("select count(*) from webhook_probes").await;
        (probes >= 5).then_some(probes)
    })
    .await;
    // those that were under way when it opened have used up attempts, and nothing since
    let used_up: i64 =
        service.database.scalar("select sum(retry_count)::bigint from webhook_queue_open").await;
    assert!(used_up <= 30 * 2, "{used_up} attempts beside {failed_probes} probes");

    receiver.reply_always(Reply::status(200));
    completed(&service, 30).await;
    let closed = circuit(&service.api, config).await;
    assert_eq!(
        (&closed["state"], &closed["reason"], &closed["probe_at"]),
        (&json!("closed"), &Value::Null, &Value::Null)
    );
    // every request is in the audit
    let audited: i64 = service.database.scalar("select count(*) from webhook_attempts").await;
    assert_eq!(usize::try_from(audited).unwrap(), receiver.count());
    service.stop().await;
}

#[tokio::test]
async fn a_lone_delivery_outlives_any_number_of_failed_probes() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let mut settings = touchy();
    settings["circuit"]["attempts_min"] = json!(1);
    settings["max_retries"] = json!(1);
    let config = service.api.register(&receiver.url, settings).await;
    receiver.reply_with((0..12).map(|_| Reply::status(500).body("down")));

    let queue_id = service.api.credit(config).await;
    let delivery = service.api.delivery_in(&queue_id, "completed").await;

    let attempts = delivery["attempts"].as_array().unwrap();
    assert_eq!((attempts.len(), receiver.count()), (13, 13));
    let probes: Vec<_> = attempts.iter().filter(|attempt| attempt["probe"] == true).collect();
    assert_eq!(probes.len(), 11);
    assert!(probes.iter().all(|probe| probe["attempt"] == 1
        && probe["http_status"] == 500
        && probe["response_body"] == "down"
        && probe["duration_ms"].is_number()));
    let numbers: Vec<_> = attempts.iter().filter(|a| a["probe"] == false).map(|a| &a["attempt"]).collect();
    assert_eq!(numbers, [&json!(0), &json!(1)]);
    assert_eq!(delivery["retry_count"], 1);
    service.stop().await;
}

#[tokio::test]
async fn a_circuit_is_opened_and_closed_by_hand() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&receiver.url, json!({})).await;
    let path = format!("/api/webhooks/{config}");
    let opened = service.api.patch(&path, json!({"circuit": {"state": "open"}})).await.json();
    let expected = (&json!("open"), &json!("opened by hand"), &Value::Null);
    let shown = &opened["circuit"];
    assert_eq!((&shown["state"], &shown["reason"], &shown["probe_at"]), expected);

    let held = service.api.credit(config).await;
    let other = service.api.register(&receiver.url, json!({})).await;
    let flowing = service.api.credit(other).await;
    service.api.delivery_in(&flowing, "completed").await;
    assert_eq!(receiver.count(), 1);
    assert_eq!(service.api.get(&format!("/webhooks/{held}")).await.json()["status"], "pending");
    // what is held on purpose is no sign of trouble
    assert_eq!(service.api.get("/health/ready").await.status, 200);
    let metrics = service.api.get("/metrics").await.text;
    let gauge = format!("webhook_circuit_held{{config_id=\"{config}\",state=\"open\",reason=\"by_hand\"}}");
    assert!(metrics.contains(&format!("{gauge} 1")), "{metrics}");

    // a change of something else leaves it open
    service.api.patch(&path, json!({"name": "renamed"})).await;
    assert_eq!(circuit(&service.api, config).await["state"], "open");
    service.api.patch(&path, json!({"circuit": {"state": "closed"}})).await;
    service.api.delivery_in(&held, "completed").await;
    assert!(service.api.get("/metrics").await.text.contains(&format!("{gauge} 0")));
    service.stop().await;
}

#[tokio::test]
async fn processes_share_a_circuit_and_send_one_probe_at_a_time() {
    let (receiver, first) = (TestReceiver::start().await, TestService::start().await);
    let second = TestService::start_with(Role::Serve, first.database.clone(), &[]).await;
    let config = first.api.register(&receiver.url, touchy()).await;
    receiver.reply_always(Reply::status(500));
    credits(&first.api, config, 20).await;
    circuit_in(&second.api, config, "open").await;
    // what was under way when it opened has ended
    eventually("nothing but probes", async || {
        let leased: i64 = first
            .database
            .scalar("select count(*) from webhook_queue_open where status = 'processing'")
            .await;
        (leased <= 1).then_some(())
    })
    .await;

    let begun = receiver.count();
    receiver.forget_in_flight_max();
    receiver.reply_always(Reply::status(500).after(Duration::from_millis(150)));
    eventually("some probes", async || (receiver.count() >= begun + 4).then_some(())).await;
    assert_eq!(receiver.in_flight_max(), 1);

    receiver.reply_always(Reply::status(200));
    completed(&first, 20).await;
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn without_a_failure_rate_a_circuit_stays_closed() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service
        .api
        .register(
            &receiver.url,
            json!({"max_retries": 0, "circuit": {"failure_rate": null, "attempts_min": 1}}),
        )
        .await;
    receiver.reply_always(Reply::status(500));
    credits(&service.api, config, 30).await;
    eventually("30 dead letters", async || {
        let failed: i64 =
            service.database.scalar("select count(*) from webhook_queue where status = 'failed'").await;
        (failed == 30).then_some(())
    })
    .await;
    assert_eq!(circuit(&service.api, config).await["state"], "closed");
    service.stop().await;
}

#[tokio::test]
async fn no_more_are_in_flight_than_the_limit_in_all_processes_together() {
    let (receiver, first) = (TestReceiver::start().await, TestService::start().await);
    let second = TestService::start_with(Role::Serve, first.database.clone(), &[]).await;
    receiver.reply_always(Reply::status(200).after(Duration::from_millis(5)));
    let config = first.api.register(&receiver.url, json!({"max_in_flight": 3})).await;
    // of two priorities: the limit is of both together
    let urgent: Vec<_> =
        (0..100).map(|_| json!({"event_type": "+credit", "config_id": config, "priority": 0})).collect();
    tokio::join!(credits(&first.api, config, 200), credits(&second.api, config, 200), async {
        assert_eq!(second.api.post("/webhooks/batch", json!(urgent)).await.status, 200);
    },);
    completed(&first, 500).await;
    assert_eq!(receiver.in_flight_max(), 3);

    // raised while it works, it counts at once; and the first limit does not linger
    receiver.forget_in_flight_max();
    first.api.patch(&format!("/api/webhooks/{config}"), json!({"max_in_flight": 5})).await;
    receiver.reply_always(Reply::status(200).after(Duration::from_millis(20)));
    credits(&first.api, config, 100).await;
    completed(&first, 600).await;
    assert_eq!(receiver.in_flight_max(), 5);
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn attempts_begin_no_faster_than_the_rate_in_all_processes_together() {
    let (receiver, first) = (TestReceiver::start().await, TestService::start().await);
    let second = TestService::start_with(Role::Serve, first.database.clone(), &[]).await;
    let config = first.api.register(&receiver.url, json!({"rate_limit_per_second": 40})).await;
    tokio::join!(credits(&first.api, config, 250), credits(&second.api, config, 230));
    completed(&first, 480).await;

    // in no ten seconds more than a tenth above
    let arrivals = receiver.arrivals();
    for (earlier, later) in arrivals.iter().zip(&arrivals[440..]) {
        assert!(later.at - earlier.at >= Duration::from_secs(10), "{:?}", later.at - earlier.at);
    }

    // a slower limit counts at once, too
    first.api.patch(&format!("/api/webhooks/{config}"), json!({"rate_limit_per_second": 10})).await;
    credits(&first.api, config, 15).await;
    completed(&first, 495).await;
    let arrivals = receiver.arrivals();
    let took = arrivals[494].at - arrivals[480].at;
    assert!(took >= Duration::from_millis(1400).mul_f64(0.9), "{took:?}");

    // and without one nothing is held back
    first.api.patch(&format!("/api/webhooks/{config}"), json!({"rate_limit_per_second": null})).await;
    credits(&first.api, config, 500).await;
    completed(&first, 995).await;
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn an_endpoint_at_its_limit_holds_up_no_other() {
    let (slow, quick, service) =
        (TestReceiver::start().await, TestReceiver::start().await, TestService::start().await);
    slow.reply_always(Reply::status(200).after(Duration::from_hours(1)));
    let limited = service.api.register(&slow.url, json!({"max_in_flight": 2, "priority": 0})).await;
    let paced = service.api.register(&slow.url, json!({"rate_limit_per_second": 1, "priority": 0})).await;
    let plain = service.api.register(&quick.url, json!({})).await;
    credits(&service.api, limited, 300).await;
    credits(&service.api, paced, 300).await;
    eventually("both at their limits", async || (slow.count() >= 3).then_some(())).await;
    credits(&service.api, plain, 300).await;
    completed(&service, 300).await;
    assert_eq!(service.api.get("/health/ready").await.status, 200);
    let leased: i64 = service
        .database
        .scalar("select count(*) from webhook_queue_open where status = 'processing' and config_id = 1")
        .await;
    assert_eq!(leased, 2);
}

#[tokio::test]
async fn limits_and_circuits_out_of_bounds_are_refused_field_by_field() {
    let service = TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await;
    let config = json!({
        "name": "c", "postback_url": "http://127.0.0.1:1/", "max_in_flight": 0, "rate_limit_per_second": 100_001,
        "circuit": {"failure_rate": 2, "window_ms": 1},
    });
    let answer = service.api.post("/api/webhooks", config).await;
    assert_eq!(answer.status, 422);
    let expected = ["max_in_flight", "rate_limit_per_second", "circuit.window_ms", "circuit.failure_rate"];
    assert_eq!(answer.fields(), expected);
    for circuit in [json!({"state": "open"}), json!({"state": "ajar"})] {
        let config = json!({"name": "c", "postback_url": "http://127.0.0.1:1/", "circuit": circuit});
        assert_eq!(service.api.post("/api/webhooks", config).await.fields(), ["circuit.state"]);
    }
    let unknown = json!({"name": "c", "postback_url": "http://127.0.0.1:1/", "circuit": {"cooldown": 1}});
    assert_eq!(service.api.post("/api/webhooks", unknown).await.fields(), ["circuit.cooldown"]);
    let id = service.api.register("http://127.0.0.1:1", json!({"max_in_flight": 7})).await;
    let path = format!("/api/webhooks/{id}");
    let half = service.api.patch(&path, json!({"circuit": {"state": "half_open"}})).await;
    assert_eq!(half.fields(), ["circuit.state"]);
    let changed =
        service.api.patch(&path, json!({"max_in_flight": null, "rate_limit_per_second": 5})).await.json();
    assert_eq!((&changed["max_in_flight"], &changed["rate_limit_per_second"]), (&Value::Null, &json!(5)));
    service.stop().await;
}

#[tokio::test]
async fn the_figures_of_a_circuit_say_when_and_why_it_opened_however_many_probes_fail() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&receiver.url, touchy()).await;
    receiver.reply_always(Reply::status(503));
    credits(&service.api, config, 5).await;
    let opened = circuit_in(&service.api, config, "open").await;
    eventually("failed probes", async || {
        let probes: i64 = service.database.scalar("select count(*) from webhook_probes").await;
        (probes >= 3).then_some(())
    })
    .await;

    let later = circuit(&service.api, config).await;
    assert_eq!((&later["changed_at"], &later["reason"]), (&opened["changed_at"], &opened["reason"]));
    assert!(later["reason"].as_str().unwrap().contains("attempts failed"), "{later}");
    assert_eq!(later["probe_error"], "the receiver answered 503");

    receiver.reply_always(Reply::status(200));
    circuit_in(&service.api, config, "closed").await;
    let openings: i64 = service
        .database
        .scalar("select count(*) from webhook_circuit_openings where opened_at < closed_at and reason like '%attempts failed%'")
        .await;
    assert_eq!(openings, 1);
    service.stop().await;
}

#[tokio::test]
async fn a_quiet_endpoint_that_is_down_keeps_the_retries_of_its_few_events() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let settings = json!({"retry_base_ms": 1, "retry_cap_ms": 1, "circuit": {"cooldown_ms": 100, "cooldown_cap_ms": 100}});
    let config = service.api.register(&receiver.url, settings).await;
    receiver.reply_always(Reply::status(500));

    credits(&service.api, config, 3).await;
    let opened = circuit_in(&service.api, config, "open").await;
    assert!(opened["reason"].as_str().unwrap().ends_with("attempts in a row failed"), "{opened}");
    // an outage many times as long as all retries
    eventually("many probes", async || {
        let probes: i64 = service.database.scalar("select count(*) from webhook_probes").await;
        (probes >= 15).then_some(())
    })
    .await;

    receiver.reply_always(Reply::status(200));
    completed(&service, 3).await;
    service.stop().await;
}

#[tokio::test]
async fn events_that_are_refused_hold_up_no_good_ones() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let settings = json!({"retry_base_ms": 1, "retry_cap_ms": 1,
                          "circuit": {"cooldown_ms": 100, "cooldown_cap_ms": 60_000}});
    let config = service.api.register(&receiver.url, settings).await;
    receiver.refuse_where("bad", 422);
    let event = |kind: &str, n: usize| json!({"event_type": "+credit", "config_id": config, "event_id": format!("{kind}-{n}"), "url_params": {"kind": kind}});
    let bad: Vec<_> = (0..25).map(|n| event("bad", n)).collect();
    service.api.post("/webhooks/batch", json!(bad)).await;
    circuit_in(&service.api, config, "open").await;

    let good: Vec<_> = (0..5).map(|n| event("good", n)).collect();
    service.api.post("/webhooks/batch", json!(good)).await;

    // the cooldown never grows: probes that were refused are no sign of trouble, and a fresh delivery goes first
    completed(&service, 5).await;
    let failed_probes: i32 =
        service.database.scalar("select circuit_failed_probes from webhook_configs").await;
    assert_eq!(failed_probes, 0);
    // and those that nobody wants end as what they are
    eventually("25 dead letters", async || {
        let dead: i64 =
            service.database.scalar("select count(*) from webhook_queue where status = 'failed'").await;
        (dead == 25).then_some(())
    })
    .await;
    service.stop().await;
}

#[tokio::test]
async fn what_was_counted_before_a_circuit_closed_does_not_open_it_again() {
    let database = TestDatabase::new().await;
    let api = TestService::start_with(Role::Api, database.clone(), &[]).await;
    let config = EndpointId::from_stored(api.api.register("http://127.0.0.1:1", json!({})).await);
    let url: String = database.scalar("select postback_url from webhook_configs").await;
    let store = Database::new(database.options.clone(), 2);
    assert!(store.open(config, &url, "down", Duration::ZERO).await.unwrap().is_some());
    api.api.patch(&format!("/api/webhooks/{config}"), json!({"circuit": {"state": "closed"}})).await;

    assert_eq!(store.open(config, &url, "down", Duration::from_mins(1)).await.unwrap(), None);
    assert!(store.open(config, &url, "down", Duration::ZERO).await.unwrap().is_some());
    api.stop().await;
}

#[tokio::test]
async fn a_probe_can_be_asked_for_and_costs_no_attempt() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let settings =
        json!({"circuit": {"attempts_min": 1, "cooldown_ms": 86_400_000, "cooldown_cap_ms": 86_400_000}});
    let config = service.api.register(&receiver.url, settings).await;
    let path = format!("/api/webhooks/{config}/probe");
    assert_eq!(service.api.post(&path, json!({})).await.status, 409, "it is closed");
    receiver.reply_always(Reply::status(500));
    let queue_id = service.api.credit(config).await;
    circuit_in(&service.api, config, "open").await;
    eventually("its retry is due", async || {
        let ready: i64 = service
            .database
            .scalar("select count(*) from webhook_queue_open where ready_since is not null")
            .await;
        (ready == 1).then_some(())
    })
    .await;

    let enabled = |enabled: bool| json!({"enabled": enabled});
    service.api.patch(&format!("/api/webhooks/{config}"), enabled(false)).await;
    let paused = service.api.post(&path, json!({})).await;
    assert_eq!(paused.status, 409, "{}", paused.text);
    assert!(paused.text.contains("it is paused"), "{}", paused.text);
    service.api.patch(&format!("/api/webhooks/{config}"), enabled(true)).await;

    let probed = service.api.post(&path, json!({})).await;
    assert_eq!(probed.status, 200, "{}", probed.text);
    eventually("the probe", async || (receiver.count() == 2).then_some(())).await;
    circuit_in(&service.api, config, "open").await;
    let waiting = service.api.delivery_in(&queue_id, "pending").await;
    assert_eq!(waiting["retry_count"], 1);

    receiver.reply_always(Reply::status(200));
    service.api.post(&path, json!({})).await;
    service.api.delivery_in(&queue_id, "completed").await;
    circuit_in(&service.api, config, "closed").await;
    service.stop().await;
}

#[tokio::test]
async fn after_an_outage_traffic_grows_step_by_step() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&receiver.url, json!({})).await;
    let path = format!("/api/webhooks/{config}");
    service.api.patch(&path, json!({"circuit": {"state": "open"}})).await;
    credits(&service.api, config, 200).await;

    service.api.patch(&path, json!({"circuit": {"state": "closed"}})).await;
    completed(&service, 200).await;

    let arrivals: Vec<_> = receiver.arrivals().iter().map(|arrival| arrival.at).collect();
    let in_first =
        |seconds| arrivals.iter().filter(|at| **at - arrivals[0] < Duration::from_secs(seconds)).count();
    // 10 a second, 20, 40, 80, and a tenth of a second's worth ahead; the clocks of both sides differ by a second at most
    assert!(in_first(1) <= 35, "{} in the first second", in_first(1));
    assert!(in_first(2) <= 80, "{} in the first two", in_first(2));
    service.stop().await;
}

#[tokio::test]
async fn a_config_with_another_url_begins_anew() {
    let (gone, new, service) =
        (TestReceiver::start().await, TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&gone.url, touchy()).await;
    let path = format!("/api/webhooks/{config}");
    gone.reply_always(Reply::status(503));
    credits(&service.api, config, 10).await;
    circuit_in(&service.api, config, "open").await;
    gone.reply_always(Reply::status(503).after(Duration::from_hours(1)));

    let changed = service.api.patch(&path, json!({"postback_url": format!("{}/new", new.url)})).await.json();
    assert_eq!(
        (&changed["circuit"]["state"], &changed["circuit"]["reason"]),
        (&json!("closed"), &Value::Null)
    );
    let fresh = service.api.credit(config).await;
    service.api.delivery_in(&fresh, "completed").await;

    // one that someone opened stays open
    service.api.patch(&path, json!({"circuit": {"state": "open"}})).await;
    let changed = service.api.patch(&path, json!({"postback_url": new.url})).await.json();
    assert_eq!(changed["circuit"]["state"], "open");
}

#[tokio::test]
async fn gone_from_a_url_that_the_config_had_before_disables_nothing() {
    let (old, new, service) =
        (TestReceiver::start().await, TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&old.url, json!({"enabled": false})).await;
    let to_old = service.api.credit(config).await;
    old.reply_always(Reply::status(410));

    let path = format!("/api/webhooks/{config}");
    service.api.patch(&path, json!({"postback_url": new.url, "enabled": true})).await;
    service.api.delivery_in(&to_old, "failed").await;

    let to_new = service.api.credit(config).await;
    service.api.delivery_in(&to_new, "completed").await;
    assert_eq!(service.api.get(&path).await.json()["enabled"], true);
    service.stop().await;
}

#[tokio::test]
async fn what_goes_to_a_url_that_the_config_had_before_waits_on_and_says_nothing_about_the_new_one() {
    let (old, new, service) =
        (TestReceiver::start().await, TestReceiver::start().await, TestService::start().await);
    let circuit =
        json!({"attempts_min": 1, "failures_in_row": 1, "cooldown_ms": 100, "cooldown_cap_ms": 100});
    // an attempt that is claimed just before the config gets the old URL back for a moment is one at its present URL: it uses up
    // a retry, as it should
    let settings = json!({"enabled": false, "circuit": circuit});
    let config = service.api.register(&old.url, settings).await;
    let path = format!("/api/webhooks/{config}");
    old.reply_always(Reply::status(503).header("retry-after", "3600"));
    let waiting_for_old = async |count: usize| {
        service.api.patch(&path, json!({"enabled": false, "postback_url": old.url})).await;
        let mut waiting = Vec::new();
        for _ in 0..count {
            waiting.push(service.api.credit(config).await);
        }
        service.api.patch(&path, json!({"postback_url": new.url})).await;
        waiting
    };
    let tried = async |queue_id: &str| {
        eventually("an attempt at the old URL", async || {
            let delivery = service.api.get(&format!("/webhooks/{queue_id}")).await.json();
            assert_eq!(delivery["retry_count"], 0, "{delivery}");
            (delivery["attempts"][0]["probe"] == true).then_some(())
        })
        .await;
    };

    let to_old = waiting_for_old(3).await;
    service.api.patch(&path, json!({"enabled": true})).await;
    for queue_id in &to_old {
        tried(queue_id).await;
    }
    assert_eq!(service.api.get(&path).await.json()["circuit"]["state"], "closed");
    let postponed: i64 = service
        .database
        .scalar("select count(*) from webhook_queue_open where ready_since is null and next_retry_at > created_at")
        .await;
    assert_eq!(postponed, 3);

    // the same while the circuit is open: what goes to the new one is what it is probed with
    let open = async || {
        let new_url = service.api.get(&path).await.json()["postback_url"].as_str().unwrap().to_owned();
        let store = Database::new(service.database.options.clone(), 1);
        let id = EndpointId::from_stored(config);
        assert_eq!(store.open(id, &old.url, "it is elsewhere", Duration::ZERO).await.unwrap(), None);
        assert!(store.open(id, &new_url, "down", Duration::ZERO).await.unwrap().is_some());
    };
    let more_to_old = waiting_for_old(20).await;
    open().await;
    let to_new = service.api.credit(config).await;
    service.api.patch(&path, json!({"enabled": true})).await;
    service.api.delivery_in(&to_new, "completed").await;

    // if there is nothing else to probe with, the old one has no say in when the next probe is due
    let last_to_old = waiting_for_old(1).await;
    open().await;
    service.api.patch(&path, json!({"enabled": true})).await;
    tried(&last_to_old[0]).await;
    let to_new = service.api.credit(config).await;
    service.api.delivery_in(&to_new, "completed").await;

    // and once the old one takes them, or they are sent to the new one, they are done
    old.reply_always(Reply::status(200));
    eventually("the delivery at the old URL", async || {
        // it has been put off for as long as it has failed, which is longer on a slow machine
        service.api.post(&format!("/webhooks/{}/retry", more_to_old[0]), json!({})).await;
        let delivery = service.api.get(&format!("/webhooks/{}", more_to_old[0])).await.json();
        assert_ne!(delivery["status"], "failed", "{delivery}");
        (delivery["status"] == "completed").then_some(())
    })
    .await;
    let moved = service.api.credit(config).await;
    service.api.delivery_in(&moved, "completed").await;
    service.stop().await;
}

#[tokio::test]
async fn what_waits_and_what_is_dead_can_be_sent_to_the_current_url() {
    let (old, new, service) =
        (TestReceiver::start().await, TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&old.url, json!({"max_retries": 0})).await;
    old.reply_always(Reply::status(500));
    let dead = service.api.credit(config).await;
    service.api.delivery_in(&dead, "failed").await;
    let path = format!("/api/webhooks/{config}");
    service.api.patch(&path, json!({"enabled": false})).await;
    let body = json!({"event_type": "+credit", "config_id": config, "event_id": "e-1", "url_params": {"value": 100.25}});
    let waiting =
        service.api.post("/webhooks", body.clone()).await.json()["queue_id"].as_str().unwrap().to_owned();
    let replay = async |id: &str| {
        service.api.post(&format!("/webhooks/{id}/replay"), json!({"current_url": true})).await
    };
    assert_eq!(replay(&waiting).await.status, 409, "it waits for that URL already");

    service.api.patch(&path, json!({"postback_url": format!("{}/moved?a=1", new.url)})).await;
    let (of_dead, of_waiting) = (replay(&dead).await, replay(&waiting).await);
    assert_eq!((of_dead.status, of_waiting.status), (201, 201), "{} {}", of_dead.text, of_waiting.text);
    assert_eq!(of_waiting.json()["replay_of"], waiting);
    let cancelled = service.api.get(&format!("/webhooks/{waiting}")).await.json();
    assert_eq!(cancelled["status"], "cancelled");
    assert!(
        cancelled["status_reason"]
            .as_str()
            .unwrap()
            .contains(of_waiting.json()["queue_id"].as_str().unwrap())
    );
    // asked again, nothing more is made; the event is the new delivery's
    assert_eq!(replay(&waiting).await.status, 200);
    let again = service.api.post("/webhooks", body).await;
    assert_eq!(
        (again.status, &again.json()["queue_id"]),
        (200, &of_waiting.json()["queue_id"]),
        "{}",
        again.text
    );

    service.api.patch(&path, json!({"enabled": true})).await;
    let delivered =
        service.api.delivery_in(of_waiting.json()["queue_id"].as_str().unwrap(), "completed").await;
    assert!(delivered["webhook_url"].as_str().unwrap().ends_with("/moved?a=1&value=100.25"), "{delivered}");
    service.api.delivery_in(of_dead.json()["queue_id"].as_str().unwrap(), "completed").await;
    assert_eq!((old.count(), new.count()), (1, 2));
    service.stop().await;
}

#[tokio::test]
async fn whoever_sends_a_cancelled_event_again_is_told_that_it_is_not_delivered() {
    let service = TestService::start().await;
    let config = service.api.register("http://127.0.0.1:1", json!({"enabled": false})).await;
    let event = json!({"event_type": "+credit", "config_id": config, "event_id": "e-1"});
    let queue_id =
        service.api.post("/webhooks", event.clone()).await.json()["queue_id"].as_str().unwrap().to_owned();
    assert_eq!(service.api.post("/webhooks", event.clone()).await.status, 200);
    service.api.post(&format!("/webhooks/{queue_id}/cancel"), json!({})).await;

    let again = service.api.post("/webhooks", event.clone()).await;
    assert_eq!(again.status, 409, "{}", again.text);
    assert!(again.json()["detail"].as_str().unwrap().contains(&queue_id), "{}", again.text);
    let batch = service.api.post("/webhooks/batch", json!([event])).await.json();
    assert_eq!(batch["results"][0]["error"]["status"], 409, "{batch}");
    service.stop().await;
}

#[tokio::test]
async fn faults_of_our_own_hold_deliveries_and_use_up_no_attempts() {
    let receiver = TestReceiver::start().await;
    let database = TestDatabase::new().await;
    let api = TestService::start_with(Role::Api, database.clone(), &[]).await;
    let settings = json!({"max_retries": 0, "circuit": {"cooldown_ms": 100, "cooldown_cap_ms": 100}});
    let config = api.api.register(&receiver.url, settings).await;
    let queue_id = api.api.credit(config).await;

    // a worker that was started without the setting
    let worker =
        TestService::start_with(Role::Worker, database.clone(), &[("EGRESS_ALLOW", "10.0.0.0/8")]).await;
    let held = circuit_in(&api.api, config, "open").await;
    assert!(held["reason"].as_str().unwrap().contains("EGRESS_ALLOW"), "{held}");
    eventually("several probes", async || {
        let probes: i64 = database.scalar("select count(*) from webhook_probes").await;
        (probes >= 3).then_some(())
    })
    .await;
    let waiting = api.api.delivery_in(&queue_id, "pending").await;
    assert_eq!((&waiting["retry_count"], receiver.count()), (&json!(0), 0));
    worker.stop().await;

    let mended = TestService::start_with(Role::Worker, database, &[]).await;
    api.api.delivery_in(&queue_id, "completed").await;
    assert_eq!(receiver.count(), 1);
    mended.stop().await;
    api.stop().await;
}

#[tokio::test]
async fn a_change_checks_what_it_changes_so_that_pausing_always_works() {
    let database = TestDatabase::new().await;
    let api = TestService::start_with(Role::Api, database.clone(), &[]).await;
    let config = api.api.register("http://127.0.0.1:1", json!({})).await;
    let strict = TestService::start_with(Role::Api, database, &[("EGRESS_ALLOW", "10.0.0.0/8")]).await;
    let path = format!("/api/webhooks/{config}");

    for change in [
        json!({"enabled": false}),
        json!({"circuit": {"state": "open"}}),
        json!({"max_in_flight": 5}),
        json!({}),
    ] {
        let changed = strict.api.patch(&path, change.clone()).await;
        assert_eq!(changed.status, 200, "{change}: {}", changed.text);
    }
    let refused = strict.api.patch(&path, json!({"postback_url": "http://127.0.0.1:2/"})).await;
    assert_eq!((refused.status, refused.fields()), (422, vec!["postback_url".to_owned()]));
    strict.stop().await;
    api.stop().await;
}
