//! The pod's network namespace: how it is opened, distinguished from the node's own, and entered (`visit.rs`).

mod visit;

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;

use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::process::Pid;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use self::visit::Visit;
use crate::cgroup::{CgroupDir, CgroupError};
use crate::ids::NetnsCookie;
use crate::support::{self, Lacking};
use crate::sys;

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS_MAGIC: u64 = 0x6e73_6673;
/// The inode of the initial network namespace since Linux 6.18 (`NET_NS_INIT_INO`). Earlier kernels give no namespace
/// such a low number.
const FIRST_INODE: u64 = 0xeffffff9;
/// The cookie of the initial network namespace before Linux 6.18. Later kernels give it to none.
const FIRST_COOKIE: NetnsCookie = NetnsCookie(1);

/// A network namespace: a pod's, or for a machine's workload the host's own. The open file keeps it alive.
#[derive(Debug)]
pub struct Netns {
    file: File,
    name: String,
    inode: u64,
    cookie: NetnsCookie,
    kernel_cookie: NetnsCookie,
    counters: OnceLock<SocketCounters>,
}

/// `sockstat` and `sockstat6` of a namespace, held open. A kernel without IPv6 has only the first.
type SocketCounters = Vec<File>;

/// Why a network namespace is refused or cannot be entered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetnsError {
    /// The file cannot be opened.
    #[error(
        "opening network namespace {name}; check that the pod still exists and that this process has access to it"
    )]
    Open {
        /// Path of the namespace.
        name: String,
        /// The error from the kernel.
        source: io::Error,
    },
    /// The file is not a network namespace.
    #[error("{name} is not a network namespace; give a path such as /proc/PID/ns/net or /run/netns/NAME")]
    NotNetns {
        /// Path of the namespace.
        name: String,
    },
    /// The namespace is the node's own or that of this process.
    #[error(
        "{name} is {whose} network namespace and not a pod's; pods with hostNetwork: true cannot be captured; --machine \
         captures the host itself or chosen cgroups of it"
    )]
    Host {
        /// Path of the namespace.
        name: String,
        /// Which of the two.
        whose: Whose,
    },
    /// A namespace cannot be created.
    #[error("creating a network namespace; this needs CAP_SYS_ADMIN")]
    Make {
        /// The error from the kernel.
        source: io::Error,
    },
    /// The namespace cannot be entered.
    #[error("entering network namespace {name}; this needs CAP_SYS_ADMIN")]
    Enter {
        /// Path of the namespace.
        name: String,
        /// The error from the kernel.
        source: io::Error,
    },
    /// The kernel lacks a feature that every capture needs.
    #[error(transparent)]
    Lacking(#[from] Lacking),
    /// The netns cookie cannot be read.
    #[error("reading the cookie of network namespace {name}")]
    Cookie {
        /// Path of the namespace.
        name: String,
        /// The error from the kernel.
        source: io::Error,
    },
    /// The owning user namespace cannot be read.
    #[error("asking for the user namespace that owns network namespace {name}")]
    Owner {
        /// Path of the namespace.
        name: String,
        /// The error from the kernel.
        source: io::Error,
    },
    /// The cgroup is empty, so that its namespace is unknown.
    #[error("cgroup {} has no processes, so its network namespace is not known; pass --netns", cgroup.display())]
    NoProcess {
        /// Path of the cgroup.
        cgroup: PathBuf,
    },
    /// The processes of the cgroup are in more than one namespace.
    #[error("the processes of cgroup {} are in several network namespaces ({}); pass --netns", cgroup.display(), list(found))]
    Several {
        /// Path of the cgroup.
        cgroup: PathBuf,
        /// The inode of each namespace and one process in it.
        found: Vec<(u64, Pid)>,
    },
    /// The cgroup cannot be read.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// The owner of a namespace that must not be captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The initial network namespace, or that of PID 1.
    Node,
    /// The namespace of this process.
    Own,
}

impl fmt::Display for Whose {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Node => "the node's own",
            Self::Own => "this process's own",
        })
    }
}

