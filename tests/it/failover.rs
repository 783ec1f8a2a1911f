//! Several hosts in `DATABASE_URL`: the program follows the primary, and a failover to a synchronous standby loses nothing.

use std::collections::HashMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::time::sleep;

use crate::support::cluster::Cluster;
use crate::support::postgres::TestDatabase;
use crate::support::process::{Process, command, output};
use crate::support::receiver::TestReceiver;
use crate::support::service::ApiClient;
use crate::support::{PATIENCE, eventually};

/// The value of `DATABASE_URL` for a list of hosts.
fn url(hosts: &str) -> String {
    format!("postgres://postgres:s3cret@{hosts}/postgres?sslmode=disable&target_session_attrs=read-write")
}

async fn serve(database_url: &str) -> Command {
    let mut serve = command(&TestDatabase::new().await, &["serve"]);
    serve.env("DATABASE_URL", database_url).env("WORKER_POLL_INTERVAL", "500ms");
    serve
}

/// A primary and its synchronous standby.
async fn pair() -> (Cluster, Cluster, String) {
    let first = Cluster::start("");
    let second = first.start_synchronous_standby().await;
    let url = url(&format!("127.0.0.1:{},127.0.0.1:{}", first.port, second.port));
    (first, second, url)
}

/// Events that callers hand in, each again and again until it is acknowledged.
struct Load {
    config: i64,
    acknowledged: AtomicUsize,
    ended: AtomicBool,
}

impl Load {
    fn begin(apis: &[ApiClient], config: i64) -> (Arc<Self>, Vec<tokio::task::JoinHandle<Vec<String>>>) {
        let load =
            Arc::new(Self { config, acknowledged: AtomicUsize::new(0), ended: AtomicBool::new(false) });
        let callers = (0..16).map(|number| {
            let (load, api) = (load.clone(), apis[number % apis.len()].clone());
            tokio::spawn(async move { load.call(&api, number).await })
        });
        (load.clone(), callers.collect())
    }

    /// Returns the ids of the events that were acknowledged.
    async fn call(&self, api: &ApiClient, caller: usize) -> Vec<String> {
        let mut acknowledged = Vec::new();
        for number in 0.. {
            if self.ended.load(Ordering::Relaxed) {
                break;
            }
            let event_id = format!("caller-{caller}-event-{number}");
            let event = json!({"event_type": "+credit", "config_id": self.config, "event_id": event_id,
                               "url_params": {"event": event_id}});
            let begun = Instant::now();
            loop {
                let answer = api.post("/webhooks", event.clone()).await;
                assert!([200, 201, 503].contains(&answer.status), "{}", answer.text);
                if answer.status != 503 {
                    break;
                }
                assert!(begun.elapsed() < PATIENCE, "{event_id} is not accepted: {}", answer.text);
                sleep(Duration::from_millis(50)).await;
            }
            acknowledged.push(event_id);
            self.acknowledged.fetch_add(1, Ordering::Relaxed);
        }
        acknowledged
    }

