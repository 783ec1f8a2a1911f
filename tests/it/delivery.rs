//! Deliveries out: what is sent, how answers are judged, and what the audit keeps of them.

use std::time::Duration;

use serde_json::{Value, json};
use webhook_processor::infrastructure::service::Role;

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command};
use crate::support::raw_receiver::{self, Behaviour};
use crate::support::receiver::{Reply, TestReceiver};
use crate::support::service::TestService;

/// Retries that a test need not wait for, and that no circuit holds up.
fn quick() -> Value {
    json!({"retry_base_ms": 1, "retry_cap_ms": 1, "circuit": {"failure_rate": null}})
}

#[tokio::test]
async fn credits_and_debits_are_requested_to_the_letter() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config =
        service.api.register(&receiver.url, json!({"headers": {"Authorization": "Bearer s3cret"}})).await;

    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let credit = json!({"event_type": "+credit", "config_id": config, "url_params": {"user_id": "user 1", "value": 100}});
    let request =
        service.api.request(reqwest::Method::POST, "/webhooks").header("traceparent", trace).json(&credit);
    let queue_id = service.api.send(request).await.json()["queue_id"].as_str().unwrap().to_owned();
    let delivery = service.api.delivery_in(&queue_id, "completed").await;
    let debit =
        service.api.post("/webhooks", json!({"event_type": "-debit", "config_id": config})).await.json();
    service.api.delivery_in(debit["queue_id"].as_str().unwrap(), "completed").await;

    let arrivals = receiver.arrivals();
    assert_eq!(arrivals.len(), 2);
    assert_eq!(
        (arrivals[0].method.as_str(), arrivals[0].uri.as_str()),
        ("GET", "/postback?user_id=user%201&value=100")
    );
    assert_eq!(arrivals[0].headers["webhook-id"], queue_id);
    assert_eq!(arrivals[0].headers["webhook-event-id"], queue_id);
    assert_eq!(arrivals[0].headers["authorization"], "Bearer s3cret");
    assert_eq!(arrivals[0].headers["traceparent"], trace);
    assert_eq!(arrivals[1].uri, "/chargeback");
    let attempts = delivery["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 1);
    assert_eq!((&attempts[0]["http_status"], &attempts[0]["response_body"]), (&json!(200), &json!("ok")));
    assert!(attempts[0]["duration_ms"].is_number() && attempts[0]["error"].is_null());
    service.stop().await;
}

#[tokio::test]
async fn a_failing_delivery_is_retried_and_every_attempt_is_kept() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&receiver.url, quick()).await;
    receiver.reply_with([
        Reply::status(500).body("boom"),
        Reply::status(404),
        Reply::status(302),
        Reply::status(200),
    ]);

    let queue_id = service.api.credit(config).await;
    let delivery = service.api.delivery_in(&queue_id, "completed").await;

    let statuses: Vec<_> =
        delivery["attempts"].as_array().unwrap().iter().map(|a| a["http_status"].as_i64().unwrap()).collect();
    assert_eq!(statuses, [500, 404, 302, 200]);
    assert_eq!(delivery["attempts"][0]["response_body"], "boom");
    assert_eq!(delivery["attempts"][2]["error"], "redirects are not followed");
    assert_eq!((&delivery["retry_count"], receiver.count()), (&json!(3), 4));
    let rows: i64 = service
        .database
        .scalar("select count(*) from webhook_attempts where completed_at >= started_at")
        .await;
    assert_eq!(rows, 4);
    service.stop().await;
}

