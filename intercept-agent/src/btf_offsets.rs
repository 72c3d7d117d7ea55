//! Offsets of the kernel's struct members that the programs read, and whether an optional helper exists, from the BTF
//! of the running kernel.

use std::{io, path::Path};

use crate::btf::Btf;

/// Offsets in bytes, with the names of the programs' globals.
pub type Offsets = Vec<(&'static str, u32)>;

/// What the programs of joined connections need to know of the kernel's types.
pub struct JoinTypes {
    /// The offsets.
    pub offsets: Offsets,
    /// The id of `bpf_rdonly_cast`, if the kernel has it.
    pub cast: Option<u32>,
}

/// The global for the id of `tcp_sock`, and the function that gives an address this type (Linux 6.2). The global is 0 without
/// the function.
const CAST: (&str, &str) = ("TCP_SOCK_TYPE", "bpf_rdonly_cast");

/// A member of a kernel struct and the global for its offset.
struct OffsetStep {
    global: &'static str,
    name: &'static str,
    /// A path of nested members, separated by dots.
    member: &'static str,
    /// Absent in some kernel configurations. The global stays 0 then.
    optional: bool,
}

const fn step(global: &'static str, name: &'static str, member: &'static str) -> OffsetStep {
    OffsetStep { global, name, member, optional: false }
}

const fn optional(global: &'static str, name: &'static str, member: &'static str) -> OffsetStep {
    OffsetStep { global, name, member, optional: true }
}

/// The path from a socket to the credentials of its file, and the next sequence number that a connection sends.
const MEMBERS: [OffsetStep; 5] = [
    step("SOCK_SOCKET_OFF", "sock", "sk_socket"),
    step("SOCKET_FILE_OFF", "socket", "file"),
    step("FILE_CRED_OFF", "file", "f_cred"),
    step("CRED_FSUID_OFF", "cred", "fsuid"),
    step("TCP_WRITE_SEQ_OFF", "tcp_sock", "write_seq"),
];

/// The path from a socket to the cgroup that it was created in, and from there to the cgroups around it.
const CGROUP: [OffsetStep; 6] = [
    optional("SOCK_CGROUP_OFF", "sock", "sk_cgrp_data.cgroup"),
    optional("CGROUP_LEVEL_OFF", "cgroup", "level"),
    optional("CGROUP_KN_OFF", "cgroup", "kn"),
    optional("KERNFS_ID_OFF", "kernfs_node", "id"),
    optional("CGROUP_PARENT_OFF", "cgroup", "self.parent"),
    optional("CSS_CGROUP_OFF", "cgroup_subsys_state", "cgroup"),
];

/// The path from the request of a SYN to its listener, and what the request knows. Only shadow mode reads it.
const REQUEST: [OffsetStep; 7] = [
    optional("SKC_LISTENER_OFF", "sock_common", "skc_listener"),
    optional("SKC_NUM_OFF", "sock_common", "skc_num"),
    optional("SKC_DADDR_OFF", "sock_common", "skc_daddr"),
    optional("SKC_RCV_SADDR_OFF", "sock_common", "skc_rcv_saddr"),
    optional("RSK_OPS_OFF", "request_sock", "rsk_ops"),
    optional("RSK_FAMILY_OFF", "request_sock_ops", "family"),
    optional("RCV_ISN_OFF", "tcp_request_sock", "rcv_isn"),
];

/// The global that is set to 1 if the kernel has a helper, and the helper.
const HELPER: (&str, &str) = ("HAS_SET_RETVAL", "BPF_FUNC_set_retval");

/// The first [`MEMBERS`], which the programs of joined connections also read.
const SHARED: usize = 4;

/// Members that only the programs of joined connections read.
const JOIN: [OffsetStep; 21] = [
    step("SKC_STATE", "sock_common", "skc_state"),
    step("SKC_COOKIE", "sock_common", "skc_cookie"),
    step("SK_SHUTDOWN", "sock", "sk_shutdown"),
    step("SK_RCVLOWAT", "sock", "sk_rcvlowat"),
    step("SK_RMEM_ALLOC", "sock", "sk_backlog.rmem_alloc"),
    step("SK_SOCKET", "sock", "sk_socket"),
    optional("SK_MEMCG", "sock", "sk_memcg"),
    step("WRITE_SEQ", "tcp_sock", "write_seq"),
    step("COPIED_SEQ", "tcp_sock", "copied_seq"),
    step("ULP_OPS", "inet_connection_sock", "icsk_ulp_ops"),
    step("SOCKET_FILE", "socket", "file"),
    step("FILE_FLAGS", "file", "f_flags"),
    step("FILE_DENTRY", "file", "f_path.dentry"),
    step("MM_EXE_FILE", "mm_struct", "exe_file"),
    step("TASK_MM", "task_struct", "mm"),
    step("DENTRY_NAME", "dentry", "d_name.name"),
    optional("MEMCG_MEMORY", "mem_cgroup", "memory"),
    optional("MEMCG_TCPMEM", "mem_cgroup", "tcpmem"),
    step("COUNTER_USAGE", "page_counter", "usage"),
    step("COUNTER_MAX", "page_counter", "max"),
    step("COUNTER_PARENT", "page_counter", "parent"),
];

/// The BTF of the running kernel.
pub const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Why the offsets are unknown. Owners are then those of the task that connects, and no connection is joined.
#[derive(Debug, thiserror::Error)]
pub enum OffsetError {
    /// The kernel has no BTF, or it is not readable.
    #[error("reading the kernel's types from {VMLINUX_BTF} (CONFIG_DEBUG_INFO_BTF)")]
    Read(#[source] io::Error),
    /// The kernel's struct has no such member.
    #[error("looking for {member} in the kernel's struct {name}")]
    Missing {
        /// Name of the struct.
        name: &'static str,
        /// Name of the member.
        member: &'static str,
    },
}

/// Looks up the offsets for the capture programs. It takes some milliseconds, and runs only when they are loaded.
pub fn find() -> Result<Offsets, OffsetError> {
    let btf = Btf::read(Path::new(VMLINUX_BTF)).map_err(OffsetError::Read)?;
    let mut offsets = look_up(&btf, MEMBERS.iter().chain(&CGROUP).chain(&REQUEST))?;
    offsets.push((HELPER.0, btf.has_enumerator("bpf_func_id", HELPER.1).into()));
    Ok(offsets)
}

/// Looks up the offsets for the programs of joined connections.
pub fn find_for_joining() -> Result<JoinTypes, OffsetError> {
    let btf = Btf::read(Path::new(VMLINUX_BTF)).map_err(OffsetError::Read)?;
    let mut offsets = look_up(&btf, MEMBERS[..SHARED].iter().chain(&CGROUP).chain(&JOIN))?;
    let cast = btf.function_id(CAST.1);
    let id = cast.and_then(|_| btf.struct_id("tcp_sock")).unwrap_or(0);
    offsets.push((CAST.0, id));
    Ok(JoinTypes { offsets, cast: if id == 0 { None } else { cast } })
}

fn look_up(btf: &Btf, steps: impl Iterator<Item = &'static OffsetStep>) -> Result<Offsets, OffsetError> {
    steps
        .map(|&OffsetStep { global, name, member, optional }| {
            let found = btf.offset_of(name, member).or(optional.then_some(0));
            found.map(|offset| (global, offset)).ok_or(OffsetError::Missing { name, member })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_kernel_tells_where_credentials_are() {
        let offsets = super::find().expect("offsets");
        // The first members of their structs.
        let is_known = |(name, offset): &(&str, u32)| {
            *offset > 0 || ["CSS_CGROUP_OFF", "RSK_FAMILY_OFF", "SKC_DADDR_OFF"].contains(name)
        };
        assert!(offsets.iter().all(is_known), "{offsets:?}");
    }

    #[test]
    fn members_inside_of_others_are_found() {
        let super::JoinTypes { offsets, cast } = super::find_for_joining().expect("offsets");
        let of = |global: &str| offsets.iter().find(|(name, _)| *name == global).expect("listed").1;
        assert_eq!(of("SK_SOCKET"), of("SOCK_SOCKET_OFF"));
        assert_eq!(of("TCP_SOCK_TYPE") > 0, cast.is_some(), "one is of no use without the other");
        for inner in ["SK_RMEM_ALLOC", "FILE_DENTRY", "DENTRY_NAME", "MM_EXE_FILE", "WRITE_SEQ", "COPIED_SEQ"]
        {
            assert!(of(inner) > 0, "{inner}: {offsets:?}");
        }
    }
}
