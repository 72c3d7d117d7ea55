//! Registers sockets of the proxy that listen before a pod is attached.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    io,
};

use intercept_common::layout::{LISTENER_SLOTS, ListenerKey, PodPolicy, ProxyPort, bound, scope};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use super::{Node, NodeError, Target};
use crate::{
    cgroup::CgroupDir,
    confinement::explained,
    containers,
    ids::{NetnsCookie, Slot},
    listeners::{self, FoundListeners, Listener, Missed},
    maps::Registered,
    netns::Netns,
    options::Config,
    record::Record,
    store::is_short,
};

impl Node {
    /// Registers the proxy's listening sockets whose inodes are not in `registered`, and adds them to it.
    pub(super) fn register_listeners(
        &mut self,
        target: &Target,
        config: &Config,
        policy: &PodPolicy,
        registered: &mut BTreeSet<u64>,
    ) -> Result<(), NodeError> {
        self.register_listeners_but(target, config, policy, |listener| !registered.insert(listener.inode))
    }

    /// As `register_listeners`, except for those that are known to be registered.
    fn register_listeners_but(
        &mut self,
        target: &Target,
        config: &Config,
        policy: &PodPolicy,
        mut is_known: impl FnMut(&Listener) -> bool,
    ) -> Result<(), NodeError> {
        let ports = [policy.outbound_port, policy.inbound_port, policy.dns_port];
        let found = listeners::find(&target.netns, &target.cgroups(), &ports)
            .map_err(|source| NodeError::Listeners { netns: target.netns.name().to_owned(), source })?;
        for missed in found.missed {
            tracing::warn!(
                address = %missed.address,
                cause = missed.cause.as_ref().map(tracing::field::display),
                "no process was found that has this listener; connections to it are refused until it is opened again"
            );
        }
        let proxies = containers::proxy_processes(config, &target.cgroup, target.origin.pod_uid())?;
        let mut counts: BTreeMap<_, u32> = BTreeMap::new();
        for listener in &found.listeners {
            let Some(port) = policy.proxy_port(listener.port) else { continue };
            target.refuse_outside(listener)?;
            if proxies.as_ref().is_some_and(|proxies| !proxies.contains(&listener.pid)) {
                tracing::warn!(
                    cgroup = %target.cgroup.path().display(),
                    port = listener.port,
                    pid = listener.pid.as_raw_nonzero(),
                    "a process outside of the proxy's container listens on its port: it gets no inbound connections"
                );
                continue;
            }
            if port == ProxyPort::Outbound && !config.virt_interfaces.is_empty() {
                // It can then answer from the guests' addresses. Accepted sockets inherit the option.
                self.make_transparent(policy.slot, listener)?;
            }
            if is_known(listener) {
                continue;
            }
            // Each listener beyond the budget would be tried in every slot, and a pod may have any number of them.
            let count = counts
                .entry((listener.port, listener.family.version(), listener.addr.is_loopback()))
                .or_default();
            *count += 1;
            if *count <= LISTENER_SLOTS + 1 {
                self.register_listener(target, policy, port, listener)?;
            }
        }
        Ok(())
    }

    /// Registers listeners that the programs missed: those of ports without a registered listener. Another capture may
    /// have had them, or the options name another port now.
    pub(super) fn register_unknown(
        &mut self,
        target: &Target,
        config: &Config,
        policy: &PodPolicy,
    ) -> Result<(), NodeError> {
        let cookie = target.netns.cookie();
        let known: BTreeSet<(u16, u8)> =
            self.maps.listeners(cookie)?.iter().map(|key| (key.port, key.family)).collect();
        self.register_listeners_but(target, config, policy, |listener| {
            known.contains(&(listener.port, listener.family.version()))
        })
    }

    fn make_transparent(&self, slot: Slot, listener: &Listener) -> Result<(), NodeError> {
        // If the proxy set the option itself, it stays.
        if getsockopt(&listener.fd, sockopt::IpTransparent) == Ok(true) {
            return Ok(());
        }
        setsockopt(&listener.fd, sockopt::IpTransparent, &true)
            .map_err(io::Error::from)
            .map_err(|source| NodeError::Transparent { port: listener.port, source })?;
        self.maps.set_transparent(slot);
        Ok(())
    }

