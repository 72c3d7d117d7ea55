//! The cgroups around this process, from the root of the hierarchy on. In a cgroup namespace no file shows those above the
//! namespace's root; a program that runs once sees them.

use std::{io, os::fd::AsFd as _};

use aya_obj::generated::{bpf_cmd, bpf_prog_type};

use super::{
    ProgramKind, call_for_fd,
    load::{program_attr, run},
};

/// Returns 32 bits of the id of the cgroup at a level around the running task, or 0. The arguments are the level, and the
/// shift of these bits.
const PROGRAM: [[u8; 8]; 5] = [
    [0x79, 0x16, 8, 0, 0, 0, 0, 0],     // r6 = the second argument
    [0x79, 0x11, 0, 0, 0, 0, 0, 0],     // r1 = the first argument
    [0x85, 0, 0, 0, ANCESTOR, 0, 0, 0], // call bpf_get_current_ancestor_cgroup_id
    [0x7f, 0x60, 0, 0, 0, 0, 0, 0],     // r0 >>= r6
    [0x95, 0, 0, 0, 0, 0, 0, 0],        // exit
];
/// `BPF_FUNC_get_current_ancestor_cgroup_id`.
const ANCESTOR: u8 = 123;
/// Far beyond the levels of any hierarchy.
const MAX_LEVEL: u64 = 1024;

/// Returns the ids of the cgroups around this process by their levels: first the root, last its own.
///
/// # Errors
/// Before Linux 5.10 programs of this type cannot be run by a call.
pub fn own_cgroups() -> io::Result<Vec<u64>> {
    let kind =
        ProgramKind { program_type: bpf_prog_type::BPF_PROG_TYPE_RAW_TRACEPOINT as u32, attach_type: 0 };
    let mut attr = program_attr(kind, PROGRAM.as_ptr().cast(), PROGRAM.len())?;
    let program = call_for_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr)?;
    let mut ids = Vec::new();
    for level in 0..MAX_LEVEL {
        let low = run(program.as_fd(), [level, 0])?;
        let high = run(program.as_fd(), [level, 32])?;
        match u64::from(high) << 32 | u64::from(low) {
            0 => break,
            id => ids.push(id),
        }
    }
    Ok(ids)
}
