//! What an attempt keeps beside status and body: the kind of its error, and what settles a dispute.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use webhook_processor::infrastructure::service::Role;

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::service::TestService;

/// A receiver that gives its connections these answers, one after the other, and the last one from then on.
async fn receiver(answers: Vec<Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (answers, next) = (Arc::new(answers), Arc::new(AtomicUsize::new(0)));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (answers, next) = (answers.clone(), next.clone());
            tokio::spawn(async move {
                let mut request = [0; 4096];
                // the client may hang up in any way
                let _ = stream.read(&mut request).await;
                let number = next.fetch_add(1, Ordering::SeqCst).min(answers.len() - 1);
                let _ = stream.write_all(&answers[number]).await;
            });
        }
    });
    url
}

fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}")
        .into_bytes()
}

async fn service(settings: &[(&str, &str)]) -> TestService {
    TestService::start_with(Role::Serve, TestDatabase::new().await, settings).await
}

/// The attempts of a new delivery to this URL, once it is in this final status.
async fn attempts_at(service: &TestService, url: &str, settings: Value, status: &str) -> Vec<Value> {
    let config = service.api.register(url, settings).await;
    let queue_id = service.api.credit(config).await;
    let ended = service.api.delivery_in(&queue_id, status).await;
    ended["attempts"].as_array().unwrap().clone()
}

#[tokio::test]
async fn an_attempt_keeps_where_it_went_and_what_came_back_also_once_another_has_followed() {
    let service = service(&[("RESPONSE_BODY_MAX", "10")]).await;
    let busy = answer("503 Busy", "server: nginx\r\nx-request-id: a1\r\n", "0123456789");
    let well = answer("200 OK", "x-request-id: b2\r\nset-cookie: session=s3cret\r\n", "0123456789+");
    let url = receiver(vec![busy, well]).await;
    let settings = json!({"max_retries": 1, "retry_base_ms": 1, "retry_cap_ms": 1});
    let attempts = attempts_at(&service, &url, settings, "completed").await;
    let address = url.strip_prefix("http://").unwrap();
    for (attempt, kind, headers, is_cut) in [
        (
            &attempts[0],
            Some("http_status"),
            json!({"connection": "close", "content-length": "10", "server": "nginx", "x-request-id": "a1"}),
            false,
        ),
        (
            &attempts[1],
            None,
            json!({"connection": "close", "content-length": "11", "x-request-id": "b2"}),
            true,
        ),
    ] {
        assert_eq!(attempt["error_kind"], json!(kind), "{attempt}");
        assert_eq!(attempt["remote_address"], address, "{attempt}");
        assert_eq!(attempt["response_headers"], headers, "{attempt}");
        assert_eq!((&attempt["body_cut"], &attempt["response_body"]), (&json!(is_cut), &json!("0123456789")));
        let [first_byte, duration] =
            ["first_byte_ms", "duration_ms"].map(|name| attempt[name].as_i64().unwrap());
        assert!((0..=duration).contains(&first_byte), "{attempt}");
    }

    // for people with SQL, too
    let viewed: Value = service
        .database
        .scalar(
            "select json_agg(json_build_object('error_kind', error_kind, 'remote_address', remote_address, 'body_cut', body_cut,
               'response_headers', response_headers, 'first_byte_ms', first_byte_ms) order by attempt) from webhook_attempts",
        )
        .await;
    for (viewed, shown) in viewed.as_array().unwrap().iter().zip(&attempts) {
        for (name, value) in viewed.as_object().unwrap() {
            assert_eq!(value, &shown[name], "{name}");
        }
    }
    let row: String = service.database.scalar("select q::text from webhook_queue q").await;
    assert!(row.contains("nginx") && !row.contains("s3cret"), "{row}");
    service.stop().await;
}

