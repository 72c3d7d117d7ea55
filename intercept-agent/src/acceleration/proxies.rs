//! Registers listeners that the proxy opened before the programs were attached. For later ones, the programs do the
//! same in `listen`.

use std::{fs, io};

use intercept_common::{
    acceleration::{JoinSocket, PodCell, kind},
    names,
};

use super::{Acceleration, AccelerationError, map_failed};
use crate::{listeners::Listener, options::Config, sys::Plain};

/// The users and groups of a pod's proxy, as ids of the initial user namespace.
#[derive(Clone, Copy, Debug)]
pub struct Owners<'a> {
    /// User ids.
    pub uids: &'a [u32],
    /// Group ids.
    pub gids: &'a [u32],
}

impl Acceleration {
    /// Registers `listeners`, so that the connections that they accept are joined. Listeners of executables that are
    /// not accepted are left out.
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
    // Owner and group of a socket's inode are fsuid and fsgid of the process that created it.
    let Ok(stat) = rustix::fs::fstat(&listener.fd) else { return false };
    let is_owned = owners.uids.contains(&stat.st_uid) || owners.gids.contains(&stat.st_gid);
    is_owned && executable(listener).is_ok_and(|name| config.accelerate.contains(&name))
}

/// Returns the last component of the executable's path, even if the file has been replaced since.
fn executable(listener: &Listener) -> io::Result<String> {
    const REPLACED: &str = " (deleted)";
    let path = fs::read_link(format!("/proc/{}/exe", listener.pid))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(name.strip_suffix(REPLACED).map_or(name.clone(), str::to_owned))
}
