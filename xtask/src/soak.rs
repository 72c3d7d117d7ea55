//! Builds everything and soaks; see `tests/src/soak.rs`.

use std::ffi::OsString;

use anyhow::Result;
use clap::Args;

use crate::{
    build,
    setup::{self, Group},
    sweep,
};

#[derive(Args)]
pub(crate) struct SoakArgs {
    /// Duration in minutes
    #[arg(long, value_name = "N")]
    minutes: Option<f64>,
    /// Seed of every choice [default: the time]
    #[arg(long)]
    seed: Option<u64>,
    /// Soak joined connections between proxies instead: many short ones, then Envoys with faults
    #[arg(long)]
    accelerate: bool,
    /// Number of short connections of --accelerate
    #[arg(long, value_name = "N", requires = "accelerate")]
    connections: Option<u64>,
}

/// Soaks.
///
/// # Errors
/// A connection or the agent misbehaved; the error has the seed. Or something is left on the machine.
pub(crate) fn soak(arguments: &SoakArgs) -> Result<()> {
    setup::setup(&[Group::Base, Group::Test])?;
    if arguments.accelerate {
        setup::setup(&[Group::Envoy])?;
    }
    let before = sweep::present();
    let options = [
        arguments.minutes.map(|minutes| format!("--minutes={minutes}")),
        arguments.seed.map(|seed| format!("--seed={seed}")),
        arguments.accelerate.then(|| "--accelerate".to_owned()),
        arguments.connections.map(|connections| format!("--connections={connections}")),
    ];
    let options: Vec<_> = options.into_iter().flatten().map(OsString::from).collect();
    let soaked = build::and_run("soak", &options);
    let left = sweep::nothing_new(&before);
    soaked?;
    left
}
