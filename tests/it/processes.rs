//! Whole processes: several at once, killed in mid-delivery, asked to stop.

use std::collections::HashMap;
use std::time::Duration;

use reqwest::Method;
use serde_json::json;

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command, output};
use crate::support::receiver::{Reply, TestReceiver};

/// Enqueues `count` events by one stream of lines.
async fn enqueue_many(process: &Process, config: i64, count: usize) {
    let api = process.api();
    let event = |n| json!({"event_type": "+credit", "config_id": config, "event_id": format!("{n}"), "url_params": {"n": n}});
    let lines = (0..count).map(|n| event(n).to_string()).collect::<Vec<_>>().join("\n");
    let request = api
        .request(Method::POST, "/webhooks/batch")
        .header("content-type", "application/x-ndjson")
        .body(lines);
    let answer = api.send(request).await;
    assert_eq!((answer.status, answer.text.matches("queue_id").count()), (200, count));
}

#[tokio::test(flavor = "multi_thread")]
async fn three_processes_deliver_ten_thousand_events_exactly_once_each() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::new().await);
    let processes = [(); 3].map(|()| Process::start(command(&database, &["serve"])));
    let config = processes[0].api().register(&receiver.url, json!({})).await;

    enqueue_many(&processes[0], config, 10_000).await;
    eventually("all are delivered", async || {
        let completed: i64 =
            database.scalar("select count(*) from webhook_queue where status = 'completed'").await;
        (completed == 10_000).then_some(())
    })
    .await;

    let mut arrivals: HashMap<String, usize> = HashMap::new();
    for arrival in receiver.arrivals() {
        *arrivals.entry(arrival.uri).or_default() += 1;
    }
    assert_eq!(arrivals.len(), 10_000);
    assert!(arrivals.values().all(|&times| times == 1));
    let retried: i64 = database.scalar("select count(*) from webhook_queue where retry_count > 0").await;
    assert_eq!(retried, 0);
    for process in processes {
        process.signal("TERM");
        assert_eq!(process.wait(), Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_process_held_is_attempted_again_and_nothing_else_is_disturbed() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::new().await);
    receiver.reply_always(Reply::status(200).after(Duration::from_hours(1)));
    let quick = |args: &[&str]| {
        let mut quick = command(&database, args);
        quick
            .env("HTTP_TIMEOUT", "1s")
            .env("WORKER_LOCK_DURATION", "16s")
            .env("WORKER_POLL_INTERVAL", "100ms");
        quick
    };
    let api = Process::start(quick(&["api"]));
    let doomed = Process::start(quick(&["serve"]));
    let config = api.api().register(&receiver.url, json!({"max_retries": 3})).await;
    let held = doomed.api().credit(config).await;
    eventually("the request arrives", async || (receiver.count() == 1).then_some(())).await;

    doomed.signal("KILL");
    assert_eq!(doomed.wait(), None);
    receiver.reply_always(Reply::status(200));
    let survivor = Process::start(quick(&["worker"]));
    let other = api.api().credit(config).await;
    let undisturbed = api.api().delivery_in(&other, "completed").await;
    // the test does not wait for the lease as a user would
    database.execute("update webhook_queue_open set lock_expires_at = clock_timestamp()").await;
    let delivery = api.api().delivery_in(&held, "completed").await;

    assert_eq!(undisturbed["attempts"].as_array().unwrap().len(), 1);
    let attempts = delivery["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 2);
    assert_eq!(attempts[0]["error"], "lease expired, outcome unknown");
    assert_eq!(attempts[1]["http_status"], 200);
    assert_eq!(receiver.count(), 3);
    for process in [survivor, api] {
        process.signal("TERM");
        assert_eq!(process.wait(), Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn asked_to_stop_a_process_lets_attempts_end_and_settles_them() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::new().await);
    receiver.reply_always(Reply::status(200).after(Duration::from_millis(500)));
    let process = Process::start(command(&database, &["serve"]));
    let config = process.api().register(&receiver.url, json!({})).await;
    enqueue_many(&process, config, 20).await;
    eventually("requests are under way", async || (receiver.count() > 0).then_some(())).await;

    process.signal("TERM");

    process.wait_for_log("stopped");
    assert_eq!(process.wait(), Some(0));
    let unsettled: i64 =
        database.scalar("select count(*) from webhook_queue where status = 'processing'").await;
    let completed: i64 =
        database.scalar("select count(*) from webhook_queue where status = 'completed'").await;
    assert_eq!((unsettled, usize::try_from(completed).unwrap()), (0, receiver.count()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_a_process_at_once() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::new().await);
    receiver.reply_always(Reply::status(200).after(Duration::from_hours(1)));
    let process = Process::start(command(&database, &["serve"]));
    let config = process.api().register(&receiver.url, json!({})).await;
    process.api().credit(config).await;
    eventually("the request is under way", async || (receiver.count() == 1).then_some(())).await;

    process.signal("INT");
    process.wait_for_log("stopping");
    // signals that come together count as one
    while !process.log().contains("stopped at once") {
        process.signal("INT");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    assert_eq!(process.wait(), Some(130));
    let held: i64 = database.scalar("select count(*) from webhook_queue where status = 'processing'").await;
    assert_eq!(held, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_wakes_a_worker_of_another_process_without_polling() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::new().await);
    let rarely = |role: &str| {
        let mut rarely = command(&database, &[role]);
        rarely.env("WORKER_POLL_INTERVAL", "1h").env("LOG_LEVEL", "info,webhook_processor=debug");
        rarely
    };
    let worker = Process::start(rarely("worker"));
    let api = Process::start(rarely("api"));
    let config = api.api().register(&receiver.url, json!({})).await;

    for number in 1..=20 {
        let queue_id = api.api().credit(config).await;
        api.api().delivery_in(&queue_id, "completed").await;
        assert_eq!(receiver.count(), number);
    }
    // so does the command line
    let enqueued = output(command(
        &database,
        &["enqueue", "--type", "-debit", "--config-id", &config.to_string(), "--json"],
    ));
    assert!(enqueued.status.success(), "{}", String::from_utf8_lossy(&enqueued.stderr));
    eventually("it arrives", async || (receiver.count() == 21).then_some(())).await;
    for process in [worker, api] {
        process.signal("TERM");
        assert_eq!(process.wait(), Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_tell_ids_and_never_payloads_or_queries() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::new().await);
    receiver.reply_with([Reply::status(500).body("body-s3cret")]);
    let mut verbose = command(&database, &["serve"]);
    verbose.env("LOG_LEVEL", "trace,hyper=debug").env("LOG_FORMAT", "logfmt");
    let process = Process::start(verbose);
    let api = process.api();
    let more = json!({"headers": {"x-key": "header-s3cret"}, "retry_base_ms": 1, "retry_cap_ms": 1,
                      "postback_url": format!("{}/p?static=query-s3cret", receiver.url)});
    let config = api.register(&receiver.url, more).await;
    let event =
        json!({"event_type": "+credit", "config_id": config, "url_params": {"token": "param-s3cret"}});
    let queue_id = api.post("/webhooks", event).await.json()["queue_id"].as_str().unwrap().to_owned();
    api.delivery_in(&queue_id, "completed").await;
    assert_eq!(api.get("/webhooks?event_id=lookup-s3cret").await.status, 200);

    process.signal("TERM");
    process.wait_for_log("message=stopped");

    let log = process.log();
    assert!(log.contains(&format!("queue_id={queue_id}")), "{log}");
    assert!(
        !log.contains("s3cret"),
        "{}",
        log.lines().filter(|line| line.contains("s3cret")).collect::<Vec<_>>().join("\n")
    );
}
