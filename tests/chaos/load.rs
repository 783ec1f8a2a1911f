//! Callers: each sends its events again until they are acknowledged, as callers of a payment system do.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::task::JoinSet;
use uuid::Uuid;

/// How many callers there are.
const CALLERS: usize = 24;
/// How long each rests between two events.
const REST: Duration = Duration::from_millis(80);
/// How long an answer is waited for.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// What was acknowledged: the delivery of each event.
#[derive(Debug, Default)]
pub struct Sent {
    pub acknowledged: HashMap<String, Uuid>,
    /// Answers that named another delivery for an event than an answer before.
    pub contradictions: Vec<String>,
    /// How many calls failed, and were made again.
    pub repeated: u64,
}

/// Sends events to the processes in turn for `length`, and goes on until all of them are acknowledged.
pub async fn send(processes: Vec<SocketAddr>, config_id: i64, length: Duration) -> Sent {
    let (numbers, end) = (Arc::new(AtomicU64::new(0)), Instant::now() + length);
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        callers.spawn(call(caller, processes.clone(), config_id, numbers.clone(), end));
    }
    let mut all = Sent::default();
    while let Some(one) = callers.join_next().await {
        let one = one.expect("a caller does not panic");
        all.acknowledged.extend(one.acknowledged);
        all.contradictions.extend(one.contradictions);
        all.repeated += one.repeated;
    }
    all
}

async fn call(
    caller: usize,
    processes: Vec<SocketAddr>,
    config_id: i64,
    numbers: Arc<AtomicU64>,
    end: Instant,
) -> Sent {
    let client = reqwest::Client::builder().no_proxy().timeout(ANSWER_LIMIT).build().expect("a plain client");
    let (mut sent, mut turn) = (Sent::default(), caller);
    while Instant::now() < end {
        let event_id = format!("e-{}", numbers.fetch_add(1, Ordering::Relaxed));
        let event = json!({"event_type": "+credit", "config_id": config_id, "event_id": event_id,
                           "url_params": {"value": 1}});
        loop {
            turn += 1;
            let process = processes[turn % processes.len()];
            let answer = client.post(format!("http://{process}/webhooks")).json(&event).send().await;
            let receipt = match answer {
                Ok(answer) if answer.status().is_success() => answer.json::<Value>().await.ok(),
                Ok(_) | Err(_) => None,
            };
            let Some(id) = receipt.as_ref().and_then(|receipt| receipt["queue_id"].as_str()?.parse().ok())
            else {
                sent.repeated += 1;
                tokio::time::sleep(REST * 2).await;
                continue;
            };
            sent.acknowledged.insert(event_id.clone(), id);
            // now and then a caller asks twice, although it knows
            if numbers.load(Ordering::Relaxed).is_multiple_of(50) {
                let again = client.post(format!("http://{process}/webhooks")).json(&event).send().await;
                if let Ok(answer) = again
                    && answer.status().is_success()
                    && let Ok(receipt) = answer.json::<Value>().await
                    && receipt["queue_id"] != id.to_string()
                {
                    sent.contradictions.push(format!("{event_id} is {id} and {}", receipt["queue_id"]));
                }
            }
            break;
        }
        tokio::time::sleep(REST).await;
    }
    sent
}
