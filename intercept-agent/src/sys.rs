//! The `bpf()` calls that aya does not offer: links of every kind as plain descriptors (create, update, inspect), pins,
//! and programs and maps that are created at run time. The unsafe code for BPF objects is confined to this file and `load`.

use std::{
    ffi::CString,
    io,
    mem::size_of,
    ops::ControlFlow,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    sync::atomic::{AtomicU16, AtomicU64, Ordering},
};

use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_map_type};

pub use load::{ProgramKind, ProgramLoad, Rejection, load_btf, load_sk_lookup, try_program};
pub use own_cgroups::own_cgroups;

mod load;
mod own_cgroups;

/// A value in a map.
///
/// Implements aya's marker trait for the types of `intercept-common`, which the orphan rule forbids for the types
/// themselves.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Plain<T>(pub T);

// SAFETY: `T` is plain old data, and the wrapper is transparent.
unsafe impl<T: bytemuck::Pod> aya::Pod for Plain<T> {}

fn empty_attr() -> bpf_attr {
    // SAFETY: every variant consists of integers, and the kernel requires unused bytes to be zero.
    unsafe { std::mem::zeroed() }
}

fn call(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: the size is that of the attribute. Its pointers are to memory that the callers below keep alive.
    let ret = unsafe {
        libc::syscall(libc::SYS_bpf, cmd as libc::c_long, std::ptr::from_mut(attr), size_of::<bpf_attr>())
    };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

fn call_for_fd(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = i32::try_from(call(cmd, attr)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Returns freed memory to the kernel. The kernel's BTF and the compiled programs take 10 MB that the daemon would otherwise
/// keep.
pub fn give_back_memory() {
    // SAFETY: no pointers are involved.
    unsafe { libc::malloc_trim(0) };
}

/// Has the allocator keep little. glibc gives each of the daemon's threads an arena of its own, and after a large block
/// was freed it takes blocks of that size from the arenas: what one pod's routes once needed would stay with the daemon. Up to
/// 1 MiB of each arena stays, because giving it back takes a twentieth of the time in which the next pod is captured.
pub fn bound_arenas() {
    const ARENAS: libc::c_int = 2;
    /// glibc's default, which is fixed when it is set.
    const LARGE: libc::c_int = 128 << 10;
    const KEPT: libc::c_int = 1 << 20;
    // SAFETY: no pointers are involved.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// Reads the present content of an open file of the kernel's that is shorter than a page, with one call instead of one for
/// each few bytes. The kernel writes the content again when it is read from the beginning.
pub fn read_again(file: &std::fs::File) -> io::Result<String> {
    let mut bytes = vec![0; 4096];
    let length = std::os::unix::fs::FileExt::read_at(file, &mut bytes, 0)?;
    bytes.truncate(length);
    String::from_utf8(bytes).map_err(io::Error::other)
}

fn path_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Attaches a program to a cgroup or a network namespace. The link lives as long as a descriptor or a pin of it.
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

/// Attaches a program to a map of sockets and replaces its previous one. It stays attached as long as the map exists.
/// Sockets that are already in the map keep the program that was attached when they were added.
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

/// Replaces the program of a link atomically: every packet meets one of the two.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = empty_attr();
    attr.link_update.link_fd = raw(link);
    attr.link_update.__bindgen_anon_1.new_prog_fd = raw(program);
    call(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches a link's program at once. Without this call the kernel detaches it from a work queue, some time after the
/// last descriptor or pin is gone.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = empty_attr();
    attr.link_detach.link_fd = raw(link);
    call(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

/// The target of a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkTarget {
    /// The id of the cgroup; `None` if it has been removed.
    Cgroup(Option<u64>),
    /// The inode of the network namespace; `None` if it is gone.
    Netns(Option<u32>),
    /// A link of another type.
    Other,
}

/// A link's program and target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkInfo {
    /// Id of the attached program.
    pub program: u32,
    /// The target.
    pub target: LinkTarget,
}

/// Reads the info of a link (BPF_OBJ_GET_INFO_BY_FD).
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    const BPF_LINK_TYPE_CGROUP: u32 = 3;
    const BPF_LINK_TYPE_NETNS: u32 = 5;
    // SAFETY: the struct consists of integers.
    let mut info: bpf_link_info = unsafe { std::mem::zeroed() };
    let mut attr = empty_attr();
    attr.info.bpf_fd = raw(link);
    attr.info.info_len = u32::try_from(size_of::<bpf_link_info>()).map_err(io::Error::other)?;
    attr.info.info = std::ptr::from_mut(&mut info) as u64;
    call(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    // SAFETY: the kernel has filled the variant that `type` names.
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

/// Pins a program, map or link at `path`, which must be on a bpffs.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_string(path)?;
    let mut attr = empty_attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = raw(object);
    call(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Opens the object pinned at `path`.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = path_string(path)?;
    let mut attr = empty_attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    call_for_fd(bpf_cmd::BPF_OBJ_GET, &mut attr)
}

/// `c_char` is signed on some architectures and unsigned on others.
fn write_name(to: &mut [std::ffi::c_char; 16], name: &str) {
    for (to, from) in to.iter_mut().zip(name.bytes().take(15)) {
        *to = std::ffi::c_char::from_ne_bytes([from]);
    }
}

/// Creates an array map with one value of `size` bytes, all zero.
pub fn create_array(name: &str, size: usize) -> io::Result<OwnedFd> {
    let mut attr = empty_attr();
    // SAFETY: as above.
    let create = unsafe { &mut attr.__bindgen_anon_1 };
    create.map_type = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    create.key_size = 4;
    create.value_size = u32::try_from(size).map_err(io::Error::other)?;
    create.max_entries = 1;
    write_name(&mut create.map_name, name);
    call_for_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr)
}

/// Creates an array map with one value, `bytes`.
pub fn create_blob(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let map = create_array(name, bytes.len())?;
    write_first(map.as_fd(), bytes)?;
    Ok(map)
}

/// Writes the first value of an array map.
pub fn write_first(map: BorrowedFd<'_>, value: &[u8]) -> io::Result<()> {
    let key = 0u32;
    let mut attr = empty_attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = std::ptr::from_ref(&key) as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_ptr() as u64;
    call(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Makes a map read-only for system calls, so that the verifier takes its values for constants.
pub fn freeze(map: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = empty_attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    call(bpf_cmd::BPF_MAP_FREEZE, &mut attr).map(drop)
}

/// Reads the value of a map of [`create_blob`], `len` bytes long.
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

/// Memory of a batch: more costs more to clear than the calls it saves.
const BATCH_BYTES: usize = 1 << 15;

/// Reads all entries of a hash map or trie, many per call instead of two calls per entry. As with single calls,
/// entries that are inserted or removed meanwhile may or may not be included.
pub fn entries<K: bytemuck::Pod, V: bytemuck::Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut found = Vec::new();
    for_each_batch(map, |keys, values| found.extend(keys.iter().copied().zip(values.iter().copied())))?;
    Ok(found)
}

/// Passes all entries to `take`, in batches.
pub fn for_each_batch<K: bytemuck::Pod, V: bytemuck::Pod>(
    map: BorrowedFd<'_>,
    mut take: impl FnMut(&[K], &[V]),
) -> io::Result<()> {
    batches(map, None, |keys, values| {
        take(keys, values);
        ControlFlow::Continue(())
    })
}

/// Reads batches of entries: those after the key `start`, or all.
fn batches<K: bytemuck::Pod, V: bytemuck::Pod>(
    map: BorrowedFd<'_>,
    start: Option<&[u8]>,
    mut take: impl FnMut(&[K], &[V]) -> ControlFlow<()>,
) -> io::Result<()> {
    let mut room = (BATCH_BYTES / (size_of::<K>() + size_of::<V>())).max(16);
    let mut started = start.is_some();
    // The kernel's cursor: a bucket number for a hash map, a key for a trie.
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
            // One bucket of a hash map has more entries than fit.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && room < 1 << 20 => {
                room *= 8;
                continue;
            }
            Err(_) => return called.map(drop),
        };
        // SAFETY: the kernel writes the number of entries into the same variant.
        let count = unsafe { attr.batch.count } as usize;
        if take(&keys[..count], &values[..count]).is_break() || is_last {
            return Ok(());
        }
        std::mem::swap(&mut at, &mut next);
        started = true;
    }
}

/// Returns the entries of a trie after the key `start`, in the trie's own order, up to the first for which `wanted` is
/// false. In that order a prefix follows the prefixes inside it, so that keys with a common prefix are consecutive.
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
    batches(map, Some(bytemuck::bytes_of(start)), take)?;
    Ok(found)
}

/// The values of an array map with `BPF_F_MMAPABLE`, mapped into this process. Programs and process see each other's
/// writes at once, field by field.
pub struct SharedArray<T> {
    start: std::ptr::NonNull<T>,
    len: usize,
}

// SAFETY: the memory belongs to no thread, and is only shared as atomics.
unsafe impl<T> Send for SharedArray<T> {}

impl<T: bytemuck::Pod> SharedArray<T> {
    /// Maps an array of `len` values. The kernel aligns values to 8 bytes, so the size of `T` must be a multiple of 8.
    ///
    /// # Errors
    /// Those of mmap(2): `EPERM` or `EINVAL` if the map is frozen or was created without `BPF_F_MMAPABLE`.
    pub fn map(map: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let (access, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
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

    /// Returns the 64-bit word at byte `offset` of value `index`. `None` if it is out of range or not aligned.
    pub fn word(&self, index: usize, offset: usize) -> Option<&AtomicU64> {
        // SAFETY: inside the mapping, aligned, and accessed only atomically.
        self.field(index, offset, size_of::<u64>()).map(|at| unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    /// As [`SharedArray::word`], for 16 bits.
    pub fn half_word(&self, index: usize, offset: usize) -> Option<&AtomicU16> {
        // SAFETY: as in `word`.
        self.field(index, offset, size_of::<u16>()).map(|at| unsafe { AtomicU16::from_ptr(at.cast()) })
    }

    /// Sets every word of a value to zero, one after the other.
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
        // SAFETY: this is the mapping of `map`, and no reference into it outlives `self`.
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
