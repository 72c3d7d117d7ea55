//! The proxy's listening sockets: registered when they start to listen, and selected by `sk_lookup` for connections.

use aya_ebpf::{
    bindings::{bpf_sk_lookup, bpf_sock_ops},
    programs::{SkLookupContext, SockOpsContext},
};
use intercept_common::{
    Addr, Family, NetnsCookie,
    failure::Failure,
    layout::{
        APPLICATION_LISTENERS, LISTENER_SEARCH, LISTENER_SLOTS, ListenerKey, LookupScratch, PodPolicy, Proxy,
        Ring, bound, policy, scope,
    },
};

use crate::{
    container,
    context::{self, AF_INET6, Sock, load},
    maps, observe,
    proxy::{ListenerRing, ProxyState},
    shadow,
    verifier::opaque,
    workload,
};

const EEXIST: i32 = 17;
const EOPNOTSUPP: i32 = 95;

/// Runs when a socket starts to listen.
#[inline(always)]
pub(crate) fn listen(ctx: &SockOpsContext) {
    let netns = maps::netns_cookie(ctx);
    let Some(pod) = maps::pod(netns).filter(|pod| !shadow::is_of(pod)) else { return };
    let port = load!(load_u32, bpf_sock_ops, ctx.ops, local_port) as u16;
    let Some(role) = pod.proxy_port(port) else {
        if workload::is_set() && pod.flags & policy::BY_LISTENER != 0 {
            listen_as_application(ctx, netns, pod, port);
        }
        return;
    };
    let Some(proxy) = ProxyState::of(pod.slot) else { return };
    if Sock::of_callback(ctx).is_some_and(|sk| !container::made_socket(pod, sk.as_ptr())) {
        observe::failure_line!(
            ctx,
            netns,
            pod,
            Failure::ForeignListener,
            "a process outside of the proxy's container listens on its port in netns {}: it will get no inbound connections"
        );
        return;
    }
    let local = context::callback_local(ctx.ops);
    let is_v6 = load!(load_u32, bpf_sock_ops, ctx.ops, family) == AF_INET6;
    let family = if is_v6 { Family::V6 } else { Family::V4 };
    // A listener on another loopback address receives no redirected connections under iptables either.
    let scope = if local.is_localhost() {
        scope::LOCALHOST
    } else if local.is_loopback() {
        set_bound(pod, proxy, port, family, bound::ONE);
        return;
    } else {
        scope::ANY
    };
    let key = ListenerKey { netns, port, family: family.version(), scope, slot: 0 };
    let registered = register(ctx.ops, key, proxy.ring(role, family, scope));
    let bound = match (scope, registered) {
        (scope::LOCALHOST, Ok(())) => bound::STEERED,
        (scope::ANY, _) if local.is_unspecified() => bound::WILDCARD,
        _ => bound::ONE,
    };
    set_bound(pod, proxy, port, family, bound);
    let is_mptcp = matches!(registered, Err(error) if error == -EOPNOTSUPP);
    proxy.set_mptcp(role, family, scope, is_mptcp);
    match registered {
        Ok(()) => {}
        Err(_) if is_mptcp => observe::failure_line!(
            ctx,
            netns,
            pod,
            Failure::MptcpListener,
            "registering a listener of netns {}: it is an MPTCP socket, so inbound connections are refused until the proxy listens by TCP"
        ),
        Err(_) => observe::failure_line!(
            ctx,
            netns,
            pod,
            Failure::ListenerNotAdded,
            "registering a listener of netns {}: it will get no inbound connections"
        ),
    }
}

/// Registers a listening socket of a machine's application.
#[inline(always)]
fn listen_as_application(ctx: &SockOpsContext, netns: NetnsCookie, pod: &PodPolicy, port: u16) {
    let mut key = ListenerKey::application(netns, port, context::callback_local(ctx.ops), 0);
    let mut result = Err(-EEXIST);
    for number in 0..APPLICATION_LISTENERS {
        key.scope = scope::APPLICATION + number;
        result = maps::add_listener(ctx.ops, key);
        match result {
            Err(error) if error == -EEXIST => {}
            _ => break,
        }
    }
    match result {
        Ok(()) => {}
        Err(error) if error == -EEXIST => {}
        Err(_) => observe::failure_line!(
            ctx,
            netns,
            pod,
            Failure::ListenerNotAdded,
            "registering a listener of workload {}: its inbound connections go around the proxy"
        ),
    }
}