#[tokio::test]
async fn after_the_last_retry_a_delivery_is_a_dead_letter_that_can_be_replayed() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&receiver.url, quick()).await;
    receiver.reply_with((0..7).map(|_| Reply::status(503)));

    let queue_id = service.api.credit(config).await;
    let dead = service.api.delivery_in(&queue_id, "failed").await;

    assert_eq!(dead["attempts"].as_array().unwrap().len(), 7);
    assert_eq!((&dead["status_reason"], &dead["retry_count"]), (&json!("retries exhausted"), &json!(6)));
    let letters: i64 = service
        .database
        .scalar("select count(*) from webhook_dead_letters where last_http_status = 503")
        .await;
    assert_eq!(letters, 1);
    assert_eq!(service.api.post(&format!("/webhooks/{queue_id}/retry"), json!({})).await.status, 409);

    let replay = service.api.post(&format!("/webhooks/{queue_id}/replay"), json!({})).await;
    assert_eq!(replay.status, 201, "{}", replay.text);
    assert_eq!(replay.json()["replay_of"], queue_id);
    let delivered = service.api.delivery_in(replay.json()["queue_id"].as_str().unwrap(), "completed").await;
    assert_eq!(delivered["webhook_url"], dead["webhook_url"]);
    assert_eq!(service.api.get(&format!("/webhooks/{queue_id}")).await.json(), dead);

    // asked again, it is not sent again
    let again = service.api.post(&format!("/webhooks/{queue_id}/replay"), json!({})).await;
    assert_eq!((again.status, &again.json()["queue_id"]), (200, &replay.json()["queue_id"]));
    assert_eq!(receiver.count(), 8);
    // and the event shows both
    let of_event = service.api.get(&format!("/webhooks?event_id={queue_id}")).await.json();
    assert_eq!(of_event["items"].as_array().unwrap().len(), 2);
    service.stop().await;
}

#[tokio::test]
async fn gone_ends_the_delivery_and_disables_the_config() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&receiver.url, json!({})).await;
    receiver.reply_with([Reply::status(410)]);

    let queue_id = service.api.credit(config).await;
    let gone = service.api.delivery_in(&queue_id, "failed").await;
    let view = service.api.get(&format!("/api/webhooks/{config}")).await.json();
    let held = service.api.credit(config).await;

    assert_eq!(gone["attempts"].as_array().unwrap().len(), 1);
    assert_eq!(
        (&view["enabled"], &view["disabled_reason"]),
        (&json!(false), &json!("the receiver answered 410 Gone"))
    );
    assert_eq!(service.api.get(&format!("/webhooks/{held}")).await.json()["status"], "pending");
    let enabled =
        service.api.patch(&format!("/api/webhooks/{config}"), json!({"enabled": true})).await.json();
    assert!(enabled["disabled_reason"].is_null());
    service.api.delivery_in(&held, "completed").await;
    service.stop().await;
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&receiver.url, quick()).await;
    receiver.reply_with([Reply::status(429).header("retry-after", "1800")]);

    let queue_id = service.api.credit(config).await;
    let due: i64 = eventually("the retry is scheduled", async || {
        sqlx::query_scalar(
            "select extract(epoch from next_retry_at - now())::bigint from webhook_queue_open where retry_count = 1",
        )
        .fetch_optional(&service.database.pool)
        .await
        .unwrap()
    })
    .await;

    assert!((1700..=1800).contains(&due), "{due}");
    // a person need not wait that long
    assert_eq!(service.api.post(&format!("/webhooks/{queue_id}/retry"), json!({})).await.status, 200);
    service.api.delivery_in(&queue_id, "completed").await;
    service.stop().await;
}

#[tokio::test]
async fn a_slow_receiver_times_out_and_holds_up_nobody() {
    let (slow, fast) = (TestReceiver::start().await, TestReceiver::start().await);
    let service = TestService::start_with(
        Role::Serve,
        TestDatabase::new().await,
        &[("WORKER_COUNT", "1"), ("WORKER_BATCH_SIZE", "20")],
    )
    .await;
    slow.reply_always(Reply::status(200).after(Duration::from_hours(1)));
    let stuck = service.api.register(&slow.url, json!({"timeout_ms": 30_000})).await;
    let timed = service.api.register(&slow.url, json!({"timeout_ms": 50, "max_retries": 0})).await;
    let good = service.api.register(&fast.url, json!({})).await;
    for _ in 0..10 {
        service.api.credit(stuck).await;
    }
    eventually("all ten hang", async || (slow.count() == 10).then_some(())).await;

    for _ in 0..30 {
        let queue_id = service.api.credit(good).await;
        service.api.delivery_in(&queue_id, "completed").await;
    }
    let late = service.api.credit(timed).await;
    let late = service.api.delivery_in(&late, "failed").await;

    assert_eq!(late["attempts"][0]["error"], "timed out after 50 ms");
    assert!(late["attempts"][0]["http_status"].is_null());
    // the ten still hang: the service is dropped, not drained
}

