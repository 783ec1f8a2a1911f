//! Events in: what is accepted, and what is refused with the field's name.

use chrono::{DateTime, Utc};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use webhook_processor::infrastructure::service::Role;

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command};
use crate::support::service::{ApiClient, TestService};

/// An API without workers: what it accepts stays as it is.
async fn api_only() -> TestService {
    TestService::start_with(Role::Api, TestDatabase::new().await, &[]).await
}

#[tokio::test]
async fn an_accepted_event_is_committed_with_its_complete_url() {
    let service = api_only().await;
    let config = service
        .api
        .register("http://127.0.0.1:1", json!({"postback_url": "http://127.0.0.1:1/p?k=v#f"}))
        .await;

    let body = format!(
        r#"{{"event_type":"+credit","config_id":{config},"event_id":"txn-1","correlation_id":"order-7",
            "url_params":{{"z":100.10,"a":"x y&é","big":12345678901234567890123,"no":null,"yes":true}}}}"#
    );
    let request =
        service.api.request(Method::POST, "/webhooks").header("content-type", "application/json").body(body);
    let answer = service.api.send(request).await;

    assert_eq!(answer.status, 201, "{}", answer.text);
    let receipt = answer.json();
    assert_eq!(receipt["status"], "pending");
    assert_eq!(receipt["duplicate"], false);
    let url = "http://127.0.0.1:1/p?k=v&z=100.10&a=x%20y%26%C3%A9&big=12345678901234567890123&yes=true#f";
    assert_eq!(receipt["webhook_url"], url);
    let stored: String = service.database.scalar("select webhook_url from webhook_queue_open").await;
    assert_eq!(stored, url);
    let params: String = service.database.scalar("select url_params::text from webhook_queue_open").await;
    assert_eq!(params, r#"{"z":100.10,"a":"x y&é","big":12345678901234567890123,"no":null,"yes":true}"#);
    service.stop().await;
}

#[tokio::test]
async fn the_same_event_makes_one_delivery_however_often_and_however_concurrently_it_is_sent() {
    let service = api_only().await;
    let config = service.api.register("http://127.0.0.1:1", json!({})).await;
    let event = json!({"event_type": "+credit", "config_id": config, "event_id": "e1"});

    let answers =
        futures_util::future::join_all((0..20).map(|_| service.api.post("/webhooks", event.clone()))).await;

    let created = answers.iter().filter(|answer| answer.status == 201).count();
    let ids: std::collections::HashSet<_> =
        answers.iter().map(|answer| answer.json()["queue_id"].to_string()).collect();
    assert_eq!((created, ids.len()), (1, 1));
    assert!(answers.iter().all(|answer| answer.status == 201 || answer.json()["duplicate"] == true));
    // another type or another config is another event
    let debit = json!({"event_type": "-debit", "config_id": config, "event_id": "e1"});
    assert_eq!(service.api.post("/webhooks", debit).await.status, 201);
    let deliveries: i64 = service.database.scalar("select count(*) from webhook_queue").await;
    assert_eq!(deliveries, 2);
    service.stop().await;
}

