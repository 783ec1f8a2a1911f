//! `webhook-processor receiver`: a local test receiver that counts and prints what arrives.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use chrono::Utc;
use clap::Args;
use rand::RngExt as _;
use serde::Serialize;
use serde_json::json;

use super::output::print_json;
use crate::infrastructure::http::{listen, serve};
use crate::infrastructure::shutdown::stop_on_signal;

#[derive(Args, Clone)]
pub struct ReceiverArgs {
    /// Port on 127.0.0.1; 0 picks a free one.
    #[arg(long, default_value_t = 9000)]
    port: u16,
    /// Status to answer with.
    #[arg(long, default_value = "200", value_parser = parse_status)]
    status: StatusCode,
    /// Share of requests, from 0 to 1, that are answered with status 500 instead.
    #[arg(long, default_value_t = 0.0, value_parser = parse_share)]
    fail_rate: f64,
    /// How long to wait before each answer, such as 50ms or 2s.
    #[arg(long, default_value = "0ms", value_parser = humantime::parse_duration)]
    delay: Duration,
    /// Print only the counts, at the end.
    #[arg(long)]
    quiet: bool,
}

fn parse_status(text: &str) -> Result<StatusCode, String> {
    let status = text.parse::<StatusCode>().ok().filter(|status| (200..600).contains(&status.as_u16()));
    status.ok_or_else(|| "must be a status from 200 to 599".into())
}

fn parse_share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or_else(|| "must be from 0 to 1".into())
}

struct Received {
    args: ReceiverArgs,
    json: bool,
    requests: AtomicU64,
    failed: AtomicU64,
}

impl Received {
    fn counts(&self) -> Counts {
        Counts {
            requests: self.requests.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
        }
    }
}

/// The number of requests and of those that were answered with a failure.
#[derive(Serialize)]
struct Counts {
    requests: u64,
    failed: u64,
}

pub async fn run(args: ReceiverArgs, json: bool) -> anyhow::Result<()> {
    let stop = stop_on_signal()?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, args.port));
    let listener = listen(address).with_context(|| format!("listening on {address}"))?;
    let address = listener.local_addr()?;
    if json {
        println!("{}", json!({"listening": address.to_string()}));
    } else {
        println!("listening on http://{address}");
    }
    let received = Arc::new(Received { args, json, requests: AtomicU64::new(0), failed: AtomicU64::new(0) });
    let router = Router::new().route("/received", get(count)).fallback(receive).with_state(received.clone());
    serve(listener, router, stop).await;

    let Counts { requests, failed } = received.counts();
    if json {
        return print_json(&received.counts());
    }
    println!("{requests} requests, of which {failed} were answered with a failure");
    Ok(())
}

/// Returns the counts, for other programs. This request is not counted.
async fn count(State(received): State<Arc<Received>>) -> Json<Counts> {
    Json(received.counts())
}

async fn receive(State(received): State<Arc<Received>>, request: Request) -> impl IntoResponse {
    let Received { args, .. } = &*received;
    let number = received.requests.fetch_add(1, Ordering::Relaxed) + 1;
    if !args.delay.is_zero() {
        tokio::time::sleep(args.delay).await;
    }
    let fails = args.fail_rate > 0.0 && rand::rng().random_bool(args.fail_rate);
    let status = if fails { StatusCode::INTERNAL_SERVER_ERROR } else { args.status };
    if !status.is_success() {
        received.failed.fetch_add(1, Ordering::Relaxed);
    }
    if !args.quiet {
        let (method, uri, at) = (request.method(), request.uri(), Utc::now());
        let id = request.headers().get("webhook-id").and_then(|id| id.to_str().ok());
        if received.json {
            println!(
                "{}",
                json!({"number": number, "at": at, "method": method.as_str(), "uri": uri.to_string(), "webhook_id": id, "status": status.as_u16()})
            );
        } else {
            println!("{number:>6}  {}  {}  {method} {uri}", at.format("%H:%M:%S%.3f"), status.as_u16());
        }
    }
    (status, "ok")
}
