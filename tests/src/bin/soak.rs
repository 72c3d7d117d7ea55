//! The soak; `cargo xtask soak` builds and runs it. Needs root, and leaves nothing behind.

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use clap::{Parser, Subcommand};
use tests::{
    soak::{Options, hostile::process::Program, soak},
    testbed::sweep::sweep,
};

/// Disturb a node in every way at once, and check every connection of its well-behaved pods meanwhile.
#[derive(Parser)]
#[command(bin_name = "cargo xtask soak")]
struct Arguments {
    /// For how long
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Decides every choice [default: the time]
    #[arg(long)]
    seed: Option<u64>,
    #[command(subcommand)]
    command: Option<Internal>,
}

#[derive(Subcommand)]
enum Internal {
    /// What runs in a hostile pod
    #[command(hide = true)]
    Hostile {
        /// What it does
        program: Program,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    if let Some(Internal::Hostile { program }) = arguments.command {
        return program.run();
    }
    for path in sweep()? {
        println!("removed what a killed run left: {}", path.display());
    }
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    let seed = arguments.seed.unwrap_or(now.as_secs());
    soak(Options { duration: Duration::try_from_secs_f64(arguments.minutes * 60.0)?, seed })
}
