//! Counters of joined connections, and events while `trace` runs.

use aya_ebpf::{bindings::sk_msg_md, programs::SkMsgContext};
use intercept_common::{
    Addr,
    acceleration::{JoinCount, PodCell, TcpReason},
    decide::Owner,
    layout::Event,
};

use crate::{
    context::{AF_INET6, Ends, TCP, load},
    maps,
};

/// Which end of its connection a socket is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Dialled,
    Accepted,
}

/// An executable without a name.
pub(crate) const NO_NAME: [u8; 16] = [0; 16];

/// Counts what became of a connection, and traces it.
#[inline(always)]
pub(crate) fn connection(pod: &PodCell, ends: &Ends, side: Side, what: JoinCount, executable: [u8; 16]) {
    maps::count(pod, what as usize);
    trace(pod, ends, side, what as usize, executable);
}

/// Counts a connection that changes to TCP, and traces it.
#[inline(always)]
pub(crate) fn changes_to_tcp(ctx: &SkMsgContext, pod: &PodCell, side: Side, why: TcpReason) {
    let what = JoinCount::ALL.len() + why as usize;
    maps::count(pod, what);
    if maps::tracing() {
        trace(pod, &message_ends(ctx), side, what, NO_NAME);
    }
}

/// Traces that the connecting end knows its peer. The accepting end has counted it.
#[inline(always)]
pub(crate) fn found_peer(ctx: &SkMsgContext, pod: &PodCell) {
    if maps::tracing() {
        trace(pod, &message_ends(ctx), Side::Dialled, JoinCount::Joined as usize, NO_NAME);
    }
}

#[inline(always)]
fn trace(pod: &PodCell, ends: &Ends, side: Side, what: usize, executable: [u8; 16]) {
    if !maps::tracing() {
        return;
    }
    let inbound = side == Side::Accepted;
    let (src, src_port, dst, dst_port) = if inbound {
        (ends.remote, ends.remote_port, ends.local, ends.local_port)
    } else {
        (ends.local, ends.local_port, ends.remote, ends.remote_port)
    };
    maps::emit(&Event {
        time: maps::now(),
        netns: pod.netns,
        dst,
        src,
        dst_port,
        src_port,
        pid: 0,
        uid: Owner::NONE.uid,
        gid: Owner::NONE.gid,
        reason: 0,
        protocol: TCP as u8,
        inbound: inbound.into(),
        container: 0,
        comm: executable,
        acceleration: what as u32 + 1,
    });
}

/// Both ends of the socket of a message.
#[inline(always)]
fn message_ends(ctx: &SkMsgContext) -> Ends {
    let msg = ctx.msg;
    let mut local = Addr::from_v4(load!(load_u32, sk_msg_md, msg, local_ip4));
    let mut remote = Addr::from_v4(load!(load_u32, sk_msg_md, msg, remote_ip4));
    if load!(load_u32, sk_msg_md, msg, family) == AF_INET6 {
        let address = Addr::from_v6([
            load!(load_u32, sk_msg_md, msg, remote_ip6, 0),
            load!(load_u32, sk_msg_md, msg, remote_ip6, 1),
            load!(load_u32, sk_msg_md, msg, remote_ip6, 2),
            load!(load_u32, sk_msg_md, msg, remote_ip6, 3),
        ]);
        if !address.is_v4() {
            remote = address;
            local = Addr::from_v6([
                load!(load_u32, sk_msg_md, msg, local_ip6, 0),
                load!(load_u32, sk_msg_md, msg, local_ip6, 1),
                load!(load_u32, sk_msg_md, msg, local_ip6, 2),
                load!(load_u32, sk_msg_md, msg, local_ip6, 3),
            ]);
        }
    }
    Ends {
        local,
        local_port: load!(load_u32, sk_msg_md, msg, local_port) as u16,
        remote,
        // As in a callback.
        remote_port: u32::from_be(load!(load_u32, sk_msg_md, msg, remote_port)) as u16,
    }
}
