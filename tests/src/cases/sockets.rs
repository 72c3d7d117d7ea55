//! Ways of connecting.

use anyhow::{Result, ensure};

use super::captured;
use crate::{
    agent::{Agent, INIT_FLAGS},
    unusual::{Method, UnusualOutcome, UnusualProcess, UnusualSocket, fixture::UnusualFixture},
};

const DESTINATIONS: [&str; 2] = ["198.51.100.7:80", "[2001:db8::7]:80"];

pub(super) fn io_uring(agent: &Agent) -> Result<()> {
    reaches_the_proxy(agent, &Method::IoUring)
}

pub(super) fn fast_open(agent: &Agent) -> Result<()> {
    reaches_the_proxy(agent, &Method::FastOpenSend)?;
    reaches_the_proxy(agent, &Method::FastOpenConnect)
}

pub(super) fn made_before(agent: &Agent) -> Result<()> {
    for to in DESTINATIONS {
        let fixture = UnusualFixture::new("before")?;
        let unusual = UnusualSocket::new(Method::Plain, to.parse()?);
        let process = UnusualProcess::start(&fixture.pod, &unusual)?;
        agent.attach(&fixture.pod, &INIT_FLAGS)?;
        is_of_the_proxy(&unusual, &process.go()?)?;
    }
    Ok(())
}

fn reaches_the_proxy(agent: &Agent, manner: &Method) -> Result<()> {
    let fixture = captured(agent, "socket", &[])?;
    for to in DESTINATIONS {
        let unusual = UnusualSocket::new(manner.clone(), to.parse()?);
        is_of_the_proxy(&unusual, &UnusualProcess::start(&fixture.pod, &unusual)?.go()?)?;
    }
    Ok(())
}

/// The proxy answered, and the client sees its destination as the peer.
fn is_of_the_proxy(unusual: &UnusualSocket, outcome: &UnusualOutcome) -> Result<()> {
    ensure!(outcome.server() == "outbound" && outcome.peers == unusual.to, "{unusual:?}: {outcome:?}");
    Ok(())
}
