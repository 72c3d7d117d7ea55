//! Reads of the kernel's own structs: the two sockets of a connection and the running task.
//!
//! The verifier knows the type of the sender's socket, so its members are plain loads. The reader's socket is an address
//! stored when the connection was established. What is read there is used only if the socket at that address has the stored
//! cookie. See [`KernelStruct`] for how.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{bpf_sock, tcp_sock},
    helpers::generated::{
        bpf_get_current_task, bpf_probe_read_kernel, bpf_probe_read_kernel_str, bpf_skc_to_tcp_sock,
    },
};
use intercept_common::acceleration::{JoinEnd, NAME_LENGTH, RDONLY_CAST};

/// Levels of memory cgroups that are checked, starting with the reader's own: container, pod, QoS class, all pods, and two
/// for what a distribution has above.
const LEVELS: usize = 6;
/// Pages that a memory cgroup must have free; the kernel charges in batches of 64.
const MARGIN: u64 = 128;

macro_rules! offsets {
    ($($name:ident,)*) => {
        $(/// Offset in bytes on the running kernel. The agent fills it in from BTF.
        #[unsafe(no_mangle)]
        static $name: u32 = 0;)*
    };
}
offsets! {
    SKC_STATE, SKC_COOKIE, SK_SHUTDOWN, SK_RCVLOWAT, SK_RMEM_ALLOC, SK_SOCKET, SK_MEMCG, WRITE_SEQ, COPIED_SEQ,
    ULP_OPS, SOCKET_FILE, FILE_FLAGS, FILE_DENTRY, MM_EXE_FILE, TASK_MM, DENTRY_NAME, MEMCG_MEMORY, MEMCG_TCPMEM,
    COUNTER_USAGE, COUNTER_MAX, COUNTER_PARENT, TCP_SOCK_TYPE,
}

macro_rules! offset {
    ($global:ident) => {
        // SAFETY: reads a static; volatile because the loader replaces its value.
        unsafe { core::ptr::read_volatile(&raw const $global) as usize }
    };
}

/// The sending end. Its lock is held by the system call that sends.
pub(crate) struct Sender {
    state: u8,
    write_seq: u32,
    upper_layer: u64,
}

impl Sender {
    /// `None` if this is not a TCP socket.
    #[inline(always)]
    pub(crate) fn of(sk: *mut bpf_sock) -> Option<Self> {
        // SAFETY: the helper accepts any socket and returns null for one that is not TCP.
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

    /// Whether TCP accepts bytes for sending and sends them unmodified.
    #[inline(always)]
    pub(crate) fn is_open(&self) -> bool {
        const TCP_ESTABLISHED: u8 = 1;
        const TCP_CLOSE_WAIT: u8 = 8;
        (self.state == TCP_ESTABLISHED || self.state == TCP_CLOSE_WAIT) && self.upper_layer == 0
    }

    /// Whether the reader has read every byte that was sent by TCP. Sequence numbers of two different connections are equal
    /// with a probability of 2^-32.
    #[inline(always)]
    pub(crate) fn all_read_by(&self, reader: &Reader) -> bool {
        reader.sock.member::<u32>(offset!(COPIED_SEQ)) == Some(self.write_seq)
    }
}

/// A member of a kernel struct whose type the verifier knows.
#[inline(always)]
fn typed<T>(base: *const tcp_sock, offset: usize) -> T {
    // SAFETY: the verifier checks the load against the kernel's BTF.
    unsafe { base.cast::<u8>().add(offset).cast::<T>().read() }
}

/// The address of a kernel struct, whose memory may be freed or in use for something else.
///
/// Since Linux 6.2, `bpf_rdonly_cast` tells the verifier the type of an address. Its members are then plain loads, which give
/// 0 where memory cannot be read. On older kernels `bpf_probe_read_kernel` reads each member, which takes 40 ns.
#[derive(Clone, Copy)]
struct KernelStruct(u64);

impl KernelStruct {
    #[inline(always)]
    fn tcp_sock(address: u64) -> Self {
        let id = offset!(TCP_SOCK_TYPE) as u32;
        if id == 0 {
            return Self(address);
        }
        // SAFETY: the agent replaces this call with one of `bpf_rdonly_cast`, which takes any address.
        let cast: unsafe extern "C" fn(u64, u32) -> u64 =
            unsafe { core::mem::transmute(RDONLY_CAST as usize) };
        // SAFETY: as above.
        Self(unsafe { cast(address, id) })
    }

    /// `None` for a null pointer. Unreadable memory is `None` by the helper and 0 by a plain load.
    #[inline(always)]
    fn member<T: Copy + Default>(self, offset: usize) -> Option<T> {
        if offset!(TCP_SOCK_TYPE) == 0 {
            return read(self.0, offset);
        }
        if self.0 == 0 {
            return None;
        }
        // SAFETY: the verifier checks the load against the kernel's BTF, and the kernel handles its faults.
        Some(unsafe { core::ptr::read_volatile((self.0 as usize + offset) as *const T) })
    }

