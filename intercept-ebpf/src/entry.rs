//! One function per hook. This screen shows what each hook returns for each verdict.

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    macros::{cgroup_sock, cgroup_sock_addr, cgroup_sockopt, sk_lookup, sock_ops},
    programs::{SkLookupContext, SockAddrContext, SockContext, SockOpsContext, SockoptContext},
};

use crate::{
    connect,
    context::{V4, V6},
    datagram,
    inbound::{self, Steer},
    lifecycle, mptcp, original,
    verifier::constant,
    workload,
};

/// The system call goes on.
const ALLOW: i32 = 1;
/// The system call fails, with EPERM unless the program has set another error.
const DENY: i32 = 0;

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    connect_verdict(connect::connect::<V4>(&ctx))
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    connect_verdict(connect::connect::<V6>(&ctx))
}

#[inline(always)]
fn connect_verdict(outcome: connect::SyscallVerdict) -> i32 {
    match outcome {
        connect::SyscallVerdict::Proceed => constant::<ALLOW>(),
        connect::SyscallVerdict::Refuse => constant::<DENY>(),
    }
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    connect_verdict(datagram::sendmsg::<V4>(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    connect_verdict(datagram::sendmsg::<V6>(&ctx))
}

// The kernel accepts only ALLOW from the hooks that return an address.

#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    datagram::recvmsg::<V4>(&ctx);
    ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    datagram::recvmsg::<V6>(&ctx);
    ALLOW
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    original::getpeername::<V4>(&ctx);
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    original::getpeername::<V6>(&ctx);
    ALLOW
}

#[cgroup_sock_addr(getsockname4)]
fn getsockname4(ctx: SockAddrContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    original::getsockname::<V4>(&ctx);
    ALLOW
}

#[cgroup_sock_addr(getsockname6)]
fn getsockname6(ctx: SockAddrContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    original::getsockname::<V6>(&ctx);
    ALLOW
}

#[cgroup_sockopt(getsockopt)]
fn getsockopt(ctx: SockoptContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    original::getsockopt(&ctx);
    ALLOW
}

#[cgroup_sock(sock_create)]
fn sock_create(ctx: SockContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    connect_verdict(mptcp::create(&ctx))
}

#[cgroup_sock(sock_release)]
fn sock_release(ctx: SockContext) -> i32 {
    if workload::is_elsewhere(&ctx) {
        return ALLOW;
    }
    lifecycle::closed(&ctx);
    ALLOW
}

#[sock_ops]
fn sock_ops(ctx: SockOpsContext) -> u32 {
    if workload::is_elsewhere(&ctx) {
        return 0;
    }
    lifecycle::callback(&ctx);
    0
}

#[sk_lookup]
// Not named `sk_lookup`: the linker takes that for the name of the section.
fn lookup(ctx: SkLookupContext) -> u32 {
    steer_verdict(inbound::arrive(&ctx))
}

// Reached by tail call from `lookup`.
#[sk_lookup]
fn steer_inbound(ctx: SkLookupContext) -> u32 {
    steer_verdict(inbound::steer(&ctx))
}

#[inline(always)]
fn steer_verdict(outcome: Steer) -> u32 {
    match outcome {
        Steer::Pass | Steer::Assigned => SK_PASS,
        Steer::Drop => SK_DROP,
    }
}
