//! The one list of names: maps are named by content, programs by hook. The kernel keeps 15 bytes of a name
//! (`BPF_OBJ_NAME_LEN`).

/// Netns cookie to [`crate::layout::PodPolicy`]: the master switch. Nothing is captured in a namespace without an entry.
pub const POLICIES: &str = "POLICIES";
/// Longest-prefix trie over (policy, address) to [`crate::layout::Destination`].
pub const DESTINATIONS: &str = "DESTINATIONS";
/// Longest-prefix trie over (policy, port) to the lists that contain the port.
pub const PORTS: &str = "PORTS";
/// (policy, gid), for `ISTIO_OUTBOUND_OWNER_GROUPS` and `ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE`.
pub const GROUPS: &str = "GROUPS";
/// (policy, interface index) to the lists that contain the interface.
pub const INTERFACES: &str = "INTERFACES";
/// (cookie, port, family, scope, slot) to a listening socket of the proxy.
pub const LISTENERS: &str = "LISTENERS";
/// (cookie, 4-tuple) to the original destination of a redirected connection.
pub const ORIG_DST: &str = "ORIG_DST";
/// Socket storage: of TCP from the connect hook to the connect callback, and of redirected UDP sockets.
pub const SOCKETS: &str = "SOCKETS";
/// Socket storage: the DNS servers that a UDP socket has asked besides its first.
pub const DNS_SERVERS: &str = "DNS_SERVERS";
/// Socket storage: the entry of [`ORIG_DST`] to delete when the socket is closed, for sockets whose callbacks another
/// program has switched off.
pub const RELEASES: &str = "RELEASES";
/// One cell: the program [`STEER_INBOUND`], which every pod's [`SK_LOOKUP`] tail-calls.
pub const JUMP_TABLE: &str = "JUMP_TABLE";
/// Per CPU, one cell: passes the pod of a lookup from [`SK_LOOKUP`] to [`STEER_INBOUND`].
pub const LOOKUP_SCRATCH: &str = "LOOKUP_SCRATCH";
/// Initial sequence number to a redirected connection during its handshake.
pub const HANDSHAKES: &str = "HANDSHAKES";
/// Slot to the state of the pod's proxy and connections.
pub const PROXY_STATE: &str = "PROXY_STATE";
/// Slot to per-CPU counts by reason.
pub const COUNTERS: &str = "COUNTERS";
/// Ring buffer of decisions, for `trace`.
pub const EVENTS: &str = "EVENTS";
/// One cell: whether [`EVENTS`] has a reader.
pub const TRACING: &str = "TRACING";

/// Shadow mode: connections until they are compared.
pub const SHADOW_CONNS: &str = "SHADOW_CONNS";
/// Shadow mode: queries, and the interfaces of arriving connections, until they are compared.
pub const SHADOW_FLOWS: &str = "SHADOW_FLOWS";
/// Shadow mode: decisions until the SYN leaves.
pub const SHADOW_DIALS: &str = "SHADOW_DIALS";
/// Shadow mode, socket storage: the decision on a socket of UDP until it is compared.
pub const SHADOW_SOCKETS: &str = "SHADOW_SOCKETS";
/// Shadow mode: netns cookie to counts of agreement.
pub const SHADOW_COUNTERS: &str = "SHADOW_COUNTERS";
/// Shadow mode: each kind of difference with an example.
pub const SHADOW_KINDS: &str = "SHADOW_KINDS";
/// One cell: nonzero while a pod of this node is in shadow mode.
pub const SHADOWING: &str = "SHADOWING";

/// Ring buffer of log lines; aya-log chose the name.
pub const LOGS: &str = "AYA_LOGS";

/// Every map that is shared by all pods of a node and pinned.
pub const MAPS: [&str; 25] = [
    LOGS,
    POLICIES,
    DESTINATIONS,
    PORTS,
    GROUPS,
    INTERFACES,
    LISTENERS,
    ORIG_DST,
    SOCKETS,
    DNS_SERVERS,
    RELEASES,
    JUMP_TABLE,
    LOOKUP_SCRATCH,
    HANDSHAKES,
    PROXY_STATE,
    COUNTERS,
    EVENTS,
    TRACING,
    SHADOW_CONNS,
    SHADOW_FLOWS,
    SHADOW_DIALS,
    SHADOW_SOCKETS,
    SHADOW_COUNTERS,
    SHADOW_KINDS,
    SHADOWING,
];

