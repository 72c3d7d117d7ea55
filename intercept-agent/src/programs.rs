//! Loads the programs. All pods of a node share one set, except for the entry program of `sk_lookup`: that hook cannot
//! tell its namespace, so each pod has an instance with its netns cookie ([`Lookup`]).

mod lookup;

use std::{
    cell::OnceCell,
    collections::{HashMap, VecDeque},
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
};

use aya_obj::generated::{bpf_attach_type, bpf_prog_type};
use intercept_common::names;

use crate::{
    btf_offsets,
    ids::NetnsCookie,
    loader::{LoadError, LoadOptions, Loaded},
    objects::CAPTURE,
    support::{self, Lacking, Missing, Need},
    sys::{self, ProgramKind},
};

pub use lookup::Lookup;

/// Why programs cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The kernel lacks a feature that every capture needs.
    #[error(transparent)]
    Lacking(#[from] Lacking),
    /// The maps cannot be created, or the kernel refused a program although it lacks none of its features.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A program cannot be pinned.
    #[error("pinning program {name} in {dir}")]
    Pin {
        /// Name of the program.
        name: &'static str,
        /// Directory in bpffs.
        dir: String,
        /// The error from the kernel.
        #[source]
        source: io::Error,
    },
    /// The program cannot be stored in the map from which the per-pod instances call it.
    #[error("storing program {} in map {}", names::STEER_INBOUND, names::JUMP_TABLE)]
    Steer(#[source] io::Error),
    /// The per-pod instance cannot be made from the object.
    #[error("preparing program {} for a pod", names::SK_LOOKUP)]
    Instance(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernel refused the per-pod instance.
    #[error("loading program {} for a pod", names::SK_LOOKUP)]
    InstanceLoad(#[source] io::Error),
}

/// Returns the hook that a cgroup program attaches to.
pub fn attach_type(program: &str) -> bpf_attach_type {
    match program {
        names::CONNECT4 => bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
        names::CONNECT6 => bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
        names::GETPEERNAME4 => bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
        names::GETPEERNAME6 => bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
        names::GETSOCKNAME4 => bpf_attach_type::BPF_CGROUP_INET4_GETSOCKNAME,
        names::GETSOCKNAME6 => bpf_attach_type::BPF_CGROUP_INET6_GETSOCKNAME,
        names::SENDMSG4 => bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
        names::SENDMSG6 => bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
        names::RECVMSG4 => bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG,
        names::RECVMSG6 => bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG,
        names::GETSOCKOPT => bpf_attach_type::BPF_CGROUP_GETSOCKOPT,
        names::SOCK_OPS | names::JOIN_OPS => bpf_attach_type::BPF_CGROUP_SOCK_OPS,
        names::SOCK_CREATE => bpf_attach_type::BPF_CGROUP_INET_SOCK_CREATE,
        names::SOCK_RELEASE => bpf_attach_type::BPF_CGROUP_INET_SOCK_RELEASE,
        names::SK_LOOKUP | names::STEER_INBOUND => bpf_attach_type::BPF_SK_LOOKUP,
        other => unreachable!("{other} is not in the list of programs"),
    }
}

/// Returns type and hook of a program.
pub fn kind(program: &str) -> ProgramKind {
    let (program_type, attach_type) = match program {
        // These types have one hook, which is not given at load time.
        names::SOCK_OPS | names::JOIN_OPS => (bpf_prog_type::BPF_PROG_TYPE_SOCK_OPS, 0),
        names::JOIN_MSG => (bpf_prog_type::BPF_PROG_TYPE_SK_MSG, 0),
        names::GETSOCKOPT => (bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCKOPT, attach_type(program) as u32),
        names::SOCK_CREATE | names::SOCK_RELEASE => {
            (bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK, attach_type(program) as u32)
        }
        names::SK_LOOKUP | names::STEER_INBOUND => {
            (bpf_prog_type::BPF_PROG_TYPE_SK_LOOKUP, attach_type(program) as u32)
        }
        _ => (bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR, attach_type(program) as u32),
    };
    ProgramKind { program_type: program_type as u32, attach_type }
}

/// Default for the most redirected connections that a node stores. An entry uses memory only while its connection
/// lives.
pub const DEFAULT_MAX_CONNECTIONS: u32 = 1 << 20;

/// Loads the shared programs with the maps pinned in `maps`, which are created if they are missing, and pins them in
/// `programs`. A program that serves one option is left out if the kernel lacks what it needs.
pub fn load_shared(maps: &Path, programs: &Path, max_connections: u32) -> Result<(), ProgramError> {
    let missing = OnceCell::new();
    load_all(maps, programs, max_connections, &missing).map_err(|error| {
        // A missing feature usually first fails as something else: a map, a relocation or a verification.
        Lacking::for_any(lacking(&missing)).map_or(error, ProgramError::Lacking)
    })
}

/// Returns what this kernel lacks, from a single probe.
fn lacking(missing: &OnceCell<Vec<Missing>>) -> &[Missing] {
    missing.get_or_init(|| {
        support::missing().unwrap_or_else(|error| {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "probing for the features that this kernel lacks"
            );
            Vec::new()
        })
    })
}

fn load_all(
    maps: &Path,
    programs: &Path,
    max_connections: u32,
    missing: &OnceCell<Vec<Missing>>,
) -> Result<(), ProgramError> {
    let object = create(maps, Some(max_connections), &[])?;
    let mut verified = verify_all(&object, &[names::CONNECT6, names::CONNECT4, names::STEER_INBOUND]);
    // In the order in which they are needed: what the kernel refuses first is the error.
    for name in [names::STEER_INBOUND].iter().chain(&names::CGROUP_PROGRAMS).copied() {
        let Some(fd) = take(&mut verified, name, missing)? else { continue };
        if name == names::STEER_INBOUND {
            publish_steer(&object, fd.as_fd())?;
            continue;
        }
        sys::pin(fd.as_fd(), &programs.join(name)).map_err(|source| ProgramError::Pin {
            name,
            dir: programs.display().to_string(),
            source,
        })?;
    }
    Ok(())
}

/// Loads a set of the cgroup programs for a workload of a machine, with the maps pinned in `maps`. `netns` is the cookie of
/// the host's namespace. Only links hold them.
pub fn load_for_workload(
    maps: &Path,
    workload: NetnsCookie,
    netns: NetnsCookie,
) -> Result<HashMap<&'static str, OwnedFd>, ProgramError> {
    let missing = OnceCell::new();
    let object = create(maps, None, &[("WORKLOAD_ID", workload.0), ("WORKLOAD_NETNS", netns.0)])?;
    let mut verified = verify_all(&object, &[names::CONNECT6, names::CONNECT4]);
    let mut programs = HashMap::new();
    for name in names::CGROUP_PROGRAMS {
        if let Some(program) = take(&mut verified, name, &missing)? {
            programs.insert(name, program);
        }
    }
    Ok(programs)
}

/// Creates the maps that are not pinned yet, and relocates the programs.
fn create(
    maps: &Path,
    max_connections: Option<u32>,
    constants: &[(&'static str, u64)],
) -> Result<Loaded, ProgramError> {
    let found = btf_offsets::find();
    if let Err(error) = &found {
        tracing::warn!(
            error = error as &dyn std::error::Error,
            "the owner of a connection is the task that connects, not the socket's creator"
        );
    }
    let offsets = found.unwrap_or_default();
    let offsets = offsets.iter().map(|(name, offset)| (*name, bytemuck::bytes_of(offset)));
    let constants = constants.iter().map(|(name, value)| (*name, bytemuck::bytes_of(value)));
    let sizes = max_connections.map(|size| (names::ORIG_DST, size));
    let options = LoadOptions {
        pins: maps,
        pinned: &names::MAPS,
        constants: &offsets.chain(constants).collect::<Vec<_>>(),
        sizes: sizes.as_slice(),
    };
    Ok(Loaded::new(CAPTURE, options)?)
}

/// Takes a loaded program. `None` if it serves one option and the kernel lacks what it needs.
fn take(
    verified: &mut Verified,
    name: &'static str,
    missing: &OnceCell<Vec<Missing>>,
) -> Result<Option<OwnedFd>, ProgramError> {
    match verified.remove(name).ok_or(LoadError::Absent(name))? {
        Ok(program) => Ok(Some(program)),
        Err(_) if support::need(name) != Need::Always && lacks(lacking(missing), name) => {
            tracing::debug!(program = name, "not loaded: this kernel lacks what it needs");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Most threads that load programs. Nearly all of the time is the verifier's, and nearly all of that is for three programs.
const LOADERS: usize = 3;

type Verified = HashMap<&'static str, Result<OwnedFd, LoadError>>;

/// Loads the programs `first`, which take longest, and all other cgroup programs, side by side: the verifier takes one
/// program per thread.
fn verify_all(object: &Loaded, first: &[&'static str]) -> Verified {
    let others = names::CGROUP_PROGRAMS.into_iter().filter(|name| !first.contains(name));
    let queue = Mutex::new(first.iter().copied().chain(others).collect::<VecDeque<_>>());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = || {
        let mut done = Verified::new();
        while let Some(name) = next() {
            done.insert(name, object.load(name, kind(name)));
        }
        done
    };
    let loaders = thread::available_parallelism().map_or(1, usize::from).min(LOADERS);
    thread::scope(|scope| {
        let others: Vec<_> = (1..loaders).map(|_| scope.spawn(work)).collect();
        let mut done = work();
        for other in others {
            match other.join() {
                Ok(more) => done.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    })
}

fn lacks(missing: &[Missing], program: &str) -> bool {
    missing.iter().any(|missing| missing.programs.contains(&program))
}

/// Stores the program that all instances of [`names::SK_LOOKUP`] tail-call in the jump table. It replaces that of an earlier
/// build for all pods at once. The pinned map holds it.
fn publish_steer(object: &Loaded, program: BorrowedFd<'_>) -> Result<(), ProgramError> {
    let number = program.as_raw_fd().to_ne_bytes();
    sys::write_first(object.map(names::JUMP_TABLE)?, &number).map_err(ProgramError::Steer)
}
