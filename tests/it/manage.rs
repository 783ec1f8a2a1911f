//! Configs, lists, and what people may do to single deliveries.

use serde_json::{Value, json};
use webhook_processor::infrastructure::http::openapi;
use webhook_processor::infrastructure::service::Role;

use crate::support::postgres::TestDatabase;
use crate::support::receiver::{Reply, TestReceiver};
use crate::support::service::TestService;

async fn api_only() -> TestService {
    TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await
}

#[tokio::test]
async fn a_config_is_registered_shown_changed_and_deleted() {
    let service = api_only().await;
    let body =
        json!({"name": "shop", "postback_url": "https://partner.example/p", "headers": {"X-Key": "k"}});

    let created = service.api.post("/api/webhooks", body).await;
    let id = created.json()["id"].as_i64().unwrap();
    assert_eq!(created.headers["location"], format!("/api/webhooks/{id}"));
    let defaults = json!({"timeout_ms": 30_000, "max_retries": 6, "retry_base_ms": 1_000, "retry_cap_ms": 300_000,
                          "retry_jitter": 0.25, "priority": 2, "enabled": true, "chargeback_url": null, "headers": {"x-key": "k"}});
    for (field, value) in defaults.as_object().unwrap() {
        assert_eq!(&created.json()[field], value, "{field}");
    }
    assert_eq!(service.api.get(&format!("/api/webhooks/{id}")).await.json(), created.json());

    let change = json!({"chargeback_url": "https://partner.example/c", "postback_url": null, "retry_jitter": 0, "enabled": false});
    let changed = service.api.patch(&format!("/api/webhooks/{id}"), change).await.json();
    assert_eq!(
        (&changed["postback_url"], &changed["name"], &changed["enabled"]),
        (&Value::Null, &json!("shop"), &json!(false))
    );
    assert_eq!(
        service.api.patch(&format!("/api/webhooks/{id}"), json!({"chargeback_url": null})).await.fields(),
        ["postback_url"]
    );

    assert_eq!(service.api.delete(&format!("/api/webhooks/{id}")).await.status, 204);
    for answer in [
        service.api.delete(&format!("/api/webhooks/{id}")).await,
        service.api.get(&format!("/api/webhooks/{id}")).await,
        service.api.patch(&format!("/api/webhooks/{id}"), json!({})).await,
        service.api.get("/api/webhooks/0").await,
        service.api.get("/api/webhooks/x").await,
    ] {
        assert_eq!(answer.status, 404);
    }
    let kept: bool = service.database.scalar("select deleted_at is not null from webhook_configs").await;
    assert!(kept);
    service.stop().await;
}

/// So that none is forgotten on its way to the store and back, nor here.
#[tokio::test]
async fn every_setting_is_kept_as_it_was_given() {
    let service = api_only().await;
    let settings = json!({
        "name": "shop", "postback_url": "https://partner.example/p", "chargeback_url": "https://partner.example/c",
        "headers": {"x-key": "k"}, "timeout_ms": 1_234, "max_retries": 3, "retry_base_ms": 12, "retry_cap_ms": 34,
        "retry_jitter": 0.15, "priority": 1, "max_in_flight": 5, "rate_limit_per_second": 7, "enabled": false,
        "circuit": {"failure_rate": 0.35, "window_ms": 2_000, "attempts_min": 9, "failures_in_row": 4, "cooldown_ms": 300,
                    "cooldown_cap_ms": 400},
    });
    let document = serde_json::to_value(openapi()).unwrap();
    for (schema, given) in [("ConfigBody", &settings), ("CircuitBody", &settings["circuit"])] {
        for name in document["components"]["schemas"][schema]["properties"].as_object().unwrap().keys() {
            assert!(given.get(name).is_some() || name == "state", "{schema}.{name} is not looked at");
        }
    }

    let registered = service.api.post("/api/webhooks", settings.clone()).await;
    let with_defaults = service.api.register("http://127.0.0.1:1", json!({})).await;
    let changed = service.api.patch(&format!("/api/webhooks/{with_defaults}"), settings.clone()).await;

    for answer in [registered, changed] {
        let shown = service.api.get(&format!("/api/webhooks/{}", answer.json()["id"])).await.json();
        assert_eq!(shown, answer.json());
        for (given, shown) in [(&settings, &shown), (&settings["circuit"], &shown["circuit"])] {
            for (name, value) in given.as_object().unwrap() {
                assert!(&shown[name] == value || name == "circuit", "{name}: {}", shown[name]);
            }
        }
    }
    service.stop().await;
}

