//! Executes the commands and determines exit codes: 0 done, 1 failed, 2 wrong usage, 126 validation or proof failed.

mod accelerate;
mod attach;
mod audit;
mod check;
mod cleanup;
mod cni;
mod cutover;
mod daemon;
mod detach;
mod explain;
mod machine;
mod prove;
mod run;
mod shadow;
mod status;
mod trace;

use std::process::ExitCode;

use anyhow::Result;

use crate::{
    cli::{self, Cli, Command},
    confinement::explained,
    escape::Lines,
    options::OptionError,
};

/// A failure with an exit code other than 1.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    /// The options are invalid.
    #[error(transparent)]
    Usage(#[from] OptionError),
    /// A machine cannot be captured as asked.
    #[error(transparent)]
    Machine(machine::MachineError),
    /// The CNI plugin failed. Its error has already been printed in the specification's format.
    #[error("the CNI plugin has failed")]
    Reported,
    /// Redirection is active and does not work.
    #[error(transparent)]
    Validation(crate::validation::ValidationError),
    /// A connection of a probe does not reach the proxy.
    #[error("the pod's connections do not reach its proxy: {0}")]
    Unproven(String),
}

impl Failed {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Machine(_) => OptionError::EXIT_CODE,
            Self::Reported => 1,
            Self::Validation(_) | Self::Unproven(_) => 126,
        }
    }
}

/// Prints a result, with control characters escaped. A closed standard output is ignored, because the command itself
/// has succeeded.
macro_rules! print_line {
    ($($what:tt)*) => {
        drop(std::io::Write::write_fmt(
            &mut std::io::stdout(),
            format_args!("{}\n", crate::escape::Lines(format_args!($($what)*))),
        ))
    };
}
use print_line;

/// Executes the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::of_process();
    cli::start_logging(&cli.logging);
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.downcast_ref::<Failed>().map_or(1, |failed| failed.exit_code());
            // The chain of causes, separated by colons. Standard error has no buffer: this is one write.
            let message = format!("error: {}\n", Lines(explained(error.as_ref())));
            eprint!("{message}");
            ExitCode::from(code)
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Attach(args) => attach::attach(args.0),
        Command::Audit(args) => audit::audit(&args),
        Command::Prove(args) => prove::prove(&args),
        Command::Cutover(args) => cutover::cutover(&args),
        Command::Detach(args) => detach::detach(&args),
        Command::Confirm(args) => machine::confirm(&args),
        Command::Guard(args) => machine::guard(&args),
        Command::Run(args) => run::run(args.0),
        Command::Status(args) if args.shadow => shadow::status(&args),
        Command::Status(args) => status::status(&args),
        Command::Explain(args) => explain::explain(&args),
        Command::Check(args) => check::check(&args),
        Command::Daemon(args) => daemon::daemon(args.0),
        Command::Trace(args) => trace::trace(&args),
        Command::Accelerate(args) => accelerate::accelerate(&args),
        Command::Cleanup(args) => cleanup::cleanup(&args),
        Command::Cni(args) => cni::cni(args.0),
        Command::IstioIptables(args) => attach::istio_iptables(args.0),
    }
}