/// Whether the namespace that this process is in may be opened.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OwnNetns {
    Refuse,
    Allow,
}

impl Netns {
    /// Opens the namespace at `path`.
    ///
    /// # Errors
    /// [`NetnsError::Host`] if it is the node's own or that of this process.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NetnsError> {
        Self::admit(path.as_ref(), OwnNetns::Refuse)
    }

    /// Opens the namespace of process `pid`, as [`Netns::open`] does.
    pub fn of_process(pid: Pid) -> Result<Self, NetnsError> {
        Self::open(path_of(pid))
    }

    /// Opens the namespace of this process, for an init container, which runs inside the pod. Only the node's own is
    /// refused.
    pub fn own() -> Result<Self, NetnsError> {
        Self::admit(Path::new("/proc/thread-self/ns/net"), OwnNetns::Allow)
    }

    /// Opens the namespace that every process of `cgroup` is in, as [`Netns::open`] does.
    pub fn of_cgroup(cgroup: &CgroupDir) -> Result<Self, NetnsError> {
        let found = in_cgroup(cgroup)?;
        match found.as_slice() {
            [(_, pids)] => Self::of_process(pids[0]),
            _ => {
                let found = found.into_iter().map(|(inode, pids)| (inode, pids[0])).collect();
                Err(NetnsError::Several { cgroup: cgroup.path().to_path_buf(), found })
            }
        }
    }

    /// Opens the namespace of the pod with this cgroup, as [`Netns::open`] does. It is the one with inode `known` while
    /// a process is in it, and otherwise that of the oldest process, which is the sandbox's. Namespaces that other
    /// processes unshare have no effect.
    pub fn of_sandbox(cgroup: &CgroupDir, known: Option<u64>) -> Result<Self, NetnsError> {
        let found = in_cgroup(cgroup)?;
        let (_, pids) = match found.iter().find(|(inode, _)| Some(*inode) == known) {
            Some(known) => known,
            None if found.len() == 1 => &found[0],
            None => {
                let age = |pid: &Pid| started(*pid).map(|start| (start, pid.as_raw_nonzero()));
                let oldest = |(_, pids): &&(u64, Vec<Pid>)| {
                    pids.iter().filter_map(age).min().unwrap_or((u64::MAX, pids[0].as_raw_nonzero()))
                };
                found.iter().min_by_key(oldest).unwrap_or(&found[0])
            }
        };
        Self::of_process(pids[0])
    }

    /// Opens the user namespace that owns it.
    pub fn owner(&self) -> Result<OwnedFd, NetnsError> {
        /// `_IO(0xb7, 0x1)` of linux/nsfs.h.
        const NS_GET_USERNS: libc::Ioctl = 0xb701;
        // SAFETY: the call takes no argument and returns a new descriptor.
        let fd = unsafe { libc::ioctl(self.file.as_raw_fd(), NS_GET_USERNS) };
        if fd < 0 {
            let source = io::Error::last_os_error();
            return Err(NetnsError::Owner { name: self.name.clone(), source });
        }
        // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Creates a namespace, in which even the loopback interface is down. It lives until it has no process and no open
    /// file.
    pub fn fresh() -> Result<Self, NetnsError> {
        let make = || -> io::Result<File> {
            // SAFETY: CLONE_NEWNET changes neither memory nor the file descriptor table.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            File::open("/proc/thread-self/ns/net")
        };
        let failed = |source| NetnsError::Make { source };
        // On a separate thread, because unshare changes the namespace of its thread.
        let thread = thread::Builder::new().name("netns".to_owned()).spawn(make).map_err(failed)?;
        let file = match thread.join() {
            Ok(made) => made.map_err(failed)?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        Self::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
    }

    /// Opens the host's own namespace, that of PID 1, for this workload of the machine. [`Netns::cookie`] returns the
    /// workload's id.
    pub fn of_machine(workload: NetnsCookie) -> Result<Self, NetnsError> {
        let name = "/proc/1/ns/net".to_owned();
        let open = |source| NetnsError::Open { name: name.clone(), source };
        let file = File::open(&name).map_err(open)?;
        let inode = file.metadata().map_err(open)?.ino();
        let mut netns = Self::of_file(file, name, inode, workload);
        netns.kernel_cookie = match netns.run(cookie)? {
            Ok(cookie) => cookie,
            Err(source) => return Err(without_cookie(netns.name, source)),
        };
        Ok(netns)
    }

    fn of_file(file: File, name: String, inode: u64, cookie: NetnsCookie) -> Self {
        Self { file, name, inode, cookie, kernel_cookie: NetnsCookie::default(), counters: OnceLock::new() }
    }

    fn admit(path: &Path, own_netns: OwnNetns) -> Result<Self, NetnsError> {
        let name = path.display().to_string();
        // O_NONBLOCK, so that opening a FIFO returns at once. It is refused below.
        let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits().cast_signed();
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let open = |source| NetnsError::Open { name: name.clone(), source };
        let file = opened.map_err(open)?;
        let kind = rustix::fs::fstatfs(&file).map_err(|error| open(error.into()))?.f_type.cast_unsigned();
        if kind != NSFS_MAGIC {
            return Err(NetnsError::NotNetns { name });
        }
        let metadata = file.metadata().map_err(open)?;
        let is = |path: &str| {
            // The link of PID 1 may be unreadable; then inode and cookie identify the node's namespace.
            fs::metadata(path)
                .is_ok_and(|other| (other.dev(), other.ino()) == (metadata.dev(), metadata.ino()))
        };
        let own = visit::own_of_process().is_some_and(|own| own == (metadata.dev(), metadata.ino()))
            // A thread that is not on a visit is in that one.
            || (visit::current().is_some() && is("/proc/thread-self/ns/net"));
        if metadata.ino() == FIRST_INODE || (is("/proc/1/ns/net") && (own_netns == OwnNetns::Refuse || !own))
        {
            return Err(NetnsError::Host { name, whose: Whose::Node });
        }
        if own_netns == OwnNetns::Refuse && own {
            return Err(NetnsError::Host { name, whose: Whose::Own });
        }

        let mut netns = Self::of_file(file, name, metadata.ino(), NetnsCookie::default());
        netns.cookie = match netns.run(cookie) {
            Ok(Ok(cookie)) => cookie,
            Ok(Err(source)) => return Err(without_cookie(netns.name, source)),
            // setns returns EINVAL for a namespace of another kind.
            Err(NetnsError::Enter { name, source }) if source.raw_os_error() == Some(libc::EINVAL) => {
                return Err(NetnsError::NotNetns { name });
            }
            Err(error) => return Err(error),
        };
        if netns.cookie == FIRST_COOKIE {
            return Err(NetnsError::Host { name: netns.name, whose: Whose::Node });
        }
        netns.kernel_cookie = netns.cookie;
        Ok(netns)
    }

    /// Returns the inode number, as in `/proc/PID/ns/net` and in the info of links attached to the namespace.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Returns the key of its policy: the netns cookie, which the kernel does not reuse until it reboots, or the id of a
    /// machine's workload.
    pub fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    /// Returns the netns cookie (`bpf_get_netns_cookie`).
    pub fn kernel_cookie(&self) -> NetnsCookie {
        self.kernel_cookie
    }

    /// Returns the path that it was opened by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether process `pid` is in this namespace. False if the process is gone or access is denied.
    pub fn holds(&self, pid: Pid) -> bool {
        fs::metadata(path_of(pid)).is_ok_and(|other| other.ino() == self.inode)
    }

    /// Whether it has no TCP sockets in use, by the counters of its protocols. The kernel counts a socket before the callback
    /// of its listening, so none is missed that opened while no policy was active. False if that cannot be read.
    pub(crate) fn has_no_tcp_sockets(&self) -> Result<bool, NetnsError> {
        let counters = match self.counters.get() {
            Some(counters) => counters,
            None => match self.run(open_counters)? {
                Ok(opened) => self.counters.get_or_init(|| opened),
                Err(_) => return Ok(false),
            },
        };
        let is_zero = |line: &str| {
            line.split_once(": inuse ").is_some_and(|(_, rest)| rest.split(' ').next() == Some("0"))
        };
        Ok(counters.iter().all(|counters| {
            sys::read_again(counters)
                .is_ok_and(|text| text.lines().filter(|line| line.starts_with("TCP")).all(is_zero))
        }))
    }

    /// Runs `work` in the namespace on the calling thread, which is in its own namespace again afterwards, also after a
    /// panic. Sockets, threads and processes that it creates stay in the namespace.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetnsError> {
        if visit::current() == Some(self.cookie) {
            return Ok(work());
        }
        let _visit = Visit::begin(self.file.as_fd(), self.cookie)
            .map_err(|source| NetnsError::Enter { name: self.name.clone(), source: source.into() })?;
        Ok(work())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Returns each namespace of the processes in a cgroup, as its inode and the processes in it. At least one.
fn in_cgroup(cgroup: &CgroupDir) -> Result<Vec<(u64, Vec<Pid>)>, NetnsError> {
    let mut found = BTreeMap::<u64, Vec<Pid>>::new();
    let mut refused = None;
    for pid in cgroup.processes()? {
        let path = path_of(pid);
        match fs::metadata(&path) {
            Ok(metadata) => found.entry(metadata.ino()).or_default().push(pid),
            // Exited meanwhile, or a zombie, which has no namespaces.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                refused = Some(NetnsError::Open { name: path.display().to_string(), source });
            }
        }
    }
    match (found.is_empty(), refused) {
        (true, Some(refused)) => Err(refused),
        (true, None) => Err(NetnsError::NoProcess { cgroup: cgroup.path().to_path_buf() }),
        (false, _) => Ok(found.into_iter().collect()),
    }
}

/// Returns the start time of a process in clock ticks since boot. `None` if it is gone.
fn started(pid: Pid) -> Option<u64> {
    let process = procfs::process::Process::new(pid.as_raw_nonzero().get()).ok()?;
    process.stat().ok().map(|stat| stat.starttime)
}

/// Opens the counters of the calling thread's namespace.
fn open_counters() -> io::Result<SocketCounters> {
    let mut opened = vec![File::open("/proc/thread-self/net/sockstat")?];
    match File::open("/proc/thread-self/net/sockstat6") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        v6 => opened.push(v6?),
    }
    Ok(opened)
}