/// Whether a socket of a machine's workload listens for connections to this address.
#[inline(always)]
pub(crate) fn is_for_application(netns: NetnsCookie, local: Addr, port: u16) -> bool {
    let own = ListenerKey::application(netns, port, local, 0);
    let any_v6 = ListenerKey::application(netns, port, Addr::UNSPECIFIED, 0);
    let any = if local.is_v4() { ListenerKey { family: Family::V4.version(), ..any_v6 } } else { any_v6 };
    let unspecified = Addr::UNSPECIFIED;
    opaque(application_listens(&raw const own, &raw const local)) != 0
        || opaque(application_listens(&raw const any, &raw const unspecified)) != 0
        || opaque(application_listens(&raw const any_v6, &raw const unspecified)) != 0
}

/// Whether one of the sockets with this key is open and bound to this address: 1 or 0. A function of its own, as
/// `search_listeners`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn application_listens(key: *const ListenerKey, bound: *const Addr) -> u64 {
    // SAFETY: as in `search_listeners`.
    let (Some(&(mut key)), Some(&bound)) = (unsafe { (key.as_ref(), bound.as_ref()) }) else { return 0 };
    for number in 0..APPLICATION_LISTENERS {
        key.scope = scope::APPLICATION + number;
        if maps::has_listener(&key, bound) {
            return 1;
        }
    }
    0
}

/// Sets how the listener is bound, for every role that has this port number.
#[inline(always)]
fn set_bound(pod: &PodPolicy, proxy: ProxyState, port: u16, family: Family, bound: u16) {
    for role in pod.proxy_ports(port).into_iter().flatten() {
        proxy.set_bound(role, family, bound);
    }
}

/// Takes the slot of the newest listener if that is closed, so that reopening a port does not use up slots; else the next
/// slot.
#[inline(always)]
fn register(ops: *mut bpf_sock_ops, mut key: ListenerKey, ring: ListenerRing) -> Result<(), i32> {
    /// Open listeners that are passed over to find a free slot. Those ahead are the oldest, of which few are open.
    const TRIES: u32 = 8;
    let top = ring.top();
    if top != 0 {
        key.slot = Ring::slot(top - 1);
        match maps::add_listener(ops, key) {
            Err(error) if error == -EEXIST => {}
            done => return done,
        }
    }
    let mut result = Err(-EEXIST);
    for _ in 0..TRIES {
        key.slot = Ring::slot(ring.take());
        result = maps::add_listener(ops, key);
        match result {
            Err(error) if error == -EEXIST => {}
            _ => break,
        }
    }
    result
}

/// Assigns an arriving connection to one of the proxy's listeners. An IPv6 listener may accept IPv4 as well; if it does
/// not, the kernel refuses the assignment. False if there is no listener.
#[inline(always)]
pub(crate) fn assign(ctx: &SkLookupContext, scratch: &LookupScratch, pod: &PodPolicy) -> bool {
    let Some(proxy) = ProxyState::of(pod.slot) else { return false };
    let (port, index) = ((scratch.listeners >> 16) as u16, scratch.listeners as usize);
    let key = ListenerKey {
        netns: scratch.netns,
        port,
        family: Family::V4.version(),
        scope: index as u8 & 1,
        slot: 0,
    };
    let is_v6 = load!(load_u32, bpf_sk_lookup, ctx.lookup, family) == AF_INET6;
    (!is_v6 && assign_from(ctx, key, proxy.ring_at(index)))
        || assign_from(
            ctx,
            ListenerKey { family: Family::V6.version(), ..key },
            proxy.ring_at(index | Proxy::V6),
        )
}

/// Tries the listener that was found last, then all from the newest on.
#[inline(always)]
fn assign_from(ctx: &SkLookupContext, mut key: ListenerKey, ring: ListenerRing) -> bool {
    let top = ring.top();
    if top == 0 {
        return false;
    }
    key.slot = ring.hint() as u32;
    if maps::assign_listener(ctx, &key).is_ok() {
        return true;
    }
    let found = opaque(search_listeners(ctx.lookup, &raw const key, top as u32));
    if found == 0 {
        return false;
    }
    ring.set_hint(found - 1);
    true
}

/// Assigns a connection to the newest listener below the number `top` that is open. Returns its slot plus 1, or 0 if there is
/// none. A function of its own, so that the verifier walks the loop once (see `verdict.rs`).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn search_listeners(lookup: *mut bpf_sk_lookup, key: *const ListenerKey, top: u32) -> u64 {
    // SAFETY: the verifier checks the size of what a caller passes; a null pointer is none.
    let Some(&(mut key)) = (unsafe { key.as_ref() }) else { return 0 };
    let ctx = SkLookupContext { lookup };
    let mut number = top;
    for _ in 0..LISTENER_SEARCH {
        if number == 0 {
            break;
        }
        number -= 1;
        key.slot = number % LISTENER_SLOTS;
        if maps::assign_listener(&ctx, &key).is_ok() {
            return u64::from(key.slot) + 1;
        }
    }
    0
}
