//! The command line, as people and scripts use it.

use std::io::Write as _;
use std::process::{Output, Stdio};

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command, output};
use crate::support::receiver::{Reply, TestReceiver};

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn run(database: &TestDatabase, args: &[&str]) -> Output {
    output(command(database, args))
}

fn run_json(database: &TestDatabase, args: &[&str]) -> Value {
    let output = run(database, &[args, &["--json"]].concat());
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output)))
}

#[tokio::test(flavor = "multi_thread")]
async fn configs_events_and_replays_work_without_an_api() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::empty().await);
    let url = format!("{}/p", receiver.url);
    let migrated = run(&database, &["migrate"]);
    assert!(migrated.status.success(), "{}", text(&migrated));

    let config = run_json(
        &database,
        &[
            "configs",
            "register",
            "--name",
            "shop",
            "--postback-url",
            &url,
            "--header",
            "X-Key: k",
            "--max-retries",
            "0",
        ],
    );
    let id = config["id"].to_string();
    assert_eq!(run_json(&database, &["configs", "list"])[0]["name"], "shop");
    assert_eq!(run_json(&database, &["configs", "change", &id, "--priority", "1"])["priority"], 1);
    assert_eq!(run_json(&database, &["configs", "disable", &id])["enabled"], false);
    assert_eq!(run_json(&database, &["configs", "enable", &id])["enabled"], true);
    assert!(text(&run(&database, &["configs", "show", &id])).contains("shop"));

    let event =
        ["enqueue", "--type", "+credit", "--config-id", &id, "--event-id", "e1", "--param", "user_id=user 1"];
    let receipt = run_json(&database, &event);
    assert_eq!(receipt["webhook_url"], format!("{url}?user_id=user%201"));
    assert_eq!(run_json(&database, &event)["duplicate"], true);

    receiver.reply_with([Reply::status(500)]);
    let worker = Process::start(command(&database, &["serve"]));
    let queue_id = receipt["queue_id"].as_str().unwrap();
    worker.api().delivery_in(queue_id, "failed").await;
    assert!(text(&run(&database, &["show", queue_id])).contains("500"));
    let counted = run(&database, &["replay", "--failed", "--dry-run"]);
    let count = "1 dead letters match: 1 would be sent again, 0 were replayed before";
    assert!(text(&counted).contains(count), "{}", text(&counted));
    let replays = run_json(&database, &["replay", "--failed", "--config-id", &id]);
    assert_eq!(replays[0]["replay_of"], queue_id);
    worker.api().delivery_in(replays[0]["queue_id"].as_str().unwrap(), "completed").await;
    let stats = run_json(&database, &["stats", "--window", "1h"]);
    assert_eq!(
        (&stats["completed"], &stats["failed"], &stats["attempts"]),
        (&json!(1), &json!(1), &json!(2))
    );

    assert!(run(&database, &["configs", "delete", &id]).status.success());
    let refused = run(&database, &["enqueue", "--type", "+credit", "--config-id", &id]);
    assert!(!refused.status.success());
    assert!(text(&refused).contains(&format!("there is no config {id}")), "{}", text(&refused));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_events_is_accepted_line_by_line() {
    let database = TestDatabase::new().await;
    let id =
        run_json(&database, &["configs", "register", "--name", "x", "--postback-url", "https://x.example/"])
            ["id"]
            .to_string();
    let mut reading = command(&database, &["enqueue", "--file", "-"]);
    let mut child =
        reading.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for number in 0..3_000 {
        writeln!(
            stdin,
            "{{\"event_type\":\"+credit\",\"config_id\":{id},\"event_id\":\"{}\"}}",
            number % 2_999
        )
        .unwrap();
    }
    writeln!(stdin, "nonsense").unwrap();
    drop(stdin);

    let output = child.wait_with_output().unwrap();

    assert!(!output.status.success());
    assert!(text(&output).contains("2999 accepted, 1 accepted before, 1 refused"), "{}", text(&output));
    assert!(text(&output).contains("line 3001:"), "{}", text(&output));
    let stored: i64 = database.scalar("select count(*) from webhook_queue").await;
    assert_eq!(stored, 2_999);
}

