//! Reads the command line, runs the command, and answers with an exit code.

use std::process::ExitCode;

use clap::Parser as _;
use webhook_processor::cli::{self, Cli};

fn main() -> ExitCode {
    match cli::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("webhook-processor: {error:#}");
            ExitCode::FAILURE
        }
    }
}
