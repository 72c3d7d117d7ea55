//! The attached programs, queried from the kernel instead of from the agent.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use anyhow::{Context, Result};
use aya_obj::generated::{bpf_attach_type, bpf_cmd};

use crate::testbed::Sandbox;

const BPF_F_QUERY_EFFECTIVE: u32 = 1;

/// `bpf_attr.query` of linux/bpf.h.
#[repr(C)]
#[derive(Default)]
struct EffectiveQueryAttr {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    reserved: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// The number of programs at each hook that has any: those that run for processes of a cgroup, including those of its
/// ancestors, and sk_lookup in its namespace.
pub fn attached(sandbox: &Sandbox) -> Result<Vec<(String, u32)>> {
    let mut found = Vec::new();
    let cgroup = File::open(sandbox.cgroup.path()).context("opening the cgroup")?;
    for hook in HOOKS {
        // A namespace has no ancestors, so its own programs are the effective ones.
        let (target, flags) = match hook {
            bpf_attach_type::BPF_SK_LOOKUP => (sandbox.netns.as_fd(), 0),
            _ => (cgroup.as_fd(), BPF_F_QUERY_EFFECTIVE),
        };
        match query(target, hook, flags).with_context(|| format!("asking for programs of {hook:?}"))? {
            0 => {}
            count => found.push((format!("{hook:?}"), count)),
        }
    }
    Ok(found)
}

/// All hooks that the agent might use, and more.
const HOOKS: [bpf_attach_type; 19] = [
    bpf_attach_type::BPF_CGROUP_INET_INGRESS,
    bpf_attach_type::BPF_CGROUP_INET_EGRESS,
    bpf_attach_type::BPF_CGROUP_INET_SOCK_CREATE,
    bpf_attach_type::BPF_CGROUP_SOCK_OPS,
    bpf_attach_type::BPF_CGROUP_INET4_BIND,
    bpf_attach_type::BPF_CGROUP_INET6_BIND,
    bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
    bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
    bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
    bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
    bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG,
    bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG,
    bpf_attach_type::BPF_CGROUP_GETSOCKOPT,
    bpf_attach_type::BPF_CGROUP_SETSOCKOPT,
    bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
    bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
    bpf_attach_type::BPF_CGROUP_INET4_GETSOCKNAME,
    bpf_attach_type::BPF_CGROUP_INET6_GETSOCKNAME,
    bpf_attach_type::BPF_SK_LOOKUP,
];

fn query(target: BorrowedFd<'_>, hook: bpf_attach_type, flags: u32) -> std::io::Result<u32> {
    let mut query = EffectiveQueryAttr {
        target_fd: target.as_raw_fd().cast_unsigned(),
        attach_type: hook as u32,
        query_flags: flags,
        ..EffectiveQueryAttr::default()
    };
    // SAFETY: the kernel writes only to the query, whose size it gets. Without room for ids it writes their number.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            bpf_cmd::BPF_PROG_QUERY as libc::c_long,
            std::ptr::from_mut(&mut query),
            size_of::<EffectiveQueryAttr>(),
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(query.prog_cnt) }
}
