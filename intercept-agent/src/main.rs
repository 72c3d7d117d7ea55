//! The command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 126 validation failed.

mod cli;
mod commands;

use std::{ffi::OsString, process::ExitCode};

use clap::Parser as _;

use crate::{cli::Cli, commands::Failed};

fn main() -> ExitCode {
    let cli = Cli::parse_from(arguments(std::env::args_os()));
    cli::start_logging(&cli.logging);
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.downcast_ref::<Failed>().map_or(1, |failed| failed.exit_code());
            // The causes in order, each after a colon.
            eprintln!("error: {error:#}");
            ExitCode::from(code)
        }
    }
}

/// Called by the name istio-iptables, that is the subcommand.
fn arguments(mut args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    const NAME: &str = "istio-iptables";
    let Some(own) = args.next() else { return Vec::new() };
    let called = std::path::Path::new(&own).file_name().is_some_and(|name| name == NAME);
    let subcommand = called.then(|| OsString::from(NAME));
    std::iter::once(own).chain(subcommand).chain(args).collect()
}
