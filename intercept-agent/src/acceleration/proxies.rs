//! Listeners of the proxy that were there before the programs: what the callback of `listen` finds out, asked from
//! outside.

use std::{fs, io};

use intercept_common::{
    acceleration::{JoinSocket, PodCell, kind},
    names,
};

use super::{Acceleration, AccelerationError, map_failed};
use crate::{listeners::Listener, options::Config, sys::Plain};

/// The users and groups of a pod's proxy, as the node sees them.
#[derive(Clone, Copy, Debug)]
pub struct Owners<'a> {
    /// Users.
    pub uids: &'a [u32],
    /// Groups.
    pub gids: &'a [u32],
}

impl Acceleration {
    /// Have what these listeners accept from now on be joined, as far as they are known to be safe.
    pub fn adopt(
        &mut self,
        pod: PodCell,
        config: &Config,
        owners: Owners<'_>,
        listeners: &[Listener],
    ) -> Result<(), AccelerationError> {
        let inbound = listeners.iter().filter(|listener| listener.port == config.inbound_port);
        for listener in inbound {
            if !is_known(listener, config, owners) {
                continue;
            }
            let value = JoinSocket { kind: kind::LISTENER, pod, ..JoinSocket::default() };
            self.sockets
                .insert(&listener.fd, Plain(value), 0)
                .map_err(map_failed("adding a listener to", names::JOIN_SOCKETS))?;
        }
        Ok(())
    }
}

fn is_known(listener: &Listener, config: &Config, owners: Owners<'_>) -> bool {
    // The owner of a socket's inode is who made it: fsuid and fsgid of that moment.
    let Ok(stat) = rustix::fs::fstat(&listener.fd) else { return false };
    let is_owned = owners.uids.contains(&stat.st_uid) || owners.gids.contains(&stat.st_gid);
    is_owned && executable(listener).is_ok_and(|name| config.accelerate.contains(&name))
}

/// Last part of the path, also of one that has been replaced since.
fn executable(listener: &Listener) -> io::Result<String> {
    const REPLACED: &str = " (deleted)";
    let path = fs::read_link(format!("/proc/{}/exe", listener.pid))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(name.strip_suffix(REPLACED).map_or(name.clone(), str::to_owned))
}
