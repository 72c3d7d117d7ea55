//! The owner of a socket. The owner match of iptables uses the credentials of the socket's file, that is fsuid and fsgid at
//! the time of `socket()` (xt_owner: `sk->sk_socket->file->f_cred`), not those of the task that connects. They differ after
//! setresuid(), in setuid programs and for sockets passed to another process.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{bpf_sock, tcp_sock},
    helpers::{
        bpf_get_current_uid_gid,
        generated::{bpf_probe_read_kernel, bpf_skc_to_tcp_sock},
    },
};
use intercept_common::decide::Owner;

use crate::context::TCP;

/// Offsets in bytes on the running kernel. The agent fills them in from BTF before it loads the programs. All zero if there
/// is no BTF: then the ids of the task are used.
#[unsafe(no_mangle)]
static SOCK_SOCKET_OFF: u32 = 0;
#[unsafe(no_mangle)]
static SOCKET_FILE_OFF: u32 = 0;
#[unsafe(no_mangle)]
static FILE_CRED_OFF: u32 = 0;
/// fsgid follows fsuid.
#[unsafe(no_mangle)]
static CRED_FSUID_OFF: u32 = 0;

macro_rules! offset {
    ($global:ident) => {
        // SAFETY: reads a static; volatile because the loader replaces its value.
        unsafe { core::ptr::read_volatile(&raw const $global) as usize }
    };
}

/// The owner of a socket of this protocol (`IPPROTO_*`).
#[inline(always)]
pub(crate) fn of(sk: *mut bpf_sock, protocol: u32) -> Owner {
    if offset!(SOCK_SOCKET_OFF) == 0 {
        let ids = bpf_get_current_uid_gid();
        return Owner { uid: ids as u32, gid: (ids >> 32) as u32 };
    }
    if protocol == TCP {
        // SAFETY: the helper accepts any socket and returns null for one that is not TCP.
        let tcp = unsafe { bpf_skc_to_tcp_sock(sk.cast()) };
        return if tcp.is_null() { Owner::NONE } else { of_tcp(tcp) };
    }
    let socket: u64 = follow(address(sk), offset!(SOCK_SOCKET_OFF));
    let file: u64 = follow(socket, offset!(SOCKET_FILE_OFF));
    let cred: u64 = follow(file, offset!(FILE_CRED_OFF));
    if cred == 0 {
        return Owner::NONE;
    }
    let ids: u64 = follow(cred, offset!(CRED_FSUID_OFF));
    Owner { uid: ids as u32, gid: (ids >> 32) as u32 }
}

/// The same with plain loads: the verifier knows the type of this pointer, and the kernel returns zero for memory that cannot
/// be read. Four calls of the helper below would take a tenth of a `connect()`.
#[inline(always)]
fn of_tcp(tcp: *mut tcp_sock) -> Owner {
    let socket: *const u8 = at(tcp.cast(), offset!(SOCK_SOCKET_OFF));
    let file: *const u8 = at(socket, offset!(SOCKET_FILE_OFF));
    let cred: *const u8 = at(file, offset!(FILE_CRED_OFF));
    if cred.is_null() {
        return Owner::NONE;
    }
    let fsuid = offset!(CRED_FSUID_OFF);
    Owner { uid: at(cred, fsuid), gid: at(cred, fsuid + size_of::<u32>()) }
}

/// A member of a kernel struct.
#[inline(always)]
fn at<T>(base: *const u8, offset: usize) -> T {
    // SAFETY: the verifier checks the load against the kernel's BTF; a load from a null pointer returns zero.
    unsafe { base.add(offset).cast::<T>().read() }
}

/// A socket's address as a number. The verifier forbids arithmetic on the pointer ("R3 pointer arithmetic on sock
/// prohibited"), but allows reading it from the stack.
#[inline(always)]
pub(crate) fn address(sk: *mut bpf_sock) -> u64 {
    let pointer = sk;
    follow((&raw const pointer) as u64, 0)
}

/// Eight bytes at an offset from a kernel address. 0 for a null pointer or unreadable memory.
#[inline(always)]
pub(crate) fn follow(base: u64, offset: usize) -> u64 {
    let mut value = 0u64;
    if base != 0 {
        // SAFETY: the helper checks the address that it reads from and fills `value`.
        let read = unsafe {
            bpf_probe_read_kernel(
                (&raw mut value).cast(),
                size_of::<u64>() as u32,
                (base as usize + offset) as *const c_void,
            )
        };
        if read != 0 {
            return 0;
        }
    }
    value
}
