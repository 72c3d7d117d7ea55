//! The proxy's sockets that listen when a pod is attached.

use std::{collections::HashMap, io, os::fd::AsRawFd as _};

use intercept_common::layout;
use nix::sys::socket::{setsockopt, sockopt};

use super::{Node, NodeError, Target};
use crate::{listeners, options::Config};

impl Node {
    /// Hold the proxy's sockets that listen already, on ports for which none is held.
    pub(super) fn hold_listeners(
        &mut self,
        target: &Target,
        config: &Config,
        slot: u32,
    ) -> Result<(), NodeError> {
        let ports = [config.proxy_port, config.inbound_port];
        let found = listeners::find(&target.netns, &target.cgroup, &ports)
            .map_err(|source| NodeError::Listeners { netns: target.netns.name().to_owned(), source })?;
        for missed in found.missed {
            tracing::warn!(
                address = %missed.address,
                cause = missed.cause.as_ref().map(tracing::field::display),
                "nobody could be found who holds this listener: until it is opened anew, what arrives for it is refused"
            );
        }
        let bound = |family| {
            let mut own =
                found.listeners.iter().filter(|l| l.port == config.proxy_port && l.family == family);
            match own.next() {
                None => layout::proxy::UNKNOWN,
                Some(listener) if listener.addr.is_unspecified() => layout::proxy::WILDCARD,
                Some(_) => layout::proxy::ONE,
            }
        };
        let proxy = layout::Proxy { outbound_v4: bound(4), outbound_v6: bound(6) };
        if proxy != (layout::Proxy { outbound_v4: 0, outbound_v6: 0 }) {
            self.tables.set_proxy(slot, proxy)?;
        }
        // So that they can speak for the guests' addresses; what they accept inherits it.
        if !config.virt_interfaces.is_empty() {
            for listener in found.listeners.iter().filter(|listener| listener.port == config.proxy_port) {
                setsockopt(&listener.fd, sockopt::IpTransparent, &true)
                    .map_err(io::Error::from)
                    .map_err(|source| NodeError::Transparent { port: listener.port, source })?;
            }
        }
        if found.listeners.is_empty() {
            return Ok(());
        }
        let netns = target.netns.cookie();
        let held = self.tables.listeners(netns);
        let mut used = HashMap::<(u16, u8), u8>::new();
        for listener in &found.listeners {
            let (port, family) = (listener.port, listener.family);
            // What is bound to loopback would not get arriving connections from a REDIRECT either.
            if listener.addr.is_loopback() || held.iter().any(|key| key.port == port && key.family == family)
            {
                continue;
            }
            let slot = used.entry((port, family)).or_default();
            if *slot < layout::LISTENER_SLOTS {
                let key = layout::ListenerKey { netns, port, family, slot: *slot, reserved: 0 };
                self.tables.add_listener(key, listener.fd.as_raw_fd())?;
                *slot += 1;
            }
        }
        Ok(())
    }
}