#[tokio::test]
async fn a_url_that_grows_when_it_is_encoded_is_refused_and_spoils_nothing() {
    let service = api_only().await;
    let id = service.api.register("http://127.0.0.1:1", json!({})).await;
    let long = json!({"postback_url": format!("http://127.0.0.1:1/?{}", "é".repeat(900))});

    assert_eq!(service.api.patch(&format!("/api/webhooks/{id}"), long).await.fields(), ["postback_url"]);
    // nor does a row that someone wrote by hand hide the others
    let other = service.api.register("http://127.0.0.1:1", json!({})).await;
    service.database.execute("update webhook_configs set postback_url = 'nonsense' where id = (select min(id) from webhook_configs)").await;
    let listed = service.api.get("/api/webhooks").await.json();

    assert_eq!(listed["items"].as_array().unwrap().len(), 1);
    assert_eq!(listed["items"][0]["id"], other);
    service.stop().await;
}

#[tokio::test]
async fn a_config_that_cannot_work_is_refused_with_all_fields_at_fault() {
    let service = api_only().await;
    let body = json!({"name": "", "postback_url": "ftp://x/", "chargeback_url": "http://u:p@x.example/", "timeout_ms": 0, "max_retries": 7,
                      "retry_base_ms": 10, "retry_cap_ms": 5, "retry_jitter": 1, "priority": 9, "headers": {"Host": "x", "a": "\n"}});
    let answer = service.api.post("/api/webhooks", body).await;
    assert_eq!(answer.status, 422);
    let expected = [
        "name",
        "postback_url",
        "chargeback_url",
        "headers.host",
        "headers.a",
        "timeout_ms",
        "max_retries",
        "retry_jitter",
        "retry_cap_ms",
        "priority",
    ];
    let mut fields = answer.fields();
    fields.sort();
    let mut expected = expected.map(str::to_owned).to_vec();
    expected.sort();
    assert_eq!(fields, expected, "{}", answer.text);
    assert_eq!(service.api.post("/api/webhooks", json!({"nmae": "x"})).await.fields(), ["nmae"]);
    assert_eq!(service.api.post("/api/webhooks", json!({"name": 1})).await.fields(), ["name"]);
    service.stop().await;
}

