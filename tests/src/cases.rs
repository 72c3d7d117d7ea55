//! Cases that need no tools. `cargo xtask test` runs them on this machine (`tests/cases.rs`). `cargo xtask vm` runs them under
//! other kernels and on other architectures, where only the programs of this package and a shell exist.
//!
//! To add a case, write a function in a file below `src/cases` and list it in [`CASES`]. A case fails by an error or a
//! panic. It may start programs of the workspace: `actor`, `unusual`, and the agent that it is given (or its own, if it
//! changes the node). It must not start programs of the system (`ip`, `bash`, iptables). It cleans up with the guards of
//! [`crate::testbed`]. `cargo xtask demo --cases NAME` runs one case.

mod dns;
mod hooks;
mod reuse;
mod sockets;

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

use anyhow::{Result, anyhow};

use crate::{
    agent::{Agent, INIT_FLAGS},
    unusual::fixture::UnusualFixture,
};

pub use hooks::refused_as_checked;

/// A case.
pub struct KernelCase {
    /// What the case shows. A part of the name selects the case.
    pub name: &'static str,
    run: CaseFn,
}

/// Takes the agent that all cases share, because loading the programs takes seconds in an emulator.
type CaseFn = fn(&Agent) -> Result<()>;

const fn case(name: &'static str, run: CaseFn) -> KernelCase {
    KernelCase { name, run }
}

/// All cases.
pub const CASES: [KernelCase; 11] = [
    case("a connection by io_uring is captured", sockets::io_uring),
    case("TCP Fast Open is captured", sockets::fast_open),
    case("a socket made before the capture is captured when it connects", sockets::made_before),
    case("an unconnected socket is answered by the name server that it asked", dns::unconnected),
    case("an unspecified destination is the kernel's own host", reuse::unspecified),
    case("nothing of a redirect stays on a socket that is disconnected", reuse::disconnected),
    case("one source port serves for several destinations", reuse::one_port),
    case("a query may choose its interface", reuse::interface),
    case("a datagram socket asks another server once it is disconnected", reuse::other_server),
    case("a hook that serves one option is needed by that option alone", hooks::of_one_option),
    case("without a hook that every capture needs, attach refuses as check says", hooks::of_every_capture),
];

impl KernelCase {
    /// Runs the case. A panic becomes an error.
    fn run(&self, agent: &Agent) -> Result<()> {
        catch_unwind(AssertUnwindSafe(|| (self.run)(agent)))
            .unwrap_or_else(|panic| Err(anyhow!("{}", text(&*panic))))
    }
}

fn text(panic: &(dyn Any + Send)) -> &str {
    let formatted = panic.downcast_ref::<String>().map(String::as_str);
    formatted.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message")
}

/// Runs the cases whose name contains a text and prints the result of each. Returns how many failed.
pub fn run(filter: &str) -> Result<usize> {
    let agent = Agent::new("cases")?;
    let selected: Vec<_> = CASES.iter().filter(|case| case.name.contains(filter)).collect();
    let mut failed = 0;
    for case in &selected {
        match case.run(&agent) {
            Ok(()) => println!("ok      {}", case.name),
            Err(error) => {
                failed += 1;
                println!("FAILED  {}: {error:#}", case.name);
            }
        }
    }
    println!("{} of {}", selected.len() - failed, selected.len());
    Ok(failed)
}

/// A pod with servers, captured with Istio's flags and additional ones.
fn captured(agent: &Agent, label: &str, flags: &[&str]) -> Result<UnusualFixture> {
    let fixture = UnusualFixture::new(label)?;
    agent.attach(&fixture.pod, &[&INIT_FLAGS[..], flags].concat())?;
    Ok(fixture)
}
