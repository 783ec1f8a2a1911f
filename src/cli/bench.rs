//! bench
use crate::infrastructure::settings::Settings;
use clap::Args;
#[derive(Args)]
pub struct BenchArgs {}
pub async fn run(_: BenchArgs, _: &Settings, _: bool) -> anyhow::Result<()> {
    Ok(())
}
