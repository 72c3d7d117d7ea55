//! Connections that stay open for the whole run, and ask for their original destination again and again.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use intercept_agent::facade::daemon::PodState;

use super::{
    faults::OPTIONS,
    ledger::{Kind, Ledger},
    node::SoakNode,
    steady::World,
};
use crate::{
    actor::binary::ReadableCopy,
    load::{self, Accept, LoadDial, LoadMethod, LoadProcess, LoadRole, LoadTally},
    testbed::{Ids, Pod},
};

/// How many.
pub const COUNT: u32 = 50;
const FILE: &str = "held";

/// A pod with connections that stay, and others beside them.
#[derive(Debug)]
pub struct HeldPod {
    // Processes before the pod that they run in.
    proxy: LoadProcess,
    _clients: LoadProcess,
    program: ReadableCopy,
    pod: Pod,
}

impl HeldPod {
    /// A captured pod whose connections are open.
    pub fn new(node: &SoakNode<'_>, world: &World) -> Result<Self> {
        let program = load::program()?;
        let pod = world.pod(FILE)?;
        let addr = SocketAddr::from(([0, 0, 0, 0], 15001));
        let accept = Accept { addr, backlog: 512, keep: true, paused: false };
        let mut proxy = LoadProcess::start(&program, &pod, Ids::PROXY, &LoadRole::Accept(accept))?;
        node.daemon().put(FILE, &pod, &OPTIONS)?;
        node.daemon().wait_for(FILE, PodState::Captured)?;
        let mut clients =
            LoadProcess::start(&program, &pod, Ids::APP, &LoadRole::Dial(dial(COUNT, LoadMethod::Held)))?;
        let (dialled, accepted) = (clients.tally()?, proxy.seen()?);
        ensure!(dialled.right == COUNT && dialled.wrong.is_empty(), "holding connections: {dialled:?}");
        ensure!(accepted.right == COUNT && accepted.wrong.is_empty(), "holding connections: {accepted:?}");
        Ok(Self { proxy, _clients: clients, program, pod })
    }

    /// Checks them until the run ends, and gives up others beside them before they are established.
    pub fn check(&mut self, ledger: &Ledger) -> Result<()> {
        while !ledger.stopped() {
            let clients =
                LoadProcess::dial(&self.program, &self.pod, Ids::APP, dial(20, LoadMethod::Abandoned))?;
            report(&clients, Kind::Lost, ledger);
            self.proxy.again()?;
            let seen = self.proxy.seen()?;
            report(&seen, Kind::Misled, ledger);
            if seen.right < COUNT {
                ledger.find(Kind::Misled, &format_args!("{} of {COUNT} held connections answer", seen.right));
            }
            ledger.right(seen.right.into());
            ledger.pause(Duration::from_secs(1));
        }
        Ok(())
    }

    /// Takes its file away.
    pub fn release(&self, node: &SoakNode<'_>) -> Result<()> {
        node.daemon().remove(FILE)
    }
}

fn dial(count: u32, method: LoadMethod) -> LoadDial {
    let to = (1..=25).map(|low| SocketAddr::from(([10, 203, 0, low], 80))).collect();
    LoadDial { to, from: None, count, threads: 4, method }
}

fn report(tally: &LoadTally, kind: Kind, ledger: &Ledger) {
    for (what, count) in &tally.wrong {
        ledger.find(kind, &format_args!("held: {count} times: {what}"));
    }
}