    /// The struct that a member points to.
    #[inline(always)]
    fn follow(self, offset: usize) -> Option<Self> {
        self.member(offset).map(Self)
    }
}

/// The receiving end.
pub(crate) struct Reader {
    sock: KernelStruct,
}

impl Reader {
    /// `None` if the socket no longer exists.
    #[inline(always)]
    pub(crate) fn of(end: &JoinEnd) -> Option<Self> {
        let sock = KernelStruct::tcp_sock(end.sock);
        let cookie: u64 = sock.member(offset!(SKC_COOKIE))?;
        (cookie == end.cookie).then_some(Self { sock })
    }

    /// Whether it still receives: neither closed nor shut down for reading.
    #[inline(always)]
    pub(crate) fn is_open(&self) -> bool {
        const RCV_SHUTDOWN: u8 = 1;
        self.sock.member::<u8>(offset!(SK_SHUTDOWN)).is_some_and(|shut| shut & RCV_SHUTDOWN == 0)
    }

    /// Whether a process holds it by a non-blocking descriptor.
    #[inline(always)]
    pub(crate) fn is_non_blocking(&self) -> bool {
        const O_NONBLOCK: u32 = 0o4000;
        let flags = self
            .sock
            .follow(offset!(SK_SOCKET))
            .and_then(|socket| socket.follow(offset!(SOCKET_FILE)))
            .and_then(|file| file.member::<u32>(offset!(FILE_FLAGS)));
        flags.is_some_and(|flags| flags & O_NONBLOCK != 0)
    }

    /// Whether a single byte wakes it (SO_RCVLOWAT).
    #[inline(always)]
    pub(crate) fn wants_any_byte(&self) -> bool {
        self.sock.member::<i32>(offset!(SK_RCVLOWAT)).is_some_and(|bytes| bytes <= 1)
    }

    /// Unread bytes, including TCP's overhead.
    #[inline(always)]
    pub(crate) fn unread(&self) -> u32 {
        self.sock.member(offset!(SK_RMEM_ALLOC)).unwrap_or(u32::MAX)
    }

    /// Whether its memory cgroup and the ancestors of that have room for `bytes`.
    #[inline(always)]
    pub(crate) fn has_memory(&self, bytes: u32) -> bool {
        if offset!(SK_MEMCG) == 0 {
            return true;
        }
        let memcg: u64 = self.sock.member(offset!(SK_MEMCG)).unwrap_or(0);
        if memcg == 0 {
            return true;
        }
        let pages = u64::from(bytes >> 12) + MARGIN;
        has_room(KernelStruct(memcg + offset!(MEMCG_MEMORY) as u64), pages)
            && (offset!(MEMCG_TCPMEM) == 0
                || has_room(KernelStruct(memcg + offset!(MEMCG_TCPMEM) as u64), pages))
    }
}

#[inline(always)]
fn has_room(mut counter: KernelStruct, pages: u64) -> bool {
    for _ in 0..LEVELS {
        let (Some(usage), Some(max), Some(parent)) = (
            counter.member::<u64>(offset!(COUNTER_USAGE)),
            counter.member::<u64>(offset!(COUNTER_MAX)),
            counter.follow(offset!(COUNTER_PARENT)),
        ) else {
            return false;
        };
        if usage.saturating_add(pages) > max {
            return false;
        }
        if parent.0 == 0 {
            break;
        }
        counter = parent;
    }
    true
}

/// Last component of the running task's executable, padded with NUL; all zero if it is not known.
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
        // SAFETY: the helper checks the address that it reads from and writes at most the given length.
        let length = unsafe {
            bpf_probe_read_kernel_str(
                name.as_mut_ptr().cast(),
                NAME_LENGTH as u32,
                path as usize as *const c_void,
            )
        };
        // A truncated name could match another executable.
        if !(0..NAME_LENGTH as i64).contains(&length) {
            name = [0; NAME_LENGTH];
        }
    }
    name
}

/// A member of a kernel struct at an address. `None` for a null pointer or unreadable memory.
#[inline(always)]
fn read<T: Copy + Default>(base: u64, offset: usize) -> Option<T> {
    let mut value = T::default();
    if base == 0 {
        return None;
    }
    // SAFETY: the helper checks the address that it reads from and fills `value`.
    let result = unsafe {
        bpf_probe_read_kernel(
            (&raw mut value).cast(),
            size_of::<T>() as u32,
            (base as usize + offset) as *const c_void,
        )
    };
    (result == 0).then_some(value)
}
