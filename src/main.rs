//! Reads the command line, runs the command, and answers with an exit code.

use std::process::ExitCode;

use clap::Parser as _;
use tikv_jemallocator::Jemalloc;
use webhook_processor::cli::{self, Cli};

/// Many small things are made and dropped for each delivery: the system's allocator takes a quarter of the time.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

fn main() -> ExitCode {
    match cli::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("webhook-processor: {error:#}");
            ExitCode::FAILURE
        }
    }
}
