//! The ceiling of a drain: `1 / (1 / HTTP only + 1 / SQL only)`.
//!
//! That is what claim, send and settle would reach if they took turns on the machine without any loss.

use std::slice::from_ref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use webhook_processor::application::ports::{Claim, DeliveryQueue as _, Sender as _};
use webhook_processor::application::workers::ledger::Rooms;
use webhook_processor::domain::attempt::{Answer, AttemptOutcome};
use webhook_processor::domain::delivery::{
    AttemptTimes, FinishedAttempt, Lease, LeasedDelivery, Work, WorkerId,
};
use webhook_processor::domain::endpoint::Endpoint;
use webhook_processor::domain::evidence::Evidence;
use webhook_processor::domain::retry::Verdict;

use crate::report::figures::per_second;
use crate::rig::Rig;
use crate::rig::payload::new_delivery;

/// Kinds of run that make a ceiling.
pub const RUNS: usize = 2;
pub const BOTH: &str = "ceiling: 1 / (1 / HTTP + 1 / SQL)";
/// Clients that claim and settle without sending.
const SQL_CLIENTS: usize = 2;

/// The two halves of a drain, each alone, in deliveries a second.
pub struct Ceiling {
    pub http_only: f64,
    pub sql_only: f64,
}

impl Ceiling {
    pub async fn measure(rig: &Rig, deliveries: usize) -> anyhow::Result<Self> {
        let http_only = http_only(rig, deliveries).await?;
        rig.bar.inc(1);
        let sql_only = sql_only(rig, deliveries).await?;
        Ok(Self { http_only, sql_only })
    }

    /// By taking turns.
    pub fn both(&self) -> f64 {
        1.0 / (1.0 / self.http_only + 1.0 / self.sql_only)
    }
}

/// The sender alone, as many requests under way as workers hold leases.
async fn http_only(rig: &Rig, requests: usize) -> anyhow::Result<f64> {
    let sender = Arc::new(rig.sender()?);
    let endpoint = Arc::new(rig.endpoint.clone());
    let left = Arc::new(AtomicUsize::new(requests));
    let begun = Instant::now();
    let lanes = (0..rig.settings.workers.leases_max()).map(|_| {
        let (sender, endpoint, left) = (sender.clone(), endpoint.clone(), left.clone());
        let delivery = leased(&endpoint);
        tokio::spawn(async move {
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
            {
                let outcome = sender.send(&delivery, &endpoint).await;
                let status = outcome.as_ref().and_then(AttemptOutcome::status);
                anyhow::ensure!(status == Some(200), "the receiver answered {outcome:?}");
            }
            Ok(())
        })
    });
    for lane in futures_util::future::join_all(lanes).await {
        lane??;
    }
    Ok(per_second(requests, begun))
}

/// A delivery as a worker would hold it.
fn leased(endpoint: &Endpoint) -> LeasedDelivery {
    let new = new_delivery(endpoint);
    LeasedDelivery {
        queue_id: new.queue_id,
        lease: Lease { worker_id: WorkerId::new("bench", 0, 0, 0), locked_at: chrono::Utc::now() },
        config_id: new.config_id,
        config_revision: new.config_revision,
        event_id: new.event_id,
        webhook_url: new.webhook_url,
        traceparent: None,
        attempt: 0,
        max_retries: new.max_retries,
        priority: new.priority,
        probe: false,
        in_flight_limited: false,
        claimed_at: Instant::now(),
        work: Work::Attempt { waited: Duration::ZERO, starts_at: None },
    }
}

/// The queue alone: claims of the size of a process's, each settled before the next one of the same client.
async fn sql_only(rig: &Rig, deliveries: usize) -> anyhow::Result<f64> {
    let store = rig.fresh().await?;
    store.fill(from_ref(&store.endpoint), deliveries).await?;
    let database = &store.open();
    let begun = Instant::now();
    let clients = (1..=SQL_CLIENTS).map(|number| async move {
        let limit = rig.settings.workers.claim_max();
        let claim = Claim {
            worker_ids: vec![WorkerId::new("bench", 0, 0, number); limit],
            lease_term: rig.settings.workers.lease_term,
            after: None,
            rooms: Rooms { limit, share: limit, listed: vec![] },
        };
        loop {
            let claimed = database.claim(&claim).await?;
            if claimed.deliveries.is_empty() && !claimed.look_again {
                return anyhow::Ok(());
            }
            let delivered: Vec<_> = claimed.deliveries.into_iter().map(delivered).collect();
            database.settle(&delivered.iter().collect::<Vec<_>>()).await?;
        }
    });
    for client in futures_util::future::join_all(clients).await {
        client?;
    }
    let rate = per_second(deliveries, begun);
    database.close().await;
    rig.finish(store).await?;
    Ok(rate)
}

/// What a worker would settle had the receiver answered at once.
fn delivered(delivery: LeasedDelivery) -> FinishedAttempt {
    FinishedAttempt {
        queue_id: delivery.queue_id,
        lease: delivery.lease,
        config_id: delivery.config_id,
        webhook_url: delivery.webhook_url,
        number: delivery.attempt,
        times: AttemptTimes::Measured { started: delivery.claimed_at, ended: Instant::now() },
        outcome: AttemptOutcome::Answered(Answer {
            status: 200,
            body: "ok".into(),
            retry_after: None,
            broken_off: None,
            evidence: Evidence::default(),
        }),
        verdict: Verdict::Completed,
    }
}
