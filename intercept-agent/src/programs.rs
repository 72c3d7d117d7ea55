//! Loads the programs. All pods of a node share one set, except for the entry program of `sk_lookup`: that hook cannot
//! tell its namespace, so each pod has an instance with its netns cookie.

use std::{
    cell::OnceCell,
    collections::{HashMap, HashSet, VecDeque},
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::ProgramArray,
    programs::{CgroupSock, CgroupSockAddr, CgroupSockopt, Program, SkLookup, SockOps},
};
use aya_obj::{
    Object,
    generated::{bpf_attach_type, bpf_insn, bpf_prog_type},
};
use intercept_common::{layout::COOKIE_PLACEHOLDER, names};

use crate::{
    btf_offsets,
    ids::NetnsCookie,
    objects::CAPTURE,
    support::{self, Lacking, Missing, Need},
    sys::{self, ProgramKind},
};

/// Why programs cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The kernel lacks a feature that every capture needs.
    #[error(transparent)]
    Lacking(#[from] Lacking),
    /// aya failed to create the maps or to relocate the programs.
    #[error("creating the maps and relocating the programs")]
    Load(#[source] aya::EbpfError),
    /// The kernel refused a program although it lacks none of its features.
    #[error("loading program {name}")]
    Verify {
        /// Name of the program.
        name: &'static str,
        /// The error from the kernel, with the verifier's log.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// The object has no program with a name of the list, or one of another type.
    #[error("the built-in object has no program {0}: the build is inconsistent")]
    Absent(&'static str),
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
    Steer(#[source] Box<aya::maps::MapError>),
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
        // This type has one hook, which is not given at load time.
        names::SOCK_OPS => (bpf_prog_type::BPF_PROG_TYPE_SOCK_OPS, 0),
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
    let mut ebpf = create(maps, Some(max_connections), &[])?;
    let mut loaded = verify_all(&mut ebpf, &[names::CONNECT6, names::CONNECT4, names::STEER_INBOUND]);
    // In the order in which they are needed: what the kernel refuses first is the error.
    for name in [names::STEER_INBOUND].iter().chain(&names::CGROUP_PROGRAMS).copied() {
        if !is_verified(&mut loaded, name, missing)? {
            continue;
        }
        if name == names::STEER_INBOUND {
            publish_steer(&mut ebpf)?;
            continue;
        }
        let program = ebpf.program(name).ok_or(ProgramError::Absent(name))?;
        let fd = program.fd().map_err(|source| ProgramError::Verify { name, source: Box::new(source) })?;
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
    let mut ebpf = create(maps, None, &[("WORKLOAD_ID", workload.0), ("WORKLOAD_NETNS", netns.0)])?;
    let mut loaded = verify_all(&mut ebpf, &[names::CONNECT6, names::CONNECT4]);
    let mut programs = HashMap::new();
    for name in names::CGROUP_PROGRAMS {
        if is_verified(&mut loaded, name, &missing)? {
            let program = ebpf.program(name).ok_or(ProgramError::Absent(name))?;
            let fd = program.fd().and_then(|fd| Ok(fd.as_fd().try_clone_to_owned()?));
            let fd = fd.map_err(|source| ProgramError::Verify { name, source: Box::new(source) })?;
            programs.insert(name, fd);
        }
    }
    Ok(programs)
}

/// Creates the maps that are not pinned yet, and relocates the programs.
fn create(
    maps: &Path,
    max_connections: Option<u32>,
    constants: &[(&'static str, u64)],
) -> Result<Ebpf, ProgramError> {
    let found = btf_offsets::find();
    if let Err(error) = &found {
        tracing::warn!(
            error = error as &dyn std::error::Error,
            "the owner of a connection is the task that connects, not the socket's creator"
        );
    }
    let mut loader = EbpfLoader::new();
    if let Some(max_connections) = max_connections {
        loader.map_max_entries(names::ORIG_DST, max_connections);
    }
    if let Ok(offsets) = &found {
        for (name, offset) in offsets {
            loader.override_global(name, offset, true);
        }
    }
    for (name, value) in constants {
        loader.override_global(name, value, true);
    }
    let paths = names::MAPS.map(|name| (name, maps.join(name)));
    for (name, path) in &paths {
        loader.map_pin_path(name, path.as_path());
    }
    loader.load(CAPTURE).map_err(ProgramError::Load)
}

/// Whether a program was loaded: false if it serves one option and the kernel lacks what it needs.
fn is_verified(
    loaded: &mut Verified<'_>,
    name: &'static str,
    missing: &OnceCell<Vec<Missing>>,
) -> Result<bool, ProgramError> {
    match loaded.remove(name) {
        None => Err(ProgramError::Absent(name)),
        Some(Ok(())) => Ok(true),
        Some(Err(_)) if support::need(name) != Need::Always && lacks(lacking(missing), name) => {
            tracing::debug!(program = name, "not loaded: this kernel lacks what it needs");
            Ok(false)
        }
        Some(Err(source)) => Err(ProgramError::Verify { name, source: Box::new(source) }),
    }
}

/// Most threads that load programs. Nearly all of the time is the verifier's, and nearly all of that is for three programs.
const LOADERS: usize = 3;

type Verified<'a> = HashMap<&'a str, Result<(), aya::programs::ProgramError>>;

/// Loads the programs `first`, which take longest, and all other cgroup programs, side by side: the verifier takes one
/// program per thread.
fn verify_all(ebpf: &mut Ebpf, first: &[&'static str]) -> Verified<'static> {
    let names =
        first.iter().copied().chain(names::CGROUP_PROGRAMS.into_iter().filter(|name| !first.contains(name)));
    let mut programs: HashMap<&str, &mut Program> = ebpf.programs_mut().collect();
    let queue: VecDeque<_> = names.filter_map(|name| Some((name, programs.remove(name)?))).collect();
    let queue = Mutex::new(queue);
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = || {
        let mut done = Verified::new();
        while let Some((name, program)) = next() {
            if let Some(result) = load(program) {
                done.insert(name, result);
            }
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

/// Loads a program. `None` if it is of a type that the agent does not have.
fn load(program: &mut Program) -> Option<Result<(), aya::programs::ProgramError>> {
    Some(match program {
        Program::CgroupSock(program) => CgroupSock::load(program),
        Program::CgroupSockAddr(program) => CgroupSockAddr::load(program),
        Program::CgroupSockopt(program) => CgroupSockopt::load(program),
        Program::SockOps(program) => SockOps::load(program),
        Program::SkLookup(program) => SkLookup::load(program),
        _ => return None,
    })
}

fn lacks(missing: &[Missing], program: &str) -> bool {
    missing.iter().any(|missing| missing.programs.contains(&program))
}

/// Stores the program that all instances of [`names::SK_LOOKUP`] tail-call in the jump table. It replaces that of an earlier
/// build for all pods at once. The pinned map holds it.
fn publish_steer(ebpf: &mut Ebpf) -> Result<(), ProgramError> {
    let name = names::STEER_INBOUND;
    let verify = |source| ProgramError::Verify { name, source: Box::new(source) };
    let program: &SkLookup =
        ebpf.program(name).ok_or(ProgramError::Absent(name))?.try_into().map_err(verify)?;
    let fd = program.fd().and_then(|fd| Ok(fd.try_clone()?)).map_err(verify)?;
    let map = ebpf.map_mut(names::JUMP_TABLE).ok_or(ProgramError::Absent(names::JUMP_TABLE))?;
    ProgramArray::try_from(map)
        .and_then(|mut map| map.set(0, &fd, 0))
        .map_err(|source| ProgramError::Steer(source.into()))
}

/// The `sk_lookup` program, relocated for a node's maps, before a netns cookie is written into it.
pub struct Lookup {
    instructions: Vec<bpf_insn>,
    // Holds the descriptors that the instructions contain as numbers.
    _maps: Vec<OwnedFd>,
}

impl Lookup {
    /// Relocates the program for the maps pinned in `maps`.
    ///
    /// aya's loader would parse the kernel's BTF first, which takes ten times as long.
    pub fn prepare(maps: &Path) -> Result<Self, ProgramError> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| ProgramError::Instance(error);
        let mut object = Object::parse(CAPTURE).map_err(|e| failed(e.into()))?;
        object.programs.retain(|name, _| name == names::SK_LOOKUP);
        let key = object
            .programs
            .get(names::SK_LOOKUP)
            .ok_or(ProgramError::Absent(names::SK_LOOKUP))?
            .function_key();
        let text_sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
        let mut opened = Vec::new();
        for name in object.maps.keys().filter(|name| names::MAPS.contains(&name.as_str())) {
            let fd = sys::open_pin(&maps.join(name)).map_err(|e| failed(e.into()))?;
            opened.push((name.clone(), fd));
        }
        let object_maps = object.maps.clone();
        // Sections that are not pinned maps (the globals) belong to other programs, so any descriptor will do.
        let any = opened.first().map_or(-1, |(_, fd)| fd.as_raw_fd());
        let fds = object_maps.iter().map(|(name, map)| {
            let fd = opened.iter().find(|(opened, _)| opened == name).map_or(any, |(_, fd)| fd.as_raw_fd());
            (name.as_str(), fd, map)
        });
        object.relocate_maps(fds, &text_sections).map_err(|e| failed(e.into()))?;
        object.relocate_calls(&text_sections).map_err(|e| failed(e.into()))?;
        let function = object.functions.remove(&key).ok_or(ProgramError::Absent(names::SK_LOOKUP))?;
        Ok(Self {
            instructions: function.instructions,
            _maps: opened.into_iter().map(|(_, fd)| fd).collect(),
        })
    }

    /// Loads an instance for the namespace with this cookie.
    pub fn load(&self, cookie: NetnsCookie) -> Result<OwnedFd, ProgramError> {
        let mut instructions = self.instructions.clone();
        if !write_cookie(&mut instructions, cookie) {
            let why = "the placeholder of the netns cookie is not in the program";
            return Err(ProgramError::Instance(why.into()));
        }
        sys::load_sk_lookup(names::SK_LOOKUP, &instructions).map_err(ProgramError::InstanceLoad)
    }
}

/// Replaces the placeholder. A 64-bit constant is two instructions, each with one half. False if it is not found.
fn write_cookie(instructions: &mut [bpf_insn], cookie: NetnsCookie) -> bool {
    const LD_IMM64: u8 = 0x18;
    let halves = |value: u64| ((value & 0xffff_ffff) as u32, (value >> 32) as u32);
    let (low, high) = halves(COOKIE_PLACEHOLDER);
    let (new_low, new_high) = halves(cookie.0);
    let mut written = false;
    for at in 1..instructions.len() {
        let [first, second] = &mut instructions[at - 1..=at] else { continue };
        if first.code == LD_IMM64
            && first.src_reg() == 0
            && first.imm.cast_unsigned() == low
            && second.imm.cast_unsigned() == high
        {
            first.imm = new_low.cast_signed();
            second.imm = new_high.cast_signed();
            written = true;
        }
    }
    written
}