#[tokio::test]
async fn bad_input_is_refused_with_the_name_of_the_field() {
    let service = api_only().await;
    let config = service.api.register("http://127.0.0.1:1", json!({"chargeback_url": null})).await;
    let event = |more: Value| {
        let mut event = json!({"event_type": "+credit", "config_id": config});
        event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        event
    };
    let long = "x".repeat(256);
    for (body, status, fields) in [
        (json!({}), 422, vec!["body"]),
        (json!([1]), 422, vec!["body"]),
        (event(json!({"event_type": "credit"})), 422, vec!["event_type"]),
        (event(json!({"event_type": 1})), 422, vec!["event_type"]),
        (event(json!({"event_type": "-debit"})), 422, vec!["event_type"]),
        (event(json!({"config_id": "one"})), 422, vec!["config_id"]),
        (event(json!({"config_id": -1})), 422, vec!["config_id"]),
        (event(json!({"config_id": 4711})), 422, vec!["config_id"]),
        (event(json!({"config_id": 1.5})), 422, vec!["config_id"]),
        (
            event(json!({"event_id": long, "correlation_id": "a\u{0}b"})),
            422,
            vec!["event_id", "correlation_id"],
        ),
        (event(json!({"event_id": ""})), 422, vec!["event_id"]),
        (event(json!({"priority": 4})), 422, vec!["priority"]),
        (event(json!({"scheduled_at": "tomorrow"})), 422, vec!["scheduled_at"]),
        (event(json!({"scheduled_at": "+262000-01-01T00:00:00Z"})), 422, vec!["scheduled_at"]),
        (event(json!({"scheduled_at": "2999-01-01T00:00:00Z"})), 422, vec!["scheduled_at"]),
        (event(json!({"scheduled_at": "-262000-01-01T00:00:00Z"})), 422, vec!["scheduled_at"]),
        (
            event(json!({"url_params": {"a": [1], "b": {"c": 1}, "d": "\u{0}"}})),
            422,
            vec!["url_params.a", "url_params.b", "url_params.d"],
        ),
        (event(json!({"url_params": [1]})), 422, vec!["url_params"]),
        (event(json!({"url_params": {"a": "x".repeat(9000)}})), 422, vec!["url_params"]),
        (event(json!({"colour": "red"})), 422, vec!["colour"]),
    ] {
        let answer = service.api.post("/webhooks", body.clone()).await;
        assert_eq!(
            (answer.status, answer.fields()),
            (status, fields.iter().map(ToString::to_string).collect()),
            "{body}: {}",
            answer.text
        );
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        assert!(answer.headers.contains_key("x-request-id"));
    }
    let stored: i64 = service.database.scalar("select count(*) from webhook_queue").await;
    assert_eq!(stored, 0);
    service.stop().await;
}

#[tokio::test]
async fn what_is_not_json_or_too_large_or_of_another_type_is_refused() {
    let service = api_only().await;
    let post = |content_type: &'static str, body: Vec<u8>| {
        service.api.send(
            service.api.request(Method::POST, "/webhooks").header("content-type", content_type).body(body),
        )
    };
    assert_eq!(post("application/json", b"{".to_vec()).await.status, 400);
    assert_eq!(post("application/json", b"{} {}".to_vec()).await.status, 422);
    assert_eq!(post("application/json", vec![0xff, 0xfe]).await.status, 400);
    assert_eq!(post("application/json", vec![b' '; 70_000]).await.status, 413);
    assert_eq!(post("text/plain", b"{}".to_vec()).await.status, 415);
    assert_eq!(service.api.get("/nowhere").await.status, 404);
    assert_eq!(service.api.delete("/webhooks").await.status, 405);
    assert_eq!(service.api.get("/webhooks/not-a-uuid").await.status, 404);
    let unknown = service.api.get("/webhooks?colour=red").await;
    assert_eq!(unknown.fields(), ["colour"]);
    assert!(
        unknown.json()["detail"].as_str().unwrap().starts_with("colour: unknown field"),
        "{}",
        unknown.text
    );
    let not_a_number = service.api.get("/webhooks?limit=many").await;
    assert_eq!(not_a_number.json()["detail"], "limit: must be a whole number");
    // a plus that was not encoded has become a space on the way
    assert_eq!(service.api.get("/webhooks?from=2026-01-31T12:00:00+01:00").await.status, 200);
    assert_eq!(service.api.get("/webhooks?from=2026-01-31T12:00:00%2B01:00").await.status, 200);
    assert_eq!(service.api.get("/webhooks?status=done&limit=0").await.fields(), ["limit", "status"]);
    assert_eq!(service.api.get("/webhooks?from=yesterday").await.fields(), ["from"]);
    assert_eq!(service.api.get("/webhooks?to=-5000-01-01T00:00:00Z").await.fields(), ["to"]);
    assert_eq!(service.api.get("/webhooks?event_id=%00").await.status, 422);
    service.stop().await;
}

