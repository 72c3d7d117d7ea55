//! The `bpf()` calls that aya does not offer: links of every kind as plain descriptors (create, update, inspect), pins,
//! and programs and maps that are made at run time. The only unsafe code of the agent's kernel side is here.

use std::{
    ffi::CString,
    io,
    mem::size_of,
    ops::ControlFlow,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    sync::atomic::{AtomicU16, AtomicU64, Ordering},
};

use aya_obj::generated::{
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_insn, bpf_link_info, bpf_map_type, bpf_prog_type,
};

/// A value that a map holds.
///
/// aya asks for its own marker trait, which cannot be implemented for types of another crate.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Plain<T>(pub T);

// SAFETY: `T` is plain old data, and the wrapper is transparent.
unsafe impl<T: bytemuck::Pod> aya::Pod for Plain<T> {}

fn empty_attr() -> bpf_attr {
    // SAFETY: every variant is made of integers; all zero is what the kernel demands of unused bytes.
    unsafe { std::mem::zeroed() }
}

fn call(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: the attribute is of the size given; pointers in it are to memory that the callers below keep alive.
    let ret = unsafe {
        libc::syscall(libc::SYS_bpf, cmd as libc::c_long, std::ptr::from_mut(attr), size_of::<bpf_attr>())
    };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

fn call_for_fd(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = i32::try_from(call(cmd, attr)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Give freed memory back to the kernel. Reading all of its types takes 20 MB, which an agent that stays would keep.
pub fn give_back_memory() {
    // SAFETY: no pointers are involved.
    unsafe { libc::malloc_trim(0) };
}

fn path_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Attach a program to a cgroup or a namespace. The link lives as long as a descriptor or a pin of it.
pub fn link_create(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attr = empty_attr();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_fd = raw(target);
    attr.link_create.attach_type = attach_type as u32;
    call_for_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// Attach a program to a map of sockets, in place of another. It stays as long as the map; sockets that are in the map
/// already keep the program that they came under.
pub fn attach_to_map(
    program: BorrowedFd<'_>,
    map: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<()> {
    let mut attr = empty_attr();
    // SAFETY: writes of integers to a variant of a union that is all zero.
    let attach = unsafe { &mut attr.__bindgen_anon_5 };
    attach.__bindgen_anon_1.target_fd = raw(map);
    attach.attach_bpf_fd = raw(program);
    attach.attach_type = attach_type as u32;
    call(bpf_cmd::BPF_PROG_ATTACH, &mut attr).map(drop)
}

/// Put another program under a link; no packet sees a moment without one.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = empty_attr();
    attr.link_update.link_fd = raw(link);
    attr.link_update.__bindgen_anon_1.new_prog_fd = raw(program);
    call(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Take a link's program out at once. Without this a link that nobody holds any more goes by a work queue, a while after
/// the last descriptor or pin.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = empty_attr();
    attr.link_detach.link_fd = raw(link);
    call(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

/// What a link holds on to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkTarget {
    /// A cgroup by its id; `None` once it has been removed.
    Cgroup(Option<u64>),
    /// A network namespace by its inode; `None` once it is gone.
    Netns(Option<u32>),
    /// Neither.
    Other,
}

/// A link's program and target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkInfo {
    /// Id of the program under it.
    pub program: u32,
    /// What it is attached to.
    pub target: LinkTarget,
}

/// Ask the kernel about a link.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    const BPF_LINK_TYPE_CGROUP: u32 = 3;
    const BPF_LINK_TYPE_NETNS: u32 = 5;
    // SAFETY: integers only.
    let mut info: bpf_link_info = unsafe { std::mem::zeroed() };
    let mut attr = empty_attr();
    attr.info.bpf_fd = raw(link);
    attr.info.info_len = u32::try_from(size_of::<bpf_link_info>()).map_err(io::Error::other)?;
    attr.info.info = std::ptr::from_mut(&mut info) as u64;
    call(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    // SAFETY: the kernel filled the variant that the type names.
    let target = unsafe {
        match info.type_ {
            BPF_LINK_TYPE_CGROUP => {
                LinkTarget::Cgroup(Some(info.__bindgen_anon_1.cgroup.cgroup_id).filter(|&id| id != 0))
            }
            BPF_LINK_TYPE_NETNS => {
                LinkTarget::Netns(Some(info.__bindgen_anon_1.netns.netns_ino).filter(|&ino| ino != 0))
            }
            _ => LinkTarget::Other,
        }
    };
    Ok(LinkInfo { program: info.prog_id, target })
}

/// Pin a program, map or link.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_string(path)?;
    let mut attr = empty_attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = raw(object);
    call(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Open what is pinned at a path.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = path_string(path)?;
    let mut attr = empty_attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    call_for_fd(bpf_cmd::BPF_OBJ_GET, &mut attr)
}

/// What a program is, to the kernel: its type and its hook.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ProgramKind {
    /// `BPF_PROG_TYPE_*`.
    pub program_type: u32,
    /// `BPF_*` of the hook that the kernel wants to know of when it loads the program; 0 if it does not.
    pub attach_type: u32,
}

/// What the programs' own sections say, without which many helpers cannot be called.
const LICENSE: &std::ffi::CStr = c"Dual MIT/GPL";

/// The attributes of a program without its name; the code must live as long as they do.
fn program_attr(kind: ProgramKind, code: *const u8, instructions: usize) -> io::Result<bpf_attr> {
    let mut attr = empty_attr();
    // SAFETY: writes of integers to a variant of a union that is all zero.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.prog_type = kind.program_type;
    load.expected_attach_type = kind.attach_type;
    load.insn_cnt = u32::try_from(instructions).map_err(io::Error::other)?;
    load.insns = code as u64;
    load.license = LICENSE.as_ptr() as u64;
    Ok(attr)
}

/// Load a program of `sk_lookup`. Its BTF is left out: nothing needs it, and there is one instance a pod.
pub fn load_sk_lookup(name: &str, instructions: &[bpf_insn]) -> io::Result<OwnedFd> {
    let kind = ProgramKind {
        program_type: bpf_prog_type::BPF_PROG_TYPE_SK_LOOKUP as u32,
        attach_type: bpf_attach_type::BPF_SK_LOOKUP as u32,
    };
    let mut attr = program_attr(kind, instructions.as_ptr().cast(), instructions.len())?;
    // SAFETY: as above.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    write_name(&mut load.prog_name, name);
    call_for_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr)
}

/// See whether the kernel takes a program of this code, in its own encoding; if not, with the verifier's log, which is
/// empty if it did not come to that.
pub fn try_program(kind: ProgramKind, code: &[u8]) -> Result<(), (io::Error, String)> {
    let plain = |error| (error, String::new());
    let mut log = vec![0u8; 4096];
    let mut attr = program_attr(kind, code.as_ptr(), code.len() / size_of::<bpf_insn>()).map_err(plain)?;
    // SAFETY: as above.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.log_buf = log.as_mut_ptr() as u64;
    load.log_size = u32::try_from(log.len()).map_err(io::Error::other).map_err(plain)?;
    load.log_level = 1;
    call_for_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr).map(drop).map_err(|error| {
        let text = log.split(|byte| *byte == 0).next().unwrap_or_default();
        (error, String::from_utf8_lossy(text).into_owned())
    })
}

/// Names are C's characters, whose sign differs between architectures.
fn write_name(to: &mut [std::ffi::c_char; 16], name: &str) {
    for (to, from) in to.iter_mut().zip(name.bytes().take(15)) {
        *to = std::ffi::c_char::from_ne_bytes([from]);
    }
}

/// A map of one value that holds these bytes.
pub fn create_blob(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = empty_attr();
    // SAFETY: as above.
    let create = unsafe { &mut attr.__bindgen_anon_1 };
    create.map_type = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    create.key_size = 4;
    create.value_size = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    create.max_entries = 1;
    write_name(&mut create.map_name, name);
    let map = call_for_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr)?;
    let key = 0u32;
    let mut attr = empty_attr();
    attr.__bindgen_anon_2.map_fd = raw(std::os::fd::AsFd::as_fd(&map));
    attr.__bindgen_anon_2.key = std::ptr::from_ref(&key) as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = bytes.as_ptr() as u64;
    call(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr)?;
    Ok(map)
}

/// The bytes of such a map, `len` of them: the size that it was made with.
pub fn read_blob(map: BorrowedFd<'_>, len: usize) -> io::Result<Vec<u8>> {
    let key = 0u32;
    let mut bytes = vec![0u8; len];
    let mut attr = empty_attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = std::ptr::from_ref(&key) as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = bytes.as_mut_ptr() as u64;
    call(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr)?;
    Ok(bytes)
}

/// All entries of a hash map or trie, a thousand a call: one by one they are two calls each. Entries that come or go
/// meanwhile may be in it or not, as with one by one.
pub fn entries<K: bytemuck::Pod, V: bytemuck::Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut found = Vec::new();
    for_each_batch(map, |keys, values| found.extend(keys.iter().copied().zip(values.iter().copied())))?;
    Ok(found)
}