/// `cgroup/connect4`.
pub const CONNECT4: &str = "connect4";
/// `cgroup/connect6`.
pub const CONNECT6: &str = "connect6";
/// `cgroup/getpeername4`.
pub const GETPEERNAME4: &str = "getpeername4";
/// `cgroup/getpeername6`.
pub const GETPEERNAME6: &str = "getpeername6";
/// `cgroup/getsockname4`.
pub const GETSOCKNAME4: &str = "getsockname4";
/// `cgroup/getsockname6`.
pub const GETSOCKNAME6: &str = "getsockname6";
/// `cgroup/sendmsg4`.
pub const SENDMSG4: &str = "sendmsg4";
/// `cgroup/sendmsg6`.
pub const SENDMSG6: &str = "sendmsg6";
/// `cgroup/recvmsg4`.
pub const RECVMSG4: &str = "recvmsg4";
/// `cgroup/recvmsg6`.
pub const RECVMSG6: &str = "recvmsg6";
/// `cgroup/getsockopt`.
pub const GETSOCKOPT: &str = "getsockopt";
/// `sock_ops`.
pub const SOCK_OPS: &str = "sock_ops";
/// `cgroup/sock_create`.
pub const SOCK_CREATE: &str = "sock_create";
/// `cgroup/sock_release`.
pub const SOCK_RELEASE: &str = "sock_release";
/// `sk_lookup`: one instance per pod, because the hook cannot ask for the netns cookie. It identifies the pod and
/// tail-calls [`STEER_INBOUND`]. It is small because every attach loads it. The linker takes `sk_lookup` for the name of
/// the section.
pub const SK_LOOKUP: &str = "lookup";
/// `sk_lookup`, shared by all pods, reached by tail call.
pub const STEER_INBOUND: &str = "steer_inbound";

/// `sock_ops` of the object that joins connections: pairs the two ends.
pub const JOIN_OPS: &str = "join_ops";
/// `sk_msg` of that object: decides for each message.
pub const JOIN_MSG: &str = "join_msg";
/// Socket storage: the state of a proxy's connection that may be joined.
pub const JOIN_SOCKETS: &str = "JOIN_SOCKETS";
/// Socket cookie to socket: the ends that may be joined. [`JOIN_MSG`] is attached to it.
pub const JOIN_ENDS: &str = "JOIN_ENDS";
/// Sequence numbers to ends that wait for their peer.
pub const JOIN_OFFERS: &str = "JOIN_OFFERS";
/// Hash of the source to connections whose SYN has just arrived at an accelerated pod.
pub const JOIN_HINTS: &str = "JOIN_HINTS";
/// By hash of pod and destination: connections that ended after one message.
pub const JOIN_SHORT: &str = "JOIN_SHORT";
/// Slot to the netns cookie of an accelerated pod, or 0.
pub const JOIN_PODS: &str = "JOIN_PODS";
/// (netns cookie, executable) of the proxies whose connections may be joined.
pub const JOIN_PROXIES: &str = "JOIN_PROXIES";
/// One cell: nonzero while joining is switched off on this node.
pub const JOIN_OFF: &str = "JOIN_OFF";
/// Slot to per-CPU counts.
pub const JOIN_COUNTERS: &str = "JOIN_COUNTERS";

/// The maps of the object that joins connections, pinned beside the others by the first accelerated pod. The object also
/// uses [`POLICIES`].
pub const JOIN_MAPS: [&str; 9] = [
    JOIN_SOCKETS,
    JOIN_ENDS,
    JOIN_OFFERS,
    JOIN_HINTS,
    JOIN_SHORT,
    JOIN_PODS,
    JOIN_PROXIES,
    JOIN_OFF,
    JOIN_COUNTERS,
];

/// The self-test's `sk_msg`, and its maps: the joined ends, the number of joined messages, and whether the next messages
/// go by TCP. They are in an object of their own and never pinned.
pub const SK_MSG: &str = "trial";
/// See [`SK_MSG`].
pub const PEERS: &str = "PEERS";
/// See [`SK_MSG`].
pub const JOINED: &str = "JOINED";
/// See [`SK_MSG`].
pub const BY_TCP: &str = "BY_TCP";

/// The programs that are attached to a pod's cgroup, in this order.
pub const CGROUP_PROGRAMS: [&str; 14] = [
    SOCK_OPS,
    SOCK_CREATE,
    SOCK_RELEASE,
    GETSOCKOPT,
    GETPEERNAME4,
    GETPEERNAME6,
    GETSOCKNAME4,
    GETSOCKNAME6,
    RECVMSG4,
    RECVMSG6,
    SENDMSG4,
    SENDMSG6,
    CONNECT4,
    CONNECT6,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_what_the_kernel_keeps() {
        for name in MAPS.iter().chain(&CGROUP_PROGRAMS).chain(&JOIN_MAPS).chain(&[
            SK_LOOKUP,
            STEER_INBOUND,
            JOIN_OPS,
            JOIN_MSG,
        ]) {
            assert!(name.len() <= 15, "{name}");
        }
    }
}