#[tokio::test]
async fn an_array_answers_for_each_event_and_one_bad_item_spoils_no_other() {
    let service = api_only().await;
    let config = service.api.register("http://127.0.0.1:1", json!({})).await;
    let good = json!({"event_type": "+credit", "config_id": config});
    let same = json!({"event_type": "+credit", "config_id": config, "event_id": "same"});

    let batch = json!([good, {"event_type": "?"}, same, same, {"event_type": "+credit", "config_id": 99}, 7]);
    let answer = service.api.post("/webhooks/batch", batch).await;

    assert_eq!(answer.status, 200, "{}", answer.text);
    let results = answer.json()["results"].as_array().unwrap().clone();
    assert_eq!(results.iter().map(|r| r["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    assert!(results[0]["queue_id"].is_string());
    assert_eq!(results[1]["error"]["status"], 422);
    assert_eq!(results[2]["queue_id"], results[3]["queue_id"]);
    assert_ne!(results[2]["duplicate"], results[3]["duplicate"]);
    assert_eq!(results[4]["error"]["errors"][0]["field"], "config_id");
    assert_eq!(results[5]["error"]["status"], 422);
    let stored: i64 = service.database.scalar("select count(*) from webhook_queue").await;
    assert_eq!(stored, 2);

    let too_many = vec![json!({}); 1001];
    assert_eq!(service.api.post("/webhooks/batch", json!(too_many)).await.status, 413);
    assert_eq!(service.api.post("/webhooks/batch", json!({})).await.status, 422);
    assert_eq!(service.api.post("/webhooks/batch", json!([])).await.json(), json!({"results": []}));
    service.stop().await;
}

#[tokio::test]
async fn a_stream_of_lines_may_have_any_length_and_holes() {
    let service = api_only().await;
    let config = service.api.register("http://127.0.0.1:1", json!({})).await;
    let count = 12_000;
    let mut lines = String::from("\n");
    for number in 0..count {
        match number {
            10 => lines.push_str("not json"),
            11 => lines.push_str(&"x".repeat(70_000)),
            _ => lines.push_str(
                &json!({"event_type": "+credit", "config_id": config, "event_id": number.to_string()})
                    .to_string(),
            ),
        }
        lines.push_str("\r\n");
    }
    lines.truncate(lines.len() - "\r\n".len());

    let request =
        service.api.request(Method::POST, "/webhooks/batch").header("content-type", "application/x-ndjson");
    let answer = service.api.send(request.body(lines)).await;

    assert_eq!(answer.status, 200);
    let answer = answer.json();
    let results = answer["results"].as_array().unwrap();
    assert_eq!(results.len(), count);
    assert_eq!(results[10]["error"]["status"], 400);
    assert_eq!(results[11]["error"]["status"], 413);
    assert!(results.iter().enumerate().all(|(i, result)| result["index"] == i));
    let ids: std::collections::HashSet<_> =
        results.iter().filter_map(|result| result["queue_id"].as_str()).collect();
    assert_eq!(ids.len(), count - 2);
    let stored: i64 = service.database.scalar("select count(*) from webhook_queue").await;
    assert_eq!(usize::try_from(stored).unwrap(), count - 2);
    service.stop().await;
}

#[tokio::test]
async fn an_event_for_later_waits_and_its_priority_is_kept() {
    let service = api_only().await;
    let config = service.api.register("http://127.0.0.1:1", json!({"priority": 3, "max_retries": 1})).await;
    let at: DateTime<Utc> = Utc::now() + chrono::TimeDelta::hours(1);

    let event = json!({"event_type": "-debit", "config_id": config, "priority": 0, "scheduled_at": at});
    let receipt = service.api.post("/webhooks", event).await.json();

    let delivery =
        service.api.get(&format!("/webhooks/{}", receipt["queue_id"].as_str().unwrap())).await.json();
    let due: DateTime<Utc> = delivery["next_retry_at"].as_str().unwrap().parse().unwrap();
    assert_eq!(due.timestamp_millis(), at.timestamp_millis());
    assert_eq!((&delivery["priority"], &delivery["max_retries"]), (&json!(0), &json!(1)));
    let waits: bool = service.database.scalar("select ready_since is null from webhook_queue_open").await;
    assert!(waits);
    let other = service.api.credit(config).await;
    assert_eq!(service.api.get(&format!("/webhooks/{other}")).await.json()["priority"], 3);
    service.stop().await;
}

#[tokio::test]
async fn a_change_of_a_config_in_another_process_is_seen_by_the_next_enqueue() {
    let first = api_only().await;
    let second = TestService::start_with(Role::Api, first.database.clone(), &[]).await;
    let config = first.api.register("http://127.0.0.1:1", json!({"chargeback_url": null})).await;
    let credit = json!({"event_type": "+credit", "config_id": config});
    let debit = json!({"event_type": "-debit", "config_id": config});
    assert_eq!(second.api.post("/webhooks", credit.clone()).await.status, 201);
    assert_eq!(second.api.post("/webhooks", debit.clone()).await.status, 422);

    let change =
        json!({"postback_url": "http://127.0.0.1:2/new", "chargeback_url": "http://127.0.0.1:2/back"});
    assert_eq!(first.api.patch(&format!("/api/webhooks/{config}"), change).await.status, 200);

    assert_eq!(
        second.api.post("/webhooks", credit.clone()).await.json()["webhook_url"],
        "http://127.0.0.1:2/new"
    );
    assert_eq!(second.api.post("/webhooks", debit).await.json()["webhook_url"], "http://127.0.0.1:2/back");
    assert_eq!(first.api.delete(&format!("/api/webhooks/{config}")).await.status, 204);
    assert_eq!(second.api.post("/webhooks", credit).await.fields(), ["config_id"]);
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn a_request_id_is_taken_over_if_it_is_plain() {
    let service = api_only().await;
    let ask = |id: &'static str| {
        let request = service.api.request(Method::GET, "/health/live").header("x-request-id", id);
        async { service.api.send(request).await.headers["x-request-id"].to_str().unwrap().to_owned() }
    };
    assert_eq!(ask("abc-123").await, "abc-123");
    assert_ne!(ask("has spaces").await, "has spaces");
    service.stop().await;
}

/// Sends a request as it is written, and answers what comes back until the server closes the connection.
async fn exchange(service: &ApiClient, request: &str) -> String {
    let mut stream = TcpStream::connect(service.base.trim_start_matches("http://")).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_answered_with_what_was_committed_before() {
    let service = api_only().await;
    let config = service.api.register("http://127.0.0.1:1", json!({})).await;
    let line = |id: &str| {
        let event = json!({"event_type": "+credit", "config_id": config, "event_id": id}).to_string() + "\n";
        format!("{:x}\r\n{event}\r\n", event.len())
    };
    let head = "POST /webhooks/batch HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\n\
                connection: close\r\ntransfer-encoding: chunked\r\n\r\n";

    // what follows is no chunk
    let answer = exchange(&service.api, &format!("{head}{}{}nonsense\r\n", line("e1"), line("e2"))).await;

    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    assert!(head.contains("application/problem+json"), "{head}");
    let body = &body[body.find('{').unwrap()..=body.rfind('}').unwrap()];
    let problem: Value = serde_json::from_str(body).unwrap();
    assert_eq!(problem["detail"], "the body broke off");
    let results = problem["results"].as_array().unwrap();
    assert_eq!(results.len(), 2, "{problem}");
    assert!(results.iter().all(|result| result["queue_id"].is_string()), "{problem}");
    let stored: i64 = service.database.scalar("select count(*) from webhook_queue").await;
    assert_eq!(stored, 2);
    service.stop().await;
}

#[tokio::test]
async fn arrays_that_would_take_too_much_memory_together_are_refused_until_there_is_room() {
    // in a process of its own: its memory is what is bounded
    let process = Process::start(command(&TestDatabase::new().await, &["api"]));
    let api = process.api();
    let address = api.base.trim_start_matches("http://").to_owned();
    let mut holders = Vec::new();
    for _ in 0..8 {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        let head = format!(
            "POST /webhooks/batch HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n[",
            8 * 1024 * 1024 - 1
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        holders.push(stream);
    }
    let refused = eventually("a refusal", async || {
        let answer = api.post("/webhooks/batch", json!([])).await;
        (answer.status == 503).then_some(answer)
    })
    .await;
    assert!(refused.headers.contains_key("retry-after"));
    assert!(refused.text.contains("too many arrays are being read"), "{}", refused.text);
    // lines are read one by one and need no such room
    let lines = api.request(Method::POST, "/webhooks/batch").header("content-type", "application/x-ndjson");
    assert_eq!(api.send(lines.body("\n")).await.status, 200);

    drop(holders);
    assert_eq!(api.post("/webhooks/batch", json!([])).await.status, 200);
    let too_large = "POST /webhooks/batch HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
                     content-length: 8388609\r\n\r\n";
    assert!(exchange(&api, too_large).await.starts_with("HTTP/1.1 413"));
}