#[test]
fn a_file_of_events_takes_nothing_that_would_be_ignored() {
    for option in ["--event-id", "--param", "--priority", "--scheduled-at", "--correlation-id"] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_webhook-processor"));
        command.args(["enqueue", "--file", "events.ndjson", option, "1"]);
        let output = output(command);
        assert_eq!(output.status.code(), Some(2), "{option}: {}", text(&output));
        assert!(text(&output).contains("cannot be used with"), "{option}: {}", text(&output));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_command_lets_through_is_attempted_without_waiting_for_a_poll() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::new().await);
    let id = register(&database, "shop", &receiver.url);
    let mut serve = command(&database, &["serve"]);
    serve.env("WORKER_POLL_INTERVAL", "1h");
    let service = Process::start(serve);
    let api = service.api();
    assert_eq!(run_json(&database, &["configs", "disable", &id])["enabled"], false);
    let event = json!({"event_type": "+credit", "config_id": id.parse::<i64>().unwrap(), "event_id": "e1"});
    let accepted = api.post("/webhooks", event).await.json();
    let queue_id = accepted["queue_id"].as_str().unwrap();
    assert_eq!(run_json(&database, &["configs", "enable", &id])["enabled"], true);
    api.delivery_in(queue_id, "completed").await;

    let replays = run_json(&database, &["replay", queue_id]);

    api.delivery_in(replays[0]["queue_id"].as_str().unwrap(), "completed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_waiting_deliveries_whose_config_has_another_url_are_sent_to_it() {
    let database = TestDatabase::new().await;
    let id = register(&database, "shop", "https://old.example/");
    let enqueue = |event: &str| {
        run_json(&database, &["enqueue", "--type", "+credit", "--config", "shop", "--event-id", event]);
    };
    enqueue("before");
    run_json(&database, &["configs", "change", &id, "--postback-url", "https://new.example/"]);
    enqueue("after");
    let replay = ["replay", "--waiting", "--current-url", "--config", "shop"];

    let counted = text(&run(&database, &[&replay[..], &["--dry-run"]].concat()));
    let replayed = run(&database, &replay);

    assert!(counted.contains("1 waiting deliveries match: 1 would be sent again"), "{counted}");
    assert!(replayed.status.success(), "{}", text(&replayed));
    assert!(text(&replayed).contains("1 sent, 0 sent before, 0 refused"), "{}", text(&replayed));
    let waiting =
        "select count(*) from webhook_queue where webhook_url like 'https://new.%' and status = 'pending'";
    assert_eq!(database.scalar::<i64>(waiting).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_told_in_one_line_that_names_them() {
    let database = TestDatabase::new().await;
    for (name, value) in [("WORKER_COUNT", "none"), ("WORKER_LOCK_DURATION", "10s"), ("WORKER_KOUNT", "1")] {
        let mut wrong = command(&database, &["serve"]);
        wrong.env(name, value);
        let output = output(wrong);
        assert_eq!(output.status.code(), Some(1));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(
            error.starts_with(&format!("webhook-processor: {name}: "))
                && error.trim_end().lines().count() == 1,
            "{error}"
        );
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut second = command(&database, &["serve"]);
    second.env("LISTEN_ADDR", taken.local_addr().unwrap().to_string());
    let output = output(second);
    assert!(text(&output).contains("LISTEN_ADDR: cannot listen on"), "{}", text(&output));
    assert!(text(&run(&database, &["show", "x"])).contains("queue_id: must be a UUID"));
    let url = "https://x.example/";
    let slow = ["configs", "register", "--name", "x", "--postback-url", url, "--timeout-ms", "60000"];
    let refused = text(&run(&database, &slow));
    assert!(refused.contains("timeout_ms: must be at most 30000, since HTTP_TIMEOUT is 30s"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receiver_answers_counts_and_prints() {
    let database = TestDatabase::empty().await;
    let mut receiver = command(&database, &["receiver", "--port", "0", "--status", "418"]);
    let mut child = receiver.stdout(Stdio::piped()).spawn().unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    let url = line.trim().strip_prefix("listening on ").unwrap().to_owned();

    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    assert_eq!(client.get(format!("{url}/postback?a=1")).send().await.unwrap().status().as_u16(), 418);
    std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(child.wait().unwrap().success());

    let mut rest = String::new();
    std::io::Read::read_to_string(&mut out, &mut rest).unwrap();
    assert!(rest.contains("GET /postback?a=1"), "{rest}");
    assert!(rest.contains("1 requests, of which 1 were answered with a failure"), "{rest}");
}

/// A config under this name, whose deliveries fail at once, and its id.
fn register(database: &TestDatabase, name: &str, url: &str) -> String {
    let register = [
        "configs",
        "register",
        "--name",
        name,
        "--postback-url",
        url,
        "--chargeback-url",
        url,
        "--max-retries",
        "0",
    ];
    run_json(database, &register)["id"].to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_replayed_many_at_once_once_and_with_totals() {
    let (receiver, database) = (TestReceiver::start().await, TestDatabase::new().await);
    let id = register(&database, "shop", &receiver.url);
    receiver.reply_always(Reply::status(500));
    run_json(&database, &["configs", "change", &id, "--circuit-failure-rate", "none"]);
    let worker = Process::start(command(&database, &["serve"]));
    let mut events: Vec<Value> = (0..30)
        .map(|number| json!({"event_type": "+credit", "config_id": id.parse::<i64>().unwrap(), "event_id": number.to_string()}))
        .collect();
    events[7]["event_type"] = "-debit".into();
    assert_eq!(worker.api().post("/webhooks/batch", json!(events)).await.status, 200);
    eventually("30 dead letters", async || {
        let failed: i64 = database.scalar("select count(*) from webhook_queue where status = 'failed'").await;
        (failed == 30).then_some(())
    })
    .await;
    worker.signal("TERM");
    assert_eq!(worker.wait(), Some(0));

    let say = |args: &[&str]| {
        let output = run(&database, &[&["replay", "--failed"], args].concat());
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    };
    assert!(say(&["--event-type", "-debit", "--dry-run"]).contains("1 dead letters match: 1 would be sent"));
    assert!(say(&["--to", "2020-01-01T00:00:00Z", "--dry-run"]).contains("0 dead letters match"));
    let first = say(&["--limit", "2", "--config", "shop"]);
    assert!(first.contains("2 sent, 0 sent before, 0 refused") && first.contains("replay_of"), "{first}");
    let counted = say(&["--dry-run"]);
    assert!(
        counted.contains("30 dead letters match: 28 would be sent again, 2 were replayed before"),
        "{counted}"
    );
    assert_eq!(say(&[]).trim(), "28 sent, 2 sent before, 0 refused");
    assert_eq!(say(&[]).trim(), "0 sent, 30 sent before, 0 refused");
    let all = run_json(&database, &["replay", "--failed"]);
    assert_eq!(all.as_array().unwrap().len(), 30);
    let replays: i64 =
        database.scalar("select count(*) from webhook_queue where replay_of is not null").await;
    assert_eq!(replays, 30);

    let mistaken = run(&database, &["replay", "--failed", "--from", "10:00"]);
    assert!(!mistaken.status.success());
    assert!(
        text(&mistaken).contains("from: must be a time of RFC 3339, such as 2026-01-31T12:00:00Z"),
        "{}",
        text(&mistaken)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_is_named_by_its_id_or_by_its_name_if_that_is_its_own() {
    let database = TestDatabase::new().await;
    let url = "https://x.example/";
    let (shop, twin, other_twin) = (
        register(&database, "shop", url),
        register(&database, "twin", url),
        register(&database, "twin", url),
    );

    assert_eq!(run_json(&database, &["configs", "show", "shop"])["id"].to_string(), shop);
    assert_eq!(run_json(&database, &["configs", "disable", "shop"])["enabled"], false);
    let event = ["enqueue", "--type", "+credit", "--config", "shop"];
    assert_eq!(run_json(&database, &event)["config_id"].to_string(), shop);
    assert_eq!(run_json(&database, &["stats", "--config", "shop"])["pending"], 1);
    for (args, words) in [
        (
            ["configs", "show", "twin"],
            format!("2 configs are named \"twin\": give an id instead, {twin} or {other_twin}"),
        ),
        (["configs", "show", "nobody"], "there is no config named \"nobody\"".to_owned()),
        (["stats", "--config", "4711"], "there is no config 4711".to_owned()),
    ] {
        let refused = run(&database, &args);
        assert!(!refused.status.success());
        assert!(text(&refused).contains(&words), "{}", text(&refused));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn show_keeps_the_digits_of_an_amount() {
    let database = TestDatabase::new().await;
    let id = register(&database, "shop", "https://x.example/");
    let mut reading = command(&database, &["enqueue", "--file", "-"]);
    let mut child = reading.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let event = format!(
        r#"{{"event_type":"+credit","config_id":{id},"url_params":{{"value":100.10,"sum":12345678901234567890.10}}}}"#
    );
    writeln!(child.stdin.take().unwrap(), "{event}").unwrap();
    assert!(child.wait().unwrap().success());

    let queue_id: String = database.scalar("select queue_id::text from webhook_queue").await;
    let shown = text(&run(&database, &["show", &queue_id]));

    assert!(shown.contains(r#"{"value":100.10,"sum":12345678901234567890.10}"#), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn help_gives_the_defaults_of_a_new_config() {
    let database = TestDatabase::empty().await;
    let help_of = |args: &[&str]| {
        let help = text(&run(&database, &[args, &["--help"]].concat()));
        help.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let help = help_of(&["configs", "register"]);
    for default in ["30000", "6", "1000", "300000", "0.25", "2", "none", "0.8", "60000", "20", "5000"] {
        assert!(help.contains(&format!("[new config: {default}]")), "{default} is missing in {help}");
    }
    let help = help_of(&["enqueue"]);
    assert!(help.contains("a second payment"), "{help}");
}
