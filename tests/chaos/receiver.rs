//! A receiver that logs each request and how it was answered.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::net::TcpListener;
use uuid::Uuid;

/// The statuses that the requests for one delivery were answered with, in the order in which they came.
pub type Log = HashMap<Uuid, Vec<u16>>;

/// A running receiver.
pub struct Receiver {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    seed: u64,
    log: Mutex<Log>,
}

impl Receiver {
    /// One request in ten fails, one in ten is answered slowly: which, the seed decides.
    pub async fn start(seed: u64) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("a receiver")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared { seed, log: Mutex::default() });
        let router = Router::new().fallback(answer).with_state(shared.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { address, shared })
    }

    /// What came so far.
    pub fn log(&self) -> Log {
        self.shared.log.lock().expect("nothing panics while it is held").clone()
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> StatusCode {
    let id = request.headers().get("webhook-id").and_then(|id| id.to_str().ok()?.parse::<Uuid>().ok());
    let Some(id) = id else { return StatusCode::BAD_REQUEST };
    let count = shared.log.lock().expect("nothing panics while it is held").get(&id).map_or(0, Vec::len);
    let mut rng = StdRng::seed_from_u64(shared.seed ^ id.as_u64_pair().1 ^ count as u64);
    let status = if rng.random_bool(0.1) { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK };
    if rng.random_bool(0.1) {
        tokio::time::sleep(Duration::from_millis(rng.random_range(50..700))).await;
    }
    // a request whose sender has gone does not come this far, and was not answered
    shared.log.lock().expect("nothing panics while it is held").entry(id).or_default().push(status.as_u16());
    status
}
