//! `webhook-processor health`: asks a running process whether it is alive.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::Empty;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::time::timeout;

use crate::infrastructure::settings::Settings;

/// How long the service may take to answer /health/live.
const HEALTH_LIMIT: Duration = Duration::from_secs(3);

pub async fn run(settings: &Settings) -> anyhow::Result<()> {
    let mut address = settings.listen_addr;
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            std::net::Ipv4Addr::LOCALHOST.into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        });
    }
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let url = format!("http://{address}/health/live").parse().context("LISTEN_ADDR")?;
    let answer =
        timeout(HEALTH_LIMIT, client.get(url)).await.context("no answer in time")?.context("no answer")?;
    anyhow::ensure!(answer.status().is_success(), "not live: {}", answer.status());
    Ok(())
}
