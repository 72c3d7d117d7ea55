//! Captured DNS.

use anyhow::{Result, ensure};

use super::captured;
use crate::{
    agent::Agent,
    unusual::{Method, UnusualProcess, UnusualSocket},
};

pub(super) fn unconnected(agent: &Agent) -> Result<()> {
    let fixture = captured(agent, "dns", &["--redirect-dns", "--capture-all-dns"])?;
    for servers in [["10.96.0.10:53", "10.96.0.11:53"], ["[fd96::10]:53", "[fd96::11]:53"]] {
        let mut unusual = UnusualSocket::new(Method::InTurn, servers[0].parse()?);
        unusual.to.push(servers[1].parse()?);
        let outcome = UnusualProcess::start(&fixture.pod, &unusual)?.go()?;
        let by_the_proxy = outcome.servers == [Ok("dns".to_owned()), Ok("dns".to_owned())];
        ensure!(by_the_proxy && outcome.peers == unusual.to, "{unusual:?}: {outcome:?}");
    }
    Ok(())
}
