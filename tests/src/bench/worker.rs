//! The processes that generate the traffic: a client, relays and a server, each with one thread and one epoll
//! instance, so that most of the measured work is the kernel's.
//!
//! A worker is the benchmark's own binary with its [`Role`] as argument. It prints [`READY`], answers each line of its
//! input with a line, and ends at the end of its input.

mod clients;
mod exchange;
mod hold;
pub mod protocol;
mod relay;
mod server;
mod socket;
mod stream;

use std::io::{BufRead, Write};

use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

pub use protocol::{Measured, READY, Role, Timing, Upstream, WorkerAnswer, WorkerJob};

/// Plays the role until the end of the input.
pub fn run(role: &Role) -> Result<()> {
    raise_descriptor_limit()?;
    match role {
        Role::Server { ports } => {
            let listeners = ports.iter().map(|&port| socket::listen(port)).collect::<Result<Vec<_>>>()?;
            std::thread::spawn(move || end_with(server::serve(&listeners)));
            ready()?;
            wait_for_end()
        }
        Role::Relay(relay) => {
            let listener = socket::listen(relay.port)?;
            let relay = relay.clone();
            std::thread::spawn(move || end_with(relay::relay(&listener, &relay)));
            ready()?;
            wait_for_end()
        }
        Role::Client { pods } => {
            ready()?;
            clients::obey(pods)
        }
    }
}

/// Raises the limit of descriptors to the hard limit.
fn raise_descriptor_limit() -> Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
        .context("raising the limit of descriptors")
}

fn ready() -> Result<()> {
    say(READY)
}

fn say(line: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{line}").and_then(|()| output.flush()).context("answering")
}

/// Ends the process at the end of the input, also if the parent process dies.
fn wait_for_end() -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        line.context("reading the input")?;
    }
    Ok(())
}

/// Ends the process if its server or relay stops, so that the measurement fails at once rather than by timeout.
fn end_with(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("{error:#}");
        std::process::exit(1);
    }
}