#[tokio::test]
async fn no_more_of_a_response_is_read_than_is_kept() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&receiver.url, json!({})).await;
    receiver.reply_with([
        Reply::status(200).body("é".repeat(1_000_000)),
        Reply::status(200).body(vec![b'a', 0, 0xff]),
    ]);

    let first = service.api.credit(config).await;
    let large = service.api.delivery_in(&first, "completed").await;
    let second = service.api.credit(config).await;
    let odd = service.api.delivery_in(&second, "completed").await;

    assert_eq!(large["attempts"][0]["response_body"].as_str().unwrap(), "é".repeat(2048));
    assert_eq!(odd["attempts"][0]["response_body"], "a\u{FFFD}\u{FFFD}");
    service.stop().await;
}

#[tokio::test]
async fn hostile_receivers_are_news_about_the_receiver_and_nothing_more() {
    let service = TestService::start().await;
    for (answer, status, expected) in [
        (&b""[..], json!(null), "the request failed"),
        (b"garbage\r\n\r\n", json!(null), "the request failed"),
        (b"HTTP/1.1 500 Oops\r\ncontent-length: 100\r\n\r\nshort", json!(500), "the response broke off"),
        (
            b"HTTP/1.1 503 Oops\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            json!(503),
            "the response broke off",
        ),
    ] {
        let config = service
            .api
            .register(
                &raw_receiver::start(Behaviour::AnswerAndHangUp(answer)).await,
                json!({"max_retries": 0}),
            )
            .await;
        let queue_id = service.api.credit(config).await;
        let dead = service.api.delivery_in(&queue_id, "failed").await;
        let error = dead["attempts"][0]["error"].as_str().unwrap();
        assert!(error.starts_with(expected), "{error}");
        assert!(!error.contains("127.0.0.1:"), "{error}");
        assert_eq!(dead["attempts"][0]["http_status"], status);
    }
    let config = service.api.register("http://127.0.0.1:1", json!({"max_retries": 0})).await;
    let queue_id = service.api.credit(config).await;
    let dead = service.api.delivery_in(&queue_id, "failed").await;
    assert!(dead["attempts"][0]["error"].as_str().unwrap().starts_with("cannot connect"), "{dead}");
    service.stop().await;
}

#[tokio::test]
async fn a_success_whose_body_breaks_off_is_a_success_and_the_audit_tells() {
    let service = TestService::start().await;
    let receiver = raw_receiver::start(Behaviour::AnswerAndHangUp(
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort",
    ))
    .await;
    let config = service.api.register(&receiver, json!({})).await;
    let queue_id = service.api.credit(config).await;

    let delivery = service.api.delivery_in(&queue_id, "completed").await;

    let attempt = &delivery["attempts"][0];
    assert_eq!((&attempt["http_status"], &attempt["response_body"]), (&json!(200), &json!("short")));
    assert!(attempt["error"].as_str().unwrap().starts_with("the response broke off"), "{attempt}");
    service.stop().await;
}

#[tokio::test]
async fn an_endpoint_that_never_answers_leaves_room_for_the_others() {
    let (hung, good) = (TestReceiver::start().await, TestReceiver::start().await);
    let few = [("WORKER_COUNT", "2"), ("WORKER_BATCH_SIZE", "20"), ("WORKER_POLL_INTERVAL", "1h")];
    let service = TestService::start_with(Role::Serve, TestDatabase::new().await, &few).await;
    hung.reply_always(Reply::status(200).after(Duration::from_hours(1)));
    let mut stuck = Vec::new();
    for _ in 0..3 {
        stuck.push(service.api.register(&hung.url, json!({"timeout_ms": 30_000})).await);
    }
    for _ in 0..50 {
        let batch: Vec<_> =
            stuck.iter().map(|config| json!({"event_type": "+credit", "config_id": config})).collect();
        assert_eq!(service.api.post("/webhooks/batch", json!(batch)).await.status, 200);
    }
    eventually("many requests hang", async || (hung.count() >= 20).then_some(())).await;

    let config = service.api.register(&good.url, json!({})).await;
    for _ in 0..100 {
        let queue_id = service.api.credit(config).await;
        service.api.delivery_in(&queue_id, "completed").await;
    }

    assert_eq!(good.count(), 100);
    assert!(hung.count() < 40, "{} of 40 leases hang", hung.count());
    // they still hang: the service is dropped, not drained
}