    async fn goes_on_for(&self, events: usize) {
        let goal = self.acknowledged.load(Ordering::Relaxed) + events;
        eventually("the load goes on", async || {
            (self.acknowledged.load(Ordering::Relaxed) >= goal).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_under_load_to_a_synchronous_standby_loses_nothing_and_sends_nothing_twice() {
    let receiver = TestReceiver::start().await;
    let (first, second, url) = pair().await;
    let processes = [Process::start(serve(&url).await), Process::start(serve(&url).await)];
    let apis = [processes[0].api(), processes[1].api()];
    let config = apis[0].register(&receiver.url, json!({})).await;

    let (load, callers) = Load::begin(&apis, config);
    load.goes_on_for(300).await;
    first.crash();
    second.promote().await;
    load.goes_on_for(300).await;
    load.ended.store(true, Ordering::Relaxed);
    let mut acknowledged = Vec::new();
    for caller in callers {
        acknowledged.extend(caller.await.unwrap());
    }

    eventually("all are delivered", async || {
        let open: i64 = second.scalar("postgres", "select count(*) from webhook_queue_open").await;
        (open == 0).then_some(())
    })
    .await;
    let completed: i64 =
        second.scalar("postgres", "select count(*) from webhook_queue where status = 'completed'").await;
    assert_eq!(usize::try_from(completed).unwrap(), acknowledged.len());
    let mut requests: HashMap<String, usize> = HashMap::new();
    for arrival in receiver.arrivals() {
        *requests.entry(arrival.uri).or_default() += 1;
    }
    for event_id in &acknowledged {
        assert!(requests.keys().any(|uri| uri.ends_with(event_id.as_str())), "{event_id} was lost");
    }
    // what was sent twice was under a lease that ended meanwhile, and the audit says so
    let lost_leases: i64 = second
        .scalar(
            "postgres",
            "select count(*) from webhook_attempts where error = 'lease expired, outcome unknown'",
        )
        .await;
    let repeated: usize = requests.values().map(|times| times - 1).sum();
    assert_eq!(requests.len(), acknowledged.len());
    assert!(
        repeated <= usize::try_from(lost_leases).unwrap(),
        "{repeated} repeated, {lost_leases} leases lost"
    );
    for process in &processes {
        let log = process.log();
        let moved = format!(
            "PostgreSQL at 127.0.0.1:{} accepts writes and is used from now on instead of 127.0.0.1:{}: nothing listens",
            second.port, first.port
        );
        assert!(log.contains(&moved) && !log.contains("s3cret"), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_becomes_read_only_is_left_by_all_connections_and_one_that_was_replaced_is_never_used_again()
 {
    let receiver = TestReceiver::start().await;
    let (first, second, url) = pair().await;
    let process = Process::start(serve(&url).await);
    let api = process.api();
    let config = api.register(&receiver.url, json!({})).await;
    let before = api.credit(config).await;
    api.delivery_in(&before, "completed").await;

    // its connections live on, and may only read
    first
        .run("postgres", &["alter system set default_transaction_read_only = on", "select pg_reload_conf()"])
        .await;
    second.promote().await;
    let queue_id = eventually("an event is accepted", async || {
        let answer = api.post("/webhooks", json!({"event_type": "+credit", "config_id": config})).await;
        (answer.status == 201).then(|| answer.json()["queue_id"].as_str().unwrap().to_owned())
    })
    .await;
    api.delivery_in(&queue_id, "completed").await;
    eventually("nothing is connected to the first host", async || {
        let sessions = "select count(*) from pg_stat_activity where application_name = 'webhook-processor'";
        (first.scalar::<i64>("postgres", sessions).await == 0).then_some(())
    })
    .await;
    let log = process.log();
    let (old, new) = (format!("127.0.0.1:{}", first.port), format!("127.0.0.1:{}", second.port));
    assert!(log.contains(&format!("{old} is a standby, or default_transaction_read_only is on")), "{log}");
    assert!(
        log.contains(&format!("PostgreSQL at {new} accepts writes and is used")) && !log.contains("s3cret"),
        "{log}"
    );

    // the old primary comes back as if nothing had happened, first in the list
    first
        .run("postgres", &["alter system reset default_transaction_read_only", "select pg_reload_conf()"])
        .await;
    let another = Process::start(serve(&url).await);
    let queue_id = another.api().credit(config).await;
    api.delivery_in(&queue_id, "completed").await;
    let log = another.log();
    assert!(log.contains(&format!("PostgreSQL at {new} accepts writes and is used")), "{log}");
    assert!(
        log.contains(&format!("PostgreSQL at {old} accepts writes on timeline 1, but is not used")),
        "{log}"
    );

    // and stays alone: what runs does not go back to it, and says why nothing works
    second.crash();
    eventually("the API is not available", async || {
        let answer = api.post("/webhooks", json!({"event_type": "+credit", "config_id": config})).await;
        (answer.status == 503).then_some(())
    })
    .await;
    process.wait_for_log("is on timeline 1, which is older");
    let stray: i64 = first.scalar("postgres", "select count(*) from webhook_queue").await;
    assert_eq!(stray, 1, "only what was delivered before the failover");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_was_replaced_but_not_stopped_is_left_when_its_commits_hang() {
    let receiver = TestReceiver::start().await;
    let (first, second, url) = pair().await;
    let process = Process::start(serve(&url).await);
    let api = process.api();
    let config = api.register(&receiver.url, json!({})).await;
    let before = api.credit(config).await;
    api.delivery_in(&before, "completed").await;

    // the first host answers as before, but waits with each commit for a standby that no longer follows it
    second.promote().await;
    let event = json!({"event_type": "+credit", "config_id": config, "event_id": "once", "url_params": {"event": "once"}});
    let queue_id = eventually("the event is accepted", async || {
        let answer = api.post("/webhooks", event.clone()).await;
        ([200, 201].contains(&answer.status)).then(|| answer.json()["queue_id"].as_str().unwrap().to_owned())
    })
    .await;
    api.delivery_in(&queue_id, "completed").await;
    assert_eq!(receiver.arrivals().iter().filter(|arrival| arrival.uri.contains("event=once")).count(), 1);
    let old = format!("instead of 127.0.0.1:{}: it is on timeline 1, which is older", first.port);
    assert!(process.log().contains(&old), "{}", process.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_are_silent_or_away_do_not_keep_a_process_from_the_primary_and_are_named() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let away = {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        closed.local_addr().unwrap()
    };
    let (silent_at, cluster) = (silent.local_addr().unwrap(), Cluster::start(""));
    let process =
        Process::start(serve(&url(&format!("{silent_at},{away},127.0.0.1:{}", cluster.port))).await);
    let log = process.log();
    for said in [
        format!("a failover to {silent_at} is not possible now: PostgreSQL at {silent_at} does not answer"),
        format!("a failover to {away} is not possible now: nothing listens at {away}"),
        format!("PostgreSQL at 127.0.0.1:{} accepts writes and is used", cluster.port),
    ] {
        assert!(log.contains(&said), "{said:?} is missing in:\n{log}");
    }
    assert!(!log.contains("s3cret"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_says_of_each_host_why_it_cannot_be_written_to() {
    let (first, second, url) = pair().await;
    first.crash();
    let mut migrate = command(&TestDatabase::new().await, &["migrate"]);
    migrate.env("DATABASE_URL", &url);
    let output = output(migrate);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for reason in [
        "no host in DATABASE_URL accepts writes: ".to_owned(),
        format!("nothing listens at 127.0.0.1:{}", first.port),
        format!("127.0.0.1:{} is a standby", second.port),
    ] {
        assert!(said.contains(&reason) && !said.contains("s3cret"), "{said}");
    }
}