/// All entries, some at a time.
pub fn for_each_batch<K: bytemuck::Pod, V: bytemuck::Pod>(
    map: BorrowedFd<'_>,
    mut take: impl FnMut(&[K], &[V]),
) -> io::Result<()> {
    batches(map, None, 1024, |keys, values| {
        take(keys, values);
        ControlFlow::Continue(())
    })
}

/// Entries, `room` at a time: those after `start`, or all.
fn batches<K: bytemuck::Pod, V: bytemuck::Pod>(
    map: BorrowedFd<'_>,
    start: Option<&[u8]>,
    mut room: usize,
    mut take: impl FnMut(&[K], &[V]) -> ControlFlow<()>,
) -> io::Result<()> {
    let mut started = start.is_some();
    // Where to go on: a number for a hash map, a key for a trie.
    let mut at = start.map_or_else(|| vec![0u8; size_of::<K>().max(4)], <[u8]>::to_vec);
    let mut next = at.clone();
    loop {
        let mut keys = vec![K::zeroed(); room];
        let mut values = vec![V::zeroed(); room];
        let mut attr = empty_attr();
        attr.batch.in_batch = if started { at.as_ptr() as u64 } else { 0 };
        attr.batch.out_batch = next.as_mut_ptr() as u64;
        attr.batch.keys = keys.as_mut_ptr() as u64;
        attr.batch.values = values.as_mut_ptr() as u64;
        attr.batch.count = u32::try_from(room).map_err(io::Error::other)?;
        attr.batch.map_fd = raw(map);
        let called = call(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr);
        let is_last = match &called {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            // A bucket of a hash map has more than there is room for.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && room < 1 << 20 => {
                room *= 8;
                continue;
            }
            Err(_) => return called.map(drop),
        };
        // SAFETY: the kernel has written the count back to where it was read from.
        let count = unsafe { attr.batch.count } as usize;
        if take(&keys[..count], &values[..count]).is_break() || is_last {
            return Ok(());
        }
        std::mem::swap(&mut at, &mut next);
        started = true;
    }
}

