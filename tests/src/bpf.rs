//! Raw bpf() calls: the programs attached to a cgroup, and runs of a program with an artificial context.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{FromRawFd as _, OwnedFd},
};

#[repr(C)]
#[derive(Default)]
struct ProgQueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    pad: u32,
    rest: [u64; 4],
}

/// The number of programs attached to the cgroup itself at a hook (a `BPF_CGROUP_*` of linux/bpf.h).
pub fn attached(cgroup: i32, hook: u32) -> io::Result<usize> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    let mut query =
        ProgQueryAttr { target: cgroup.cast_unsigned(), attach_type: hook, ..ProgQueryAttr::default() };
    // SAFETY: the attribute is of the size given and outlives the call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_QUERY,
            std::ptr::from_mut(&mut query),
            size_of::<ProgQueryAttr>(),
        )
    };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(query.count as usize) }
}

/// The ids of all links of the kernel.
pub fn links() -> io::Result<Vec<u32>> {
    const BPF_LINK_GET_NEXT_ID: libc::c_long = 31;
    let (mut ids, mut start) = (Vec::new(), 0);
    loop {
        let mut attr: [u32; 3] = [start, 0, 0];
        // SAFETY: the attribute is of the size given and outlives the call.
        let ret = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_LINK_GET_NEXT_ID, attr.as_mut_ptr(), size_of_val(&attr))
        };
        if ret < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::NotFound { Ok(ids) } else { Err(error) };
        }
        start = attr[1];
        ids.push(start);
    }
}

#[repr(C)]
#[derive(Default)]
struct TestRunAttr {
    program: u32,
    result: u32,
    sizes: [u32; 2],
    data: [u64; 2],
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// `struct bpf_sk_lookup` of linux/bpf.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct SkLookupContext {
    cookie: u64,
    family: u32,
    protocol: u32,
    remote_ip4: u32,
    remote_ip6: [u32; 4],
    /// Network order.
    remote_port: u16,
    pad: u16,
    local_ip4: u32,
    local_ip6: [u32; 4],
    /// Host order.
    local_port: u32,
    ingress_ifindex: u32,
}

/// Runs an `sk_lookup` program for a TCP connection. Returns its verdict (0: drop, 1: pass) and the cookie of the socket
/// that it chose, or 0.
pub fn look_up(program: i32, remote: SocketAddrV4, local: SocketAddrV4) -> io::Result<(u32, u64)> {
    const BPF_PROG_TEST_RUN: libc::c_long = 10;
    let mut context = SkLookupContext {
        family: libc::AF_INET.cast_unsigned(),
        protocol: libc::IPPROTO_TCP.cast_unsigned(),
        remote_ip4: remote.ip().to_bits().to_be(),
        remote_port: remote.port().to_be(),
        local_ip4: local.ip().to_bits().to_be(),
        local_port: local.port().into(),
        ..SkLookupContext::default()
    };
    let size = u32::try_from(size_of::<SkLookupContext>()).map_err(io::Error::other)?;
    let address = std::ptr::from_mut(&mut context) as u64;
    let mut run = TestRunAttr {
        program: program.cast_unsigned(),
        context_size_in: size,
        context_size_out: size,
        context_in: address,
        context_out: address,
        ..TestRunAttr::default()
    };
    // SAFETY: the attribute and the context are of the sizes given and outlive the call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_TEST_RUN,
            std::ptr::from_mut(&mut run),
            size_of::<TestRunAttr>(),
        )
    };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok((run.result, context.cookie)) }
}

#[repr(C)]
#[derive(Default)]
struct ProgLoadAttr {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log: [u64; 2],
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    hook: u32,
}

/// Loads a `sock_ops` program that returns at once.
pub fn load_empty() -> io::Result<OwnedFd> {
    // r0 = 1; exit
    load("empty", SOCK_OPS, &[RETURN_1, EXIT].concat())
}

/// Loads a `sock_ops` program that overwrites the socket's callback flags with `BPF_SOCK_OPS_RETRANS_CB_FLAG` in every
/// callback, which disables the callbacks of other programs.
pub fn load_overruling() -> io::Result<OwnedFd> {
    // r2 = 2; call bpf_sock_ops_cb_flags_set; r0 = 1; exit. The context is in r1.
    let call = [0x85, 0, 0, 0, 59, 0, 0, 0];
    load("overruling", SOCK_OPS, &[[0xb7, 2, 0, 0, 2, 0, 0, 0], call, RETURN_1, EXIT].concat())
}

/// Loads a program for `connect()` that dials another IPv4 address instead of any, as those do that balance the load of
/// services.
pub fn load_balancing(to: Ipv4Addr) -> io::Result<OwnedFd> {
    let [a, b, c, d] = to.octets();
    // w2 = to; *(u32 *)(r1 + 4) = r2, which is user_ip4 of bpf_sock_addr; r0 = 1; exit
    let store = [0x63, 0x21, 4, 0, 0, 0, 0, 0];
    load("balancing", CONNECT4, &[[0xb4, 2, 0, 0, a, b, c, d], store, RETURN_1, EXIT].concat())
}

const RETURN_1: [u8; 8] = [0xb7, 0, 0, 0, 1, 0, 0, 0];
const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];

/// Numbers of a type of program and its hook in linux/bpf.h; the first has only one.
const SOCK_OPS: (u32, u32) = (13, 0);
const CONNECT4: (u32, u32) = (18, 10);

fn load(name: &str, (kind, hook): (u32, u32), instructions: &[u8]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    let mut load = ProgLoadAttr {
        kind,
        hook,
        instruction_count: u32::try_from(instructions.len() / 8).map_err(io::Error::other)?,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        ..ProgLoadAttr::default()
    };
    load.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the attribute is of the size given; it and what it points to outlive the call.
    let ret = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, std::ptr::from_mut(&mut load), size_of::<ProgLoadAttr>())
    };
    let fd = i32::try_from(ret).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
}
