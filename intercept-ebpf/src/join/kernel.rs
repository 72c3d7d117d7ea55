//! What the kernel's own structs say of the two ends and of the running task.
//!
//! The sender's socket is one whose type the verifier knows: plain loads. The reader's is an address that was noted
//! when the connection began: it is read by the helper that makes an error of what cannot be read, and what is read
//! counts only if a socket with the noted cookie is there.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{bpf_sock, tcp_sock},
    helpers::generated::{
        bpf_get_current_task, bpf_probe_read_kernel, bpf_probe_read_kernel_str, bpf_skc_to_tcp_sock,
    },
};
use intercept_common::acceleration::{JoinEnd, NAME_LENGTH};

/// Levels of memory cgroups that are looked at, the reader's own first: container, pod, class of service, all pods, and
/// what a distribution has above.
const LEVELS: usize = 6;
/// Pages that a memory cgroup must have free; the kernel charges in batches of 64.
const MARGIN: u64 = 128;

macro_rules! offsets {
    ($($name:ident,)*) => {
        $(/// Offset in bytes on the running kernel, from its BTF; the agent fills it in.
        #[unsafe(no_mangle)]
        static $name: u32 = 0;)*
    };
}
offsets! {
    SKC_STATE, SKC_COOKIE, SK_SHUTDOWN, SK_RCVLOWAT, SK_RMEM_ALLOC, SK_SOCKET, SK_MEMCG, WRITE_SEQ, COPIED_SEQ,
    ULP_OPS, SOCKET_FILE, FILE_FLAGS, FILE_DENTRY, MM_EXE_FILE, TASK_MM, DENTRY_NAME, MEMCG_MEMORY, MEMCG_TCPMEM,
    COUNTER_USAGE, COUNTER_MAX, COUNTER_PARENT,
}

macro_rules! offset {
    ($global:ident) => {
        // SAFETY: reads a static; volatile because the loader replaces its value.
        unsafe { core::ptr::read_volatile(&raw const $global) as usize }
    };
}

/// The sending end, in the hands of the system call that sends.
pub(crate) struct Sender {
    state: u8,
    write_seq: u32,
    upper_layer: u64,
}

impl Sender {
    /// `None` if it is no socket of TCP.
    #[inline(always)]
    pub(crate) fn of(sk: *mut bpf_sock) -> Option<Self> {
        // SAFETY: the helper takes any socket, and gives null for one that is not of TCP.
        let tcp: *const tcp_sock = unsafe { bpf_skc_to_tcp_sock(sk.cast()) };
        if tcp.is_null() {
            return None;
        }
        Some(Self {
            state: typed(tcp, offset!(SKC_STATE)),
            write_seq: typed(tcp, offset!(WRITE_SEQ)),
            upper_layer: typed(tcp, offset!(ULP_OPS)),
        })
    }

    /// Whether TCP would take bytes to be sent, and would send them as they are.
    #[inline(always)]
    pub(crate) fn is_open(&self) -> bool {
        const TCP_ESTABLISHED: u8 = 1;
        const TCP_CLOSE_WAIT: u8 = 8;
        (self.state == TCP_ESTABLISHED || self.state == TCP_CLOSE_WAIT) && self.upper_layer == 0
    }

    /// Whether the other end has read every byte that was given to TCP. SequenceKey numbers of the same connection: of
    /// another one they are equal once in four thousand million times.
    #[inline(always)]
    pub(crate) fn all_read_by(&self, reader: &Reader) -> bool {
        read::<u32>(reader.sock, offset!(COPIED_SEQ)) == Some(self.write_seq)
    }
}

/// A member of a kernel struct whose type the verifier knows.
#[inline(always)]
fn typed<T>(base: *const tcp_sock, offset: usize) -> T {
    // SAFETY: the verifier holds the load against the kernel's types.
    unsafe { base.cast::<u8>().add(offset).cast::<T>().read() }
}

/// The receiving end.
pub(crate) struct Reader {
    sock: u64,
}

impl Reader {
    /// `None` if that socket is gone.
    #[inline(always)]
    pub(crate) fn of(end: &JoinEnd) -> Option<Self> {
        let cookie: u64 = read(end.sock, offset!(SKC_COOKIE))?;
        (cookie == end.cookie).then_some(Self { sock: end.sock })
    }

