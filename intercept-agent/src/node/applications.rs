//! Registers listening sockets of a machine's applications that listen before the attach. They tell which inbound
//! connections are the workload's.

use std::collections::BTreeMap;

use intercept_common::{
    Addr,
    layout::{ListenerKey, PodPolicy, policy},
};

use super::{Node, NodeError, Target};
use crate::{listeners, maps::Registered};

impl Node {
    /// Registers the listening sockets of the workload's processes.
    pub(super) fn register_applications(
        &mut self,
        target: &Target,
        policy: &PodPolicy,
    ) -> Result<(), NodeError> {
        if policy.flags & policy::BY_LISTENER == 0 {
            return Ok(());
        }
        let cookie = target.netns.cookie();
        let proxy = [policy.outbound_port, policy.inbound_port, policy.dns_port];
        let found = listeners::find_all(&target.netns, &target.cgroups(), &proxy)
            .map_err(|source| NodeError::Listeners { netns: target.netns.name().to_owned(), source })?;
        for missed in found.missed {
            tracing::warn!(
                address = %missed.address,
                cause = missed.cause.as_ref().map(tracing::field::display),
                "whether this listener is of the workload could not be seen: its inbound connections go around the proxy until \
                 it is opened again"
            );
        }
        let key = |addr, port| ListenerKey::application(cookie, port, addr, 0);
        let mut known = BTreeMap::<_, usize>::new();
        for registered in self.maps.listeners(cookie)?.into_iter().filter(ListenerKey::is_application) {
            *known.entry((registered.port, registered.family, registered.slot)).or_default() += 1;
        }
        let mut sockets = BTreeMap::<_, Vec<_>>::new();
        for listener in &found.listeners {
            let key = key(Addr::from(listener.addr), listener.port);
            // Of an IPv6 socket on the wildcard address, sock_diag tells the address but not that it is not IPv4.
            let family = if listener.addr.is_unspecified() { listener.family.version() } else { key.family };
            let key = ListenerKey { family, ..key };
            sockets.entry((key.port, key.family, key.slot)).or_default().push((key, listener));
        }
        for (place, sockets) in sockets {
            // The programs may have registered some that opened since, and which is not known.
            if known.get(&place).is_some_and(|known| *known >= sockets.len()) {
                continue;
            }
            for (key, listener) in sockets {
                if self.maps.register_application(key, &listener.fd)? == Registered::Mptcp {
                    tracing::warn!(
                        port = listener.port,
                        pid = listener.pid.as_raw_nonzero(),
                        "this listener is an MPTCP socket, which no map of sockets accepts: its inbound connections go around the \
                         proxy until the process is restarted, when it gets TCP"
                    );
                }
            }
        }
        Ok(())
    }
}