/// The entries of a trie that come after this key in the trie's own order, as long as they are wanted. That order is the
/// one in which prefixes come after those inside them, so that all with a common beginning follow each other.
pub fn entries_after<K: bytemuck::Pod, V: bytemuck::Pod>(
    map: BorrowedFd<'_>,
    start: &K,
    wanted: impl Fn(&K) -> bool,
) -> io::Result<Vec<(K, V)>> {
    let mut found = Vec::new();
    let take = |keys: &[K], values: &[V]| {
        let its = keys.iter().position(|key| !wanted(key)).unwrap_or(keys.len());
        found.extend(keys[..its].iter().copied().zip(values.iter().copied()));
        if its < keys.len() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    batches(map, Some(bytemuck::bytes_of(start)), 256, take)?;
    Ok(found)
}

/// The values of an array map made with `BPF_F_MMAPABLE`, in this process's own memory: what the programs write is seen
/// here and the other way round, field by field.
pub struct SharedArray<T> {
    start: std::ptr::NonNull<T>,
    len: usize,
}

// SAFETY: the memory belongs to no thread. It is only handed out as a pointer.
unsafe impl<T> Send for SharedArray<T> {}

impl<T: bytemuck::Pod> SharedArray<T> {
    /// Map all of an array of `len` values. `T` is as long as a multiple of 8, as the kernel lays them out.
    ///
    /// # Errors
    /// Those of mmap(): `EPERM` or `EINVAL` if the map is not one that can be shared.
    pub fn map(map: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let (access, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping, where the kernel wants it.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len * size_of::<T>(), access, shared, map.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start =
            std::ptr::NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start, len })
    }

    /// A word of a value, `offset` bytes into it. `None` if there is no such value, or no such word of 64 bits in it.
    pub fn word(&self, index: usize, offset: usize) -> Option<&AtomicU64> {
        // SAFETY: inside the mapping, aligned, and shared by atomic operations only.
        self.field(index, offset, size_of::<u64>()).map(|at| unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    /// The same for 16 bits.
    pub fn half_word(&self, index: usize, offset: usize) -> Option<&AtomicU16> {
        // SAFETY: as in `word`.
        self.field(index, offset, size_of::<u16>()).map(|at| unsafe { AtomicU16::from_ptr(at.cast()) })
    }

    /// Set every word of a value to zero, one by one.
    pub fn clear(&self, index: usize) {
        for word in (0..size_of::<T>()).step_by(size_of::<u64>()).filter_map(|at| self.word(index, at)) {
            word.store(0, Ordering::Relaxed);
        }
    }

    fn field(&self, index: usize, offset: usize, size: usize) -> Option<*mut u8> {
        let inside = index < self.len && offset.is_multiple_of(size) && offset + size <= size_of::<T>();
        // SAFETY: inside the mapping.
        inside.then(|| unsafe { self.start.as_ptr().add(index).cast::<u8>().add(offset) })
    }
}

impl<T> Drop for SharedArray<T> {
    fn drop(&mut self) {
        // SAFETY: what `map` has mapped, and nothing borrows from it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len * size_of::<T>()) };
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, os::fd::AsFd as _};

    use super::*;

    fn hash_map(max_entries: u32) -> OwnedFd {
        let mut attr = empty_attr();
        // SAFETY: writes of integers to a variant of a union that is all zero.
        let create = unsafe { &mut attr.__bindgen_anon_1 };
        create.map_type = bpf_map_type::BPF_MAP_TYPE_HASH as u32;
        (create.key_size, create.value_size, create.max_entries) = (4, 8, max_entries);
        call_for_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr).expect("root makes maps")
    }

    fn insert(map: &OwnedFd, key: u32, value: u64) {
        let mut attr = empty_attr();
        attr.__bindgen_anon_2.map_fd = raw(map.as_fd());
        attr.__bindgen_anon_2.key = std::ptr::from_ref(&key) as u64;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = std::ptr::from_ref(&value) as u64;
        call(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).expect("there is room");
    }

    #[test]
    fn all_entries_are_read_each_once() {
        for count in [0, 1, 1023, 1024, 1025, 5000] {
            let map = hash_map(8192);
            let expected: BTreeMap<u32, u64> = (0..count).map(|n| (n, u64::from(n) << 32)).collect();
            for (key, value) in &expected {
                insert(&map, *key, *value);
            }
            let found = entries::<u32, u64>(map.as_fd()).expect("read");
            assert_eq!(found.len(), expected.len());
            assert_eq!(found.into_iter().collect::<BTreeMap<_, _>>(), expected);
        }
    }
}
