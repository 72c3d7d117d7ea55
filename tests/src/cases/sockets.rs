//! Ways of connecting.

use anyhow::{Result, ensure};

use super::captured;
use crate::{
    agent::{Agent, INIT_FLAGS},
    slip::{Manner, Slip, Slipped, Slipping, bed::Bed},
};

const DESTINATIONS: [&str; 2] = ["198.51.100.7:80", "[2001:db8::7]:80"];

pub(super) fn io_uring(agent: &Agent) -> Result<()> {
    reaches_the_proxy(agent, &Manner::IoUring)
}

pub(super) fn fast_open(agent: &Agent) -> Result<()> {
    reaches_the_proxy(agent, &Manner::FastOpenSend)?;
    reaches_the_proxy(agent, &Manner::FastOpenConnect)
}

pub(super) fn made_before(agent: &Agent) -> Result<()> {
    for to in DESTINATIONS {
        let bed = Bed::new("before")?;
        let slip = Slip::new(Manner::Plain, to.parse()?);
        let slipping = Slipping::start(&bed.pod, &slip)?;
        agent.attach(&bed.pod, &INIT_FLAGS)?;
        is_of_the_proxy(&slip, &slipping.go()?)?;
    }
    Ok(())
}

fn reaches_the_proxy(agent: &Agent, manner: &Manner) -> Result<()> {
    let bed = captured(agent, "socket", &[])?;
    for to in DESTINATIONS {
        let slip = Slip::new(manner.clone(), to.parse()?);
        is_of_the_proxy(&slip, &Slipping::start(&bed.pod, &slip)?.go()?)?;
    }
    Ok(())
}

/// The proxy answered, and the client sees whom it dialled.
fn is_of_the_proxy(slip: &Slip, slipped: &Slipped) -> Result<()> {
    ensure!(slipped.server() == "outbound" && slipped.peers == slip.to, "{slip:?}: {slipped:?}");
    Ok(())
}