fn path_of(pid: Pid) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/net"))
}

/// Returns the cookie of the calling thread's network namespace.
fn cookie() -> io::Result<NetnsCookie> {
    /// From asm-generic/socket.h; the libc crate lacks it for some targets.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    // Any socket has the option, and an unbound IPv4 one can always be created.
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: the kernel writes at most `length` bytes, the size of `cookie`, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(NetnsCookie(cookie)) } else { Err(io::Error::last_os_error()) }
}

/// Whether the kernel has SO_NETNS_COOKIE (Linux 5.14).
pub(crate) fn tells_cookies() -> io::Result<bool> {
    match cookie() {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The error for an unreadable cookie. A kernel without the socket option lacks more, and gets the text of `check`.
fn without_cookie(name: String, source: io::Error) -> NetnsError {
    match support::missing().ok().and_then(|missing| Lacking::for_any(&missing)) {
        Some(lacking) => lacking.into(),
        None => NetnsError::Cookie { name, source },
    }
}

/// The first three namespaces, for an error's text.
fn list(found: &[(u64, Pid)]) -> String {
    let mut text = String::new();
    for (inode, pid) in found.iter().take(3) {
        let separator = if text.is_empty() { "" } else { ", " };
        _ = write!(text, "{separator}{inode} of process {pid}");
    }
    if found.len() > 3 {
        text.push_str(", ..");
    }
    text
}

#[cfg(test)]
mod tests;