#[tokio::test]
async fn lists_are_cut_into_pages_that_miss_and_repeat_nothing() {
    let service = api_only().await;
    let mut configs = Vec::new();
    for _ in 0..5 {
        configs.push(service.api.register("http://127.0.0.1:1", json!({})).await);
    }
    let mut ids = Vec::new();
    for number in 0..7 {
        let event = json!({"event_type": "+credit", "config_id": configs[number % 2], "event_id": format!("e{number}")});
        ids.push(service.api.post("/webhooks", event).await.json()["queue_id"].clone());
    }
    ids.reverse();

    for (path, key, expected) in [
        ("/webhooks?limit=3", "queue_id", ids.clone()),
        ("/api/webhooks?limit=2", "id", configs.iter().map(|id| json!(id)).collect()),
    ] {
        let (mut seen, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = service.api.get(&format!("{path}{cursor}")).await.json();
            seen.extend(page["items"].as_array().unwrap().iter().map(|item| item[key].clone()));
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        assert_eq!(seen, expected, "{path}");
    }
    for (filter, count) in [
        ("event_id=no-such-event".into(), 0),
        (format!("config_id={}", configs[0]), 4),
        ("event_id=e3".into(), 1),
        ("event_type=%2Bcredit".into(), 7),
        ("event_type=+credit".into(), 7),
        ("event_type=-debit".into(), 0),
        ("status=pending".into(), 7),
        ("status=completed".into(), 0),
        ("from=2020-01-01T00:00:00Z&to=2020-01-02T00:00:00Z".into(), 0),
        ("from=2020-01-01T00:00:00Z".into(), 7),
    ] {
        let page = service.api.get(&format!("/webhooks?{filter}")).await;
        assert_eq!(page.json()["items"].as_array().unwrap().len(), count, "{filter}: {}", page.text);
    }
    service.stop().await;
}

#[tokio::test]
async fn a_waiting_delivery_can_be_cancelled_once_and_a_terminal_one_replayed() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&receiver.url, json!({})).await;
    let later = json!({"event_type": "+credit", "config_id": config, "scheduled_at": chrono::Utc::now() + chrono::TimeDelta::days(300), "event_id": "later"});
    let queue_id = service.api.post("/webhooks", later).await.json()["queue_id"].as_str().unwrap().to_owned();
    let act =
        async |action: &str| service.api.post(&format!("/webhooks/{queue_id}/{action}"), json!({})).await;

    assert_eq!(act("replay").await.status, 409);
    let cancelled = act("cancel").await;
    assert_eq!(
        (cancelled.status, cancelled.json()["status_reason"].as_str()),
        (200, Some("cancelled by request"))
    );
    for action in ["cancel", "retry"] {
        let again = act(action).await;
        assert_eq!(again.status, 409);
        assert!(again.json()["detail"].as_str().unwrap().contains("cancelled"), "{}", again.text);
    }
    let replay = act("replay").await;
    assert_eq!(replay.status, 201);
    assert_eq!(replay.json()["event_id"], "later");
    service.api.delivery_in(replay.json()["queue_id"].as_str().unwrap(), "completed").await;
    assert_eq!(receiver.count(), 1);

    let unknown = "/webhooks/01900000-0000-7000-8000-000000000000";
    assert_eq!(service.api.get(unknown).await.status, 404);
    for action in ["retry", "cancel", "replay"] {
        assert_eq!(service.api.post(&format!("{unknown}/{action}"), json!({})).await.status, 404);
    }
    assert_eq!(service.api.delete(&format!("/api/webhooks/{config}")).await.status, 204);
    assert_eq!(act("replay").await.status, 409);
    service.stop().await;
}

#[tokio::test]
async fn a_disabled_config_holds_its_deliveries_and_enabling_it_sends_them() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&receiver.url, json!({"enabled": false})).await;
    let other = service.api.register(&receiver.url, json!({})).await;
    let held = service.api.credit(config).await;
    let sent = service.api.credit(other).await;
    service.api.delivery_in(&sent, "completed").await;

    assert_eq!(service.api.get(&format!("/webhooks/{held}")).await.json()["status"], "pending");
    let statistics = service.api.get("/webhooks/stats").await.json();
    assert!(statistics["oldest_ready_age_ms"].is_null(), "a held delivery is not late: {statistics}");
    service.api.patch(&format!("/api/webhooks/{config}"), json!({"enabled": true})).await;
    service.api.delivery_in(&held, "completed").await;
    service.stop().await;
}

#[tokio::test]
async fn health_and_metrics_tell_how_the_service_is() {
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let config = service.api.register(&receiver.url, json!({"max_retries": 0})).await;
    receiver.reply_with([Reply::status(200), Reply::status(500)]);
    for status in ["completed", "failed"] {
        let queue_id = service.api.credit(config).await;
        service.api.delivery_in(&queue_id, status).await;
    }

    for path in ["/health", "/health/live", "/health/ready"] {
        let answer = service.api.get(path).await;
        assert_eq!((answer.status, &answer.json()["status"]), (200, &json!("ok")), "{path}");
    }
    let made_up = reqwest::Method::from_bytes(b"MADEUP").unwrap();
    assert_eq!(service.api.send(service.api.request(made_up, "/webhooks")).await.status, 405);
    let metrics = service.api.get("/metrics").await.text;
    assert!(!metrics.contains("MADEUP"));
    for name in [
        "webhook_enqueued_total",
        "webhook_attempts_total{outcome=\"success\"}",
        "webhook_attempts_total{outcome=\"http_error\"}",
        "webhook_deliveries_total{status=\"completed\"}",
        "webhook_deliveries_total{status=\"failed\"}",
        "webhook_attempt_duration_seconds_bucket",
        "webhook_first_attempt_delay_seconds_bucket",
        "webhook_queue_depth{state=\"ready\"}",
        "webhook_oldest_ready_age_seconds",
        "webhook_leases_lost_total",
        "webhook_pool_connections{pool=\"engine\",state=\"idle\"}",
    ] {
        assert!(metrics.contains(name), "{name} is missing in\n{metrics}");
    }
    service.stop().await;
}

