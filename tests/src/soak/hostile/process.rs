//! Processes inside hostile pods: this package's binary `soak`, started anew.

use std::{
    fs::File,
    io::{IoSlice, Write as _, stdout},
    mem::MaybeUninit,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use rustix::{
    io::Errno,
    mount::{MountFlags, mount},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{actor::binary, testbed::Sandbox};

/// The variable that says where the executable is.
const VARIABLE: &str = "INTERCEPT_SOAK";
/// Descriptors that a process opens.
const OPEN: u32 = 60_000;
/// As many as the kernel takes in one message.
const IN_A_MESSAGE: usize = 253;
/// Half-open connections, more than a pod may have.
const HALF_OPEN: u32 = 800;

/// Both ends of sockets whose queues nobody reads.
type Queues = Vec<(UnixStream, UnixStream)>;

/// What the process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Program {
    /// Descriptors by the hundred thousand, and a listener of the proxy's port that only a queue of SCM_RIGHTS holds.
    Descriptors,
    /// A file system at /etc that never answers. To be started in a mount namespace of its own.
    Fuse,
    /// Connections to a listener that accepts none.
    HalfOpen,
}

/// A running process. Dropping it kills it.
#[derive(Debug)]
pub struct HostileProcess(Child);

impl Program {
    /// Starts it in a place, and waits until it has done what it does.
    pub fn start(self, place: &Sandbox) -> Result<HostileProcess> {
        let soak = binary::locate("soak", VARIABLE)?;
        let mut command = match self {
            Self::Fuse => {
                let mut unshare = place.command("unshare")?;
                unshare.arg("--mount").arg(soak);
                unshare
            }
            Self::Descriptors | Self::HalfOpen => place.command(soak)?,
        };
        let name = self.to_possible_value().context("a name")?.get_name().to_owned();
        HostileProcess::start(command.args(["hostile", &name]))
    }

    /// Does it, for ever.
    pub fn run(self) -> Result<()> {
        // What it does ends when this goes.
        let _kept: Box<dyn std::any::Any> = match self {
            Self::Descriptors => Box::new(descriptors()?),
            Self::Fuse => Box::new(fuse()?),
            Self::HalfOpen => Box::new(half_open()?),
        };
        println!("ready");
        stdout().flush()?;
        loop {
            std::thread::sleep(Duration::from_secs(3600));
        }
    }
}

impl HostileProcess {
    /// Starts a command that prints a line when it has done its work.
    pub fn start(command: &mut Command) -> Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut process = Self(child.with_context(|| format!("starting {command:?}"))?);
        let output = process.0.stdout.take().context("no standard output")?;
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line)?;
        if line.is_empty() {
            bail!("{command:?} ended early");
        }
        Ok(process)
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for HostileProcess {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn descriptors() -> Result<(Vec<OwnedFd>, Queues)> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).context("raising RLIMIT_NOFILE")?;
    let null = File::open("/dev/null")?;
    let mut queues = Vec::new();
    {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 15001))?;
        let hidden = UnixStream::pair()?;
        send(&hidden.0, &[listener.as_fd()])?;
        queues.push(hidden);
    }
    for _ in 0..4 {
        let queue = UnixStream::pair()?;
        queue.0.set_nonblocking(true)?;
        while send(&queue.0, &[null.as_fd(); IN_A_MESSAGE])? {}
        queues.push(queue);
    }
    // As many as it may have, if that is less.
    let open = (0..OPEN).map_while(|_| null.as_fd().try_clone_to_owned().ok()).collect();
    Ok((open, queues))
}

/// Whether there was room.
fn send(queue: &UnixStream, descriptors: &[BorrowedFd<'_>]) -> Result<bool> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(IN_A_MESSAGE))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    match sendmsg(queue, &[IoSlice::new(b"x")], &mut ancillary, SendFlags::empty()) {
        Ok(_) => Ok(true),
        Err(Errno::AGAIN | Errno::TOOMANYREFS) => Ok(false),
        Err(error) => Err(error).context("sending descriptors"),
    }
}

/// The connection to the kernel, from which nothing is ever read.
fn fuse() -> Result<File> {
    let fuse = File::options().read(true).write(true).open("/dev/fuse").context("opening /dev/fuse")?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0\0", fuse.as_raw_fd());
    let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes())?;
    mount("silent", "/etc", "fuse", MountFlags::empty(), Some(options)).context("mounting a FUSE at /etc")?;
    Ok(fuse)
}

fn half_open() -> Result<(Socket, Vec<Socket>)> {
    let new = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP));
    let listener = new()?;
    listener.set_reuse_address(true)?;
    listener.bind(&SocketAddr::from(([0, 0, 0, 0], 15001)).into())?;
    listener.listen(1)?;
    let mut sockets = Vec::new();
    for n in 0..HALF_OPEN {
        let socket = new()?;
        socket.set_nonblocking(true)?;
        let low = u8::try_from(n % 250 + 1)?;
        // In progress, established, or refused for want of room: all of that is what it is for.
        drop(socket.connect(&SocketAddr::from(([10, 201, 0, low], 80)).into()));
        sockets.push(socket);
    }
    Ok((listener, sockets))
}
