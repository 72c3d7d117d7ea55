//! What is attached to a cgroup, asked of the kernel directly.

use std::io;

#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    pad: u32,
    rest: [u64; 4],
}

/// How many programs are attached to the cgroup itself at a hook (a `BPF_CGROUP_*` of linux/bpf.h).
pub fn attached(cgroup: i32, hook: u32) -> io::Result<usize> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    let mut query = Query { target: cgroup.cast_unsigned(), attach_type: hook, ..Query::default() };
    // SAFETY: the attribute is of the size given and outlives the call.
    let ret = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, std::ptr::from_mut(&mut query), size_of::<Query>())
    };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(query.count as usize) }
}
