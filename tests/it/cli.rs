//! The command line, as people and scripts use it.

use std::io::Write as _;
use std::process::{Output, Stdio};

use serde_json::{Value, json};

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
    assert!(text(&counted).contains("1 dead letters match"), "{}", text(&counted));
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
