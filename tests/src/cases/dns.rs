//! Captured DNS.

use anyhow::{Result, ensure};

use super::captured;
use crate::{
    agent::Agent,
    slip::{Manner, Slip, Slipping},
};

pub(super) fn unconnected(agent: &Agent) -> Result<()> {
    let bed = captured(agent, "dns", &["--redirect-dns", "--capture-all-dns"])?;
    for servers in [["10.96.0.10:53", "10.96.0.11:53"], ["[fd96::10]:53", "[fd96::11]:53"]] {
        let mut slip = Slip::new(Manner::InTurn, servers[0].parse()?);
        slip.to.push(servers[1].parse()?);
        let slipped = Slipping::start(&bed.pod, &slip)?.go()?;
        let by_the_proxy = slipped.servers == [Ok("dns".to_owned()), Ok("dns".to_owned())];
        ensure!(by_the_proxy && slipped.peers == slip.to, "{slip:?}: {slipped:?}");
    }
    Ok(())
}
