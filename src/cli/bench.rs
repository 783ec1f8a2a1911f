//! bench
use clap::Args;
use crate::infrastructure::settings::Settings;
#[derive(Args)]
pub struct BenchArgs {}
pub async fn run(_: BenchArgs, _: &Settings, _: bool) -> anyhow::Result<()> { Ok(()) }