#[tokio::test]
async fn a_backlog_that_is_too_old_or_a_missing_migration_makes_the_service_not_ready() {
    let service = api_only().await;
    let config = service.api.register("http://127.0.0.1:1", json!({})).await;
    service.api.credit(config).await;
    service.database.execute("update webhook_queue_open set ready_since = now() - interval '1 hour'").await;

    let old = service.api.get("/health/ready").await;
    assert_eq!(old.status, 503);
    assert_eq!(old.json()["checks"][2]["status"], "failing");
    service.database.execute("delete from _sqlx_migrations").await;
    let unmigrated = service.api.get("/health/ready").await;
    assert_eq!((unmigrated.status, &unmigrated.json()["checks"][1]["status"]), (503, &json!("failing")));
    assert_eq!(service.api.get("/health/live").await.status, 200);
    service.stop().await;
}

#[tokio::test]
async fn a_time_limit_that_would_not_hold_is_refused_and_one_that_is_stored_is_shown_with_what_holds() {
    let service =
        TestService::start_with(Role::Api, TestDatabase::new().await, &[("HTTP_TIMEOUT", "10s")]).await;
    let too_long = json!({"name": "slow", "postback_url": "https://x.example/", "timeout_ms": 10_001});
    let id = service.api.register("http://127.0.0.1:1", json!({"timeout_ms": 10_000})).await;
    let path = format!("/api/webhooks/{id}");
    for refused in [
        service.api.post("/api/webhooks", too_long).await,
        service.api.patch(&path, json!({"timeout_ms": 60_000})).await,
    ] {
        assert_eq!((refused.status, refused.fields()), (422, vec!["timeout_ms".to_owned()]));
        assert!(
            refused.text.contains("must be at most 10000, since HTTP_TIMEOUT is 10s"),
            "{}",
            refused.text
        );
    }

    // it was accepted when HTTP_TIMEOUT was longer; other changes are still possible
    service.database.execute("update webhook_configs set timeout_ms = 60000").await;
    let changed = service.api.patch(&path, json!({"priority": 1})).await;
    assert_eq!(changed.status, 200, "{}", changed.text);
    let shown = service.api.get(&path).await.json();
    assert_eq!((&shown["timeout_ms"], &shown["effective_timeout_ms"]), (&json!(60_000), &json!(10_000)));
    service.stop().await;
}

#[tokio::test]
async fn statistics_of_an_unknown_config_are_not_found_and_those_of_a_deleted_one_are() {
    let service = api_only().await;
    let config = service.api.register("http://127.0.0.1:1", json!({})).await;
    assert_eq!(service.api.delete(&format!("/api/webhooks/{config}")).await.status, 204);
    assert_eq!(service.api.get(&format!("/webhooks/stats?config_id={config}")).await.status, 200);
    assert_eq!(service.api.get("/webhooks/stats?config_id=4711").await.status, 404);
    service.stop().await;
}

#[tokio::test]
async fn a_name_with_a_forbidden_address_beside_an_allowed_one_is_called_at_the_allowed_one() {
    // localhost is ::1, too, which is not allowed here
    let (receiver, service) = (TestReceiver::start().await, TestService::start().await);
    let url = receiver.url.replace("127.0.0.1", "localhost");
    let config = service.api.register(&url, json!({"max_retries": 0})).await;
    let queue_id = service.api.credit(config).await;
    service.api.delivery_in(&queue_id, "completed").await;
    service.stop().await;
}