    /// Whether it takes more: neither closed, nor shut for reading.
    #[inline(always)]
    pub(crate) fn is_open(&self) -> bool {
        const RCV_SHUTDOWN: u8 = 1;
        read::<u8>(self.sock, offset!(SK_SHUTDOWN)).is_some_and(|shut| shut & RCV_SHUTDOWN == 0)
    }

    /// Whether a process has it by a descriptor that does not block.
    #[inline(always)]
    pub(crate) fn is_non_blocking(&self) -> bool {
        const O_NONBLOCK: u32 = 0o4000;
        let flags = read::<u64>(self.sock, offset!(SK_SOCKET))
            .and_then(|socket| read::<u64>(socket, offset!(SOCKET_FILE)))
            .and_then(|file| read::<u32>(file, offset!(FILE_FLAGS)));
        flags.is_some_and(|flags| flags & O_NONBLOCK != 0)
    }

    /// Whether it wants to be woken by any byte.
    #[inline(always)]
    pub(crate) fn wants_any_byte(&self) -> bool {
        read::<i32>(self.sock, offset!(SK_RCVLOWAT)).is_some_and(|bytes| bytes <= 1)
    }

    /// Bytes that wait to be read, TCP's own overhead included.
    #[inline(always)]
    pub(crate) fn unread(&self) -> u32 {
        read(self.sock, offset!(SK_RMEM_ALLOC)).unwrap_or(u32::MAX)
    }

    /// Whether its memory cgroup and those around it have room for so many bytes.
    #[inline(always)]
    pub(crate) fn has_memory(&self, bytes: u32) -> bool {
        if offset!(SK_MEMCG) == 0 {
            return true;
        }
        let memcg: u64 = read(self.sock, offset!(SK_MEMCG)).unwrap_or(0);
        if memcg == 0 {
            return true;
        }
        let pages = u64::from(bytes >> 12) + MARGIN;
        has_room(memcg + offset!(MEMCG_MEMORY) as u64, pages)
            && (offset!(MEMCG_TCPMEM) == 0 || has_room(memcg + offset!(MEMCG_TCPMEM) as u64, pages))
    }
}

#[inline(always)]
fn has_room(mut counter: u64, pages: u64) -> bool {
    for _ in 0..LEVELS {
        let (Some(usage), Some(max), Some(parent)) = (
            read::<u64>(counter, offset!(COUNTER_USAGE)),
            read::<u64>(counter, offset!(COUNTER_MAX)),
            read::<u64>(counter, offset!(COUNTER_PARENT)),
        ) else {
            return false;
        };
        if usage.saturating_add(pages) > max {
            return false;
        }
        if parent == 0 {
            break;
        }
        counter = parent;
    }
    true
}

/// Last part of the path of what the running task executes; all zero if it cannot be told.
#[inline(always)]
pub(crate) fn executable() -> [u8; NAME_LENGTH] {
    let mut name = [0; NAME_LENGTH];
    // SAFETY: takes no argument.
    let task = unsafe { bpf_get_current_task() };
    let path = read::<u64>(task, offset!(TASK_MM))
        .and_then(|mm| read::<u64>(mm, offset!(MM_EXE_FILE)))
        .and_then(|file| read::<u64>(file, offset!(FILE_DENTRY)))
        .and_then(|dentry| read::<u64>(dentry, offset!(DENTRY_NAME)));
    if let Some(path) = path {
        // SAFETY: the helper checks what it reads, and writes no more than it is told to.
        let length = unsafe {
            bpf_probe_read_kernel_str(
                name.as_mut_ptr().cast(),
                NAME_LENGTH as u32,
                path as usize as *const c_void,
            )
        };
        // One that was cut off could be another's.
        if !(0..NAME_LENGTH as i64).contains(&length) {
            name = [0; NAME_LENGTH];
        }
    }
    name
}

/// A member of a kernel struct at an address; `None` from a null pointer or where nothing can be read.
#[inline(always)]
fn read<T: Copy + Default>(base: u64, offset: usize) -> Option<T> {
    let mut value = T::default();
    if base == 0 {
        return None;
    }
    // SAFETY: the helper checks the address that it reads from and fills the value it is given.
    let result = unsafe {
        bpf_probe_read_kernel(
            (&raw mut value).cast(),
            size_of::<T>() as u32,
            (base as usize + offset) as *const c_void,
        )
    };
    (result == 0).then_some(value)
}
