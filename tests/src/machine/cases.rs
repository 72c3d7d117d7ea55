//! The cases and their order.

use std::fs;

use anyhow::{Result, ensure};

use super::{CapturedMachine, beside, guard, observed, units, whole};

type MachineCase = fn(&CapturedMachine) -> Result<()>;

const CASES: [(&str, MachineCase); 11] = [
    ("what is refused says why, and changes nothing", units::refusals),
    ("a unit is captured, others are not, and detach restores everything", units::one_workload),
    ("two workloads have a proxy each", units::two_workloads),
    ("what is not confirmed is taken off", guard::confirm),
    ("run releases the machine when it ends", guard::run),
    ("run keeps options by which an attach has replaced its own", guard::run_keeps_options),
    ("run ends with the last of its cgroups", guard::run_ends),
    ("queries of a workload go to its proxy", beside::dns),
    ("another build replaces the programs of a workload", beside::upgrade),
    ("prove makes connections of a unit", observed::prove),
    ("an address with the same hash is another", observed::alike),
];

/// Those that need programs which virtual machines do not have, or more time.
const ON_HOSTS: [(&str, MachineCase); 2] = [
    ("audit names the sockets of the workload", observed::audit),
    ("the daemon leaves a workload alone, and captures pods beside it", beside::daemon),
];

/// Whether the root cgroup may be captured: only in a virtual machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum RootCgroup {
    /// It is this machine's alone.
    Capture,
    /// It is shared with a machine that runs tests.
    Spare,
}

/// Runs the cases whose names contain a text. Returns how many failed.
pub fn run(filter: &str, root: RootCgroup) -> Result<usize> {
    let own = fs::read_link("/proc/self/ns/net")?;
    ensure!(own == fs::read_link("/proc/1/ns/net")?, "the first process is in another network namespace");
    // Emulated machines are slow.
    let machine = CapturedMachine::new(if root == RootCgroup::Capture { 15 } else { 4 })?;
    let whole: (&str, MachineCase) =
        ("the whole machine is captured, but not its containers", whole::whole_machine);
    let whole = (root == RootCgroup::Capture).then_some(whole);
    let on_hosts = ON_HOSTS.into_iter().filter(|_| root == RootCgroup::Spare);
    let selected: Vec<_> =
        whole.into_iter().chain(CASES).chain(on_hosts).filter(|(name, _)| name.contains(filter)).collect();
    let mut failed = 0;
    for (name, case) in &selected {
        match case(&machine) {
            Ok(()) => println!("ok      {name}"),
            Err(error) => {
                failed += 1;
                println!("FAILED  {name}: {error:#}");
                drop(machine.agent.detach_all());
            }
        }
    }
    println!("{} of {}", selected.len() - failed, selected.len());
    Ok(failed)
}
