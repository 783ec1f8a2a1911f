//! PostgreSQL goes away and comes back: nobody hangs, nothing accepted is lost, all goes on by itself.

use std::time::{Duration, Instant};

use serde_json::json;
use sqlx::ConnectOptions as _;
use webhook_processor::infrastructure::embedded_postgres::{EmbeddedOptions, EmbeddedPostgres};

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command};
use crate::support::receiver::{Reply, TestReceiver};

/// A server of this test's own, which it may stop.
fn own_server() -> EmbeddedOptions {
    let directory = std::env::temp_dir().join(format!("webhook-processor-outage-{}", std::process::id()));
    EmbeddedOptions { directory, durable: false, binaries: None }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_postgres_is_away_requests_get_503_and_afterwards_everything_goes_on() {
    let options = own_server();
    let server = EmbeddedPostgres::start(&options).await.unwrap();
    let url = server.connect_options().to_url_lossy().to_string();
    let receiver = TestReceiver::start().await;
    let mut serve = command(&TestDatabase::new().await, &["serve"]);
    serve.env("DATABASE_URL", &url).env("WORKER_POLL_INTERVAL", "500ms");
    let process = Process::start(serve);
    let api = process.api();
    let config = api.register(&receiver.url, json!({})).await;
    // one attempt is under way when the server stops, and ends while it is away
    receiver.reply_with([Reply::status(200).after(Duration::from_secs(1))]);
    let under_way = api.credit(config).await;
    eventually("the request arrives", async || (receiver.count() == 1).then_some(())).await;
    let waiting = json!({"event_type": "+credit", "config_id": config, "scheduled_at": chrono::Utc::now() + chrono::TimeDelta::seconds(3)});
    let waiting = api.post("/webhooks", waiting).await.json()["queue_id"].as_str().unwrap().to_owned();

    server.stop().await.unwrap();

    let event = json!({"event_type": "+credit", "config_id": config, "event_id": "during"});
    for (method, path) in
        [("POST", "/webhooks"), ("GET", "/webhooks/stats"), ("GET", "/api/webhooks"), ("GET", "/webhooks")]
    {
        let begun = Instant::now();
        let answer = if method == "POST" { api.post(path, event.clone()).await } else { api.get(path).await };
        assert_eq!(answer.status, 503, "{path}: {}", answer.text);
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        assert!(answer.headers.contains_key("retry-after"));
        // the promise is 2 s; the margin is for a busy machine
        assert!(begun.elapsed() < Duration::from_secs(10), "{path} took {:?}", begun.elapsed());
    }
    assert_eq!(api.get("/health/live").await.status, 200);
    assert_eq!(api.get("/health/ready").await.status, 503);

    let server = EmbeddedPostgres::start(&options).await.unwrap();
    eventually("the service is ready again", async || {
        (api.get("/health/ready").await.status == 200).then_some(())
    })
    .await;
    assert_eq!(api.post("/webhooks", event).await.status, 201);
    let settled = api.delivery_in(&under_way, "completed").await;
    assert_eq!(settled["attempts"].as_array().unwrap().len(), 1);
    api.delivery_in(&waiting, "completed").await;
    eventually("the new event arrives", async || (receiver.count() == 3).then_some(())).await;

    process.signal("TERM");
    assert_eq!(process.wait(), Some(0));
    server.stop().await.unwrap();
    let _ = std::fs::remove_dir_all(&options.directory);
}