#[tokio::test]
async fn a_backlog_of_one_endpoint_alone_is_drained_without_waiting_for_a_poll() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::new().await);
    let api = TestService::start_with(Role::Api, database.clone(), &[]).await;
    let config = api.api.register(&receiver.url, json!({})).await;
    let batch = vec![json!({"event_type": "+credit", "config_id": config}); 900];
    api.api.post("/webhooks/batch", json!(batch)).await;

    let few = [("WORKER_COUNT", "2"), ("WORKER_BATCH_SIZE", "20"), ("WORKER_POLL_INTERVAL", "1h")];
    let worker = TestService::start_with(Role::Worker, database, &few).await;
    eventually("all arrive", async || (receiver.count() == 900).then_some(())).await;

    worker.stop().await;
    api.stop().await;
}

/// Why nothing is sent to a config, once nothing is.
async fn held_by_the_address(service: &TestService, config: i64) -> String {
    eventually("its circuit opens", async || {
        let circuit = service.api.get(&format!("/api/webhooks/{config}")).await.json()["circuit"].clone();
        circuit["reason"].as_str().map(str::to_owned)
    })
    .await
}

#[tokio::test]
async fn addresses_that_are_not_public_are_called_only_if_allowed() {
    let receiver = TestReceiver::start().await;
    let port = receiver.url.rsplit(':').next().unwrap();
    let service =
        TestService::start_with(Role::Serve, TestDatabase::new().await, &[("EGRESS_ALLOW", "10.0.0.0/8")])
            .await;
    for host in ["127.0.0.1", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "[::1]", "169.254.169.254"] {
        let body = json!({"name": "x", "postback_url": format!("http://{host}:{port}/")});
        let answer = service.api.post("/api/webhooks", body).await;
        assert_eq!((answer.status, answer.fields()), (422, vec!["postback_url".to_owned()]), "{host}");
    }
    // a name is judged by what it resolves to, at each attempt
    let body = json!({"name": "x", "postback_url": format!("http://localhost:{port}/"), "max_retries": 0});
    let config = service.api.post("/api/webhooks", body).await.json()["id"].as_i64().unwrap();
    let queue_id = service.api.credit(config).await;
    let held = held_by_the_address(&service, config).await;
    assert!(held.contains("not public"), "{held}");
    let assert_waits = async |queue_id: &str| {
        let waiting = service.api.delivery_in(queue_id, "pending").await;
        assert_eq!(waiting["retry_count"], 0, "no attempt is used up");
    };
    assert_waits(&queue_id).await;
    // so is an address that was allowed when the config was registered
    service
        .database
        .execute(
            "update webhook_configs set postback_url = 'http://127.0.0.1:1/', updated_at = clock_timestamp(),
                    circuit_state = 'closed', circuit_reason = null, circuit_probe_error = null, circuit_probe_at = null",
        )
        .await;
    let to_the_new_url = service.api.credit(config).await;
    let held = held_by_the_address(&service, config).await;
    assert!(held.contains("not public"), "{held}");
    assert_waits(&to_the_new_url).await;
    assert_eq!(receiver.count(), 0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_of_the_environment_are_not_used() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::new().await);
    let mut serve = command(&database, &["serve"]);
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        serve.env(name, "http://127.0.0.1:1");
    }
    let process = Process::start(serve);
    let api = process.api();
    let config = api.register(&receiver.url, json!({"max_retries": 0})).await;
    let queue_id = api.credit(config).await;

    api.delivery_in(&queue_id, "completed").await;

    let arrival = &receiver.arrivals()[0];
    assert!(arrival.uri.starts_with('/'), "as to the receiver itself: {}", arrival.uri);
}

#[tokio::test]
async fn priorities_go_first() {
    let receiver = TestReceiver::start().await;
    let database = TestDatabase::new().await;
    let api = TestService::start_with(Role::Api, database.clone(), &[]).await;
    let config = api.api.register(&receiver.url, json!({})).await;
    for priority in [3, 2, 1, 0] {
        let event = json!({"event_type": "+credit", "config_id": config, "priority": priority, "url_params": {"p": priority}});
        assert_eq!(api.api.post("/webhooks", event).await.status, 201);
    }

    let one_by_one = [("WORKER_COUNT", "1"), ("WORKER_BATCH_SIZE", "1")];
    let worker = TestService::start_with(Role::Worker, database, &one_by_one).await;
    eventually("all four arrive", async || (receiver.count() == 4).then_some(())).await;

    let order: Vec<_> = receiver.arrivals().into_iter().map(|arrival| arrival.uri).collect();
    assert_eq!(order, ["/postback?p=0", "/postback?p=1", "/postback?p=2", "/postback?p=3"]);
    worker.stop().await;
    api.stop().await;
}