    /// The proxy's own sockets that the agent has changed.
    pub(super) fn changed_listeners(
        &self,
        record: &Record,
        policy: &PodPolicy,
        netns: &Netns,
    ) -> Result<Vec<Listener>, NodeError> {
        if !self.maps.is_transparent(policy.slot) {
            return Ok(Vec::new());
        }
        let failed = |source| NodeError::Listeners { netns: netns.name().to_owned(), source };
        let find = || {
            let cgroup = CgroupDir::open(&record.cgroup)?;
            let FoundListeners { listeners, missed } =
                listeners::find(netns, &[&cgroup], &[policy.outbound_port]).map_err(failed)?;
            for Missed { address, cause } in missed {
                match cause {
                    Some(source) if is_short(&source) => return Err(NodeError::Listener { address, source }),
                    Some(cause) => stays_transparent(record.cookie, &cause),
                    None => stays_transparent(record.cookie, &"no process was found that has it"),
                }
            }
            Ok(listeners)
        };
        match find() {
            Err(error) if !is_short(&error) => {
                stays_transparent(record.cookie, &explained(&error));
                Ok(Vec::new())
            }
            found => found,
        }
    }

    /// Undoes the changes of the proxy's own sockets.
    pub(super) fn restore_listeners(cookie: NetnsCookie, changed: &[Listener]) {
        for listener in changed {
            if let Err(error) = setsockopt(&listener.fd, sockopt::IpTransparent, &false) {
                stays_transparent(cookie, &error);
            }
        }
    }

    fn register_listener(
        &mut self,
        target: &Target,
        policy: &PodPolicy,
        port: ProxyPort,
        listener: &Listener,
    ) -> Result<(), NodeError> {
        let slot = policy.slot;
        let scope = if listener.is_localhost() {
            scope::LOCALHOST
        } else if listener.addr.is_loopback() {
            // Under the REDIRECT target it receives nothing either.
            self.set_bound(policy, listener, bound::ONE);
            return Ok(());
        } else {
            scope::ANY
        };
        let key = ListenerKey {
            netns: target.netns.cookie(),
            port: listener.port,
            family: listener.family.version(),
            scope,
            slot: 0,
        };
        let registered = self.maps.register_listener(slot, port, key, &listener.fd)?;
        if registered == Registered::Mptcp && port != ProxyPort::Outbound {
            tracing::warn!(
                cgroup = %target.cgroup.path().display(),
                port = listener.port,
                "the proxy's listener is an MPTCP socket, to which the kernel lets no program assign connections: inbound \
                 connections are refused until the proxy is restarted, when it gets TCP"
            );
        }
        if registered == Registered::TooMany {
            tracing::warn!(
                cgroup = %target.cgroup.path().display(),
                port = listener.port,
                limit = LISTENER_SLOTS,
                "the proxy has more listeners on this port than can be registered; the registered ones receive all connections"
            );
        }
        let bound = match (scope, registered) {
            (scope::LOCALHOST, Registered::Yes) => bound::STEERED,
            (scope::ANY, _) if listener.addr.is_unspecified() => bound::WILDCARD,
            _ => bound::ONE,
        };
        self.set_bound(policy, listener, bound);
        Ok(())
    }

    /// Sets how the listener is bound, for every role that has its port.
    fn set_bound(&self, policy: &PodPolicy, listener: &Listener, bound: u16) {
        for role in policy.proxy_ports(listener.port).into_iter().flatten() {
            self.maps.set_bound(policy.slot, role, listener.family, bound);
        }
    }
}

fn stays_transparent(cookie: NetnsCookie, cause: &dyn Display) {
    tracing::warn!(cookie = cookie.0, %cause, "a listener of the proxy stays IP_TRANSPARENT");
}