#[tokio::test]
async fn however_many_headers_a_receiver_sends_few_are_kept() {
    let service = service(&[]).await;
    let flood: Vec<String> = (0..90).map(|n| format!("x-{n}: {}\r\n", "y".repeat(50 * n))).collect();
    let url = receiver(vec![answer("200 OK", &flood.concat(), "")]).await;
    let attempts = attempts_at(&service, &url, json!({}), "completed").await;
    let headers = attempts[0]["response_headers"].as_object().unwrap();
    let bytes: usize = headers.iter().map(|(name, value)| name.len() + value.as_str().unwrap().len()).sum();
    assert!((2..=32).contains(&headers.len()) && bytes <= 2048, "{headers:?}");
    service.stop().await;
}

#[tokio::test]
async fn errors_are_counted_by_kind_in_rows_statistics_and_metrics_alike() {
    let service = service(&[]).await;
    let refused = "http://127.0.0.1:1";
    let failing = receiver(vec![answer("500 Broken", "", "")]).await;
    let broken = receiver(vec![b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf".to_vec()]).await;
    let twice = json!({"max_retries": 1, "retry_base_ms": 1, "retry_cap_ms": 1});
    for (url, status, kind) in [
        (refused, "failed", "connect"),
        (failing.as_str(), "failed", "http_status"),
        // a success all the same
        (broken.as_str(), "completed", "reset"),
    ] {
        for attempt in attempts_at(&service, url, twice.clone(), status).await {
            assert_eq!(attempt["error_kind"], kind, "{attempt}");
            assert_eq!(attempt["remote_address"], url.strip_prefix("http://").unwrap(), "{attempt}");
        }
    }
    // one that waits for its retry counts, too
    let waits = json!({"max_retries": 1, "retry_base_ms": 3_600_000, "retry_cap_ms": 3_600_000});
    let config = service.api.register(&failing, waits).await;
    let queue_id = service.api.credit(config).await;
    eventually("the first attempt", async || {
        let delivery = service.api.get(&format!("/webhooks/{queue_id}")).await.json();
        (delivery["retry_count"] == 1).then_some(())
    })
    .await;

    let statistics = service.api.get("/webhooks/stats").await.json();
    assert_eq!(statistics["errors"], json!({"connect": 2, "http_status": 3, "reset": 1}));
    let metrics = service.api.get("/metrics").await.text;
    for kind in ["connect", "http_status", "reset"] {
        let series = format!("webhook_attempt_errors_total{{kind=\"{kind}\"}} ");
        let value = metrics.lines().find_map(|line| line.strip_prefix(&series)).unwrap();
        assert!(value.parse::<f64>().unwrap() >= 1.0, "{series}{value}");
    }
    service.stop().await;
}

#[tokio::test]
async fn an_attempt_that_a_setting_forbids_says_which() {
    let database = TestDatabase::new().await;
    let api = TestService::start_with(Role::Api, database.clone(), &[]).await;
    for (url, settings, kind) in [
        ("http://127.0.0.1:8", [("EGRESS_ALLOW", "10.0.0.0/8")], "address_not_allowed"),
        ("http://127.0.0.1:1", [("EGRESS_PORTS_ALLOW", "")], "port_not_allowed"),
        ("http://127.0.0.1:8", [("HTTPS_ONLY", "true")], "https_required"),
    ] {
        let config = api.api.register(url, json!({})).await;
        let queue_id = api.api.credit(config).await;
        let worker = TestService::start_with(Role::Worker, database.clone(), &settings).await;
        let probe = eventually(kind, async || {
            let delivery = api.api.get(&format!("/webhooks/{queue_id}")).await.json();
            delivery["attempts"].get(0).cloned()
        })
        .await;
        assert_eq!((&probe["error_kind"], &probe["probe"]), (&json!(kind), &json!(true)), "{probe}");
        assert_eq!(probe["remote_address"], Value::Null, "nothing was called: {probe}");
        worker.stop().await;
        api.api.delete(&format!("/api/webhooks/{config}")).await;
    }
    api.stop().await;
}
