//! The soak; `cargo xtask soak` builds and runs it. Needs root, and leaves nothing behind.

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use tests::{
    joined::{
        churn::{Churned, churn, end::ChurnRole},
        envoys,
    },
    soak::{Options, hostile::process::Program, soak},
    testbed::sweep::sweep,
};

/// Cause random faults on a node, and check every connection of its well-behaved pods meanwhile.
#[derive(Parser)]
#[command(bin_name = "cargo xtask soak")]
struct Arguments {
    /// Duration in minutes
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Seed of every choice [default: the time]
    #[arg(long)]
    seed: Option<u64>,
    /// Soak joined connections between proxies instead: many short ones, then Envoys with faults for the given time
    #[arg(long)]
    accelerate: bool,
    /// Number of short connections of --accelerate
    #[arg(long, default_value_t = 100_000, requires = "accelerate")]
    connections: u64,
    #[command(subcommand)]
    command: Option<Internal>,
}

#[derive(Subcommand)]
enum Internal {
    /// Run a program of a hostile pod
    #[command(hide = true)]
    Hostile {
        /// The program
        program: Program,
    },
    /// Run one end of short connections
    #[command(hide = true)]
    End {
        /// The end
        #[command(subcommand)]
        role: ChurnRole,
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
    match arguments.command {
        Some(Internal::Hostile { program }) => return program.run(),
        Some(Internal::End { role }) => return role.run(),
        None => {}
    }
    for path in sweep()? {
        println!("removed what a killed run left: {}", path.display());
    }
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    let seed = arguments.seed.unwrap_or(now.as_secs());
    let duration = Duration::try_from_secs_f64(arguments.minutes * 60.0)?;
    if arguments.accelerate {
        return soak_joined(arguments.connections, duration, seed);
    }
    soak(Options { duration, seed })
}

/// Soaks short connections, then Envoys. A number or time of zero omits that part.
fn soak_joined(connections: u64, duration: Duration, seed: u64) -> Result<()> {
    println!("soak: seed {seed}, {connections} short connections, then {} s", duration.as_secs());
    if connections > 0 {
        let Churned { made, broken, joined } = churn(connections, seed)?;
        println!("churn: {made} connections made, {joined} of them joined, {broken} broken, none crossed");
        ensure!(broken * 1000 <= made, "{broken} of {made} connections ended early");
    }
    if !duration.is_zero() {
        println!("soak: {}", envoys::soak(duration, seed));
    }
    Ok(())
}
