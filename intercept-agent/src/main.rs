//! The command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 126 validation failed.

mod cli;
mod commands;

use std::{ffi::OsString, process::ExitCode};

use clap::Parser as _;
use intercept_agent::{cni, confinement::explained, escape::Lines};

use crate::{cli::Cli, commands::Failed};

fn main() -> ExitCode {
    let cli = Cli::parse_from(arguments(std::env::args_os()));
    cli::start_logging(&cli.logging);
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.downcast_ref::<Failed>().map_or(1, |failed| failed.exit_code());
            // The chain of causes, separated by colons.
            eprintln!("error: {}", Lines(explained(error.as_ref())));
            ExitCode::from(code)
        }
    }
}

/// Returns the arguments. If the binary is called by the name of a subcommand (istio-iptables, the CNI plugin), that
/// subcommand is inserted.
fn arguments(mut args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    const NAMES: [(&str, &str); 2] = [("istio-iptables", "istio-iptables"), (cni::PLUGIN, "cni")];
    let Some(own) = args.next() else { return Vec::new() };
    let called = std::path::Path::new(&own).file_name();
    let subcommand = NAMES.iter().find(|(name, _)| called.is_some_and(|called| called == *name));
    let subcommand = subcommand.map(|(_, subcommand)| OsString::from(subcommand));
    std::iter::once(own).chain(subcommand).chain(args).collect()
}
