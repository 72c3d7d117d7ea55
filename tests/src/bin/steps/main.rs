//! Socket calls one after the other; see `tests::steps`.

use std::io::{self, BufRead as _, BufReader, IoSlice};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use anyhow::{Context, Result};
use intercept_common::layout::ShadowSocket;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg, sendmsg};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tests::actor::{Answer, OriginalDst};
use tests::deadline::scaled;
use tests::steps::{SocketKind, Step, StepOutcome, shown};

const PATIENCE: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    let steps: Vec<Step> = serde_json::from_str(&std::env::args().nth(1).context("no steps were given")?)?;
    let mut sockets = Sockets { open: Vec::new(), at: 0 };
    let outcomes: Vec<StepOutcome> =
        steps.iter().map(|step| sockets.step(step).unwrap_or_else(|error| error_name(&error))).collect();
    println!("{}", serde_json::to_string(&outcomes)?);
    Ok(())
}

struct Sockets {
    open: Vec<Option<Socket>>,
    at: usize,
}

impl Sockets {
    fn socket(&self) -> io::Result<&Socket> {
        self.open.get(self.at).and_then(Option::as_ref).ok_or_else(|| io::Error::other("no such socket"))
    }

    fn step(&mut self, step: &Step) -> io::Result<StepOutcome> {
        let done = Ok("ok".to_owned());
        match step {
            Step::Open(kind) => {
                self.at = self.open.len();
                self.open.push(Some(open(*kind)?));
                return done;
            }
            Step::OpenMeeting(number) => {
                let met = self.open.get(*number).and_then(Option::as_ref);
                let met = dial_of(met.ok_or_else(|| io::Error::other("no such socket"))?)?;
                let socket = loop {
                    let socket = open(SocketKind::Tcp4)?;
                    if dial_of(&socket)? == met {
                        break socket;
                    }
                };
                self.at = self.open.len();
                self.open.push(Some(socket));
                return done;
            }
            Step::Use(number) => {
                self.at = *number;
                return done;
            }
            Step::Pause => {
                println!("paused");
                io::stdin().read_line(&mut String::new())?;
                return done;
            }
            Step::Close => {
                self.open[self.at] = None;
                return done;
            }
            _ => {}
        }
        let socket = self.socket()?;
        match step {
            Step::ReuseAddress => socket.set_reuse_address(true)?,
            Step::Option { level, name, value } => set_option(socket, *level, *name, value)?,
            Step::UnicastInterface(name) => {
                let index = interface(name)?.to_be_bytes();
                let (level, option) = if is_v6(socket)? { (41, 76) } else { (0, 50) };
                set_option(socket, level, option, &index)?;
            }
            Step::Bind(addr) => socket.bind(&SockAddr::from(*addr))?,
            Step::Connect(addr) => socket.connect(&SockAddr::from(*addr))?,
            Step::Disconnect => disconnect(socket)?,
            Step::Nonblocking => socket.set_nonblocking(true)?,
            Step::AwaitConnection => await_connection(socket)?,
            Step::FastOpen(addr) => {
                _ = socket.send_to_with_flags(b"!", &SockAddr::from(*addr), libc::MSG_FASTOPEN)?
            }
            Step::Name => return name(socket.local_addr()?),
            Step::Peer => return name(socket.peer_addr()?),
            Step::Send => _ = socket.send(b"!")?,
            Step::Read => return read(socket),
            Step::Receive => return receive(socket),
            Step::Ask => {
                socket.send(&0u64.to_be_bytes())?;
                return receive(socket);
            }
            Step::AskAt(addr) => {
                socket.send_to(&0u64.to_be_bytes(), &SockAddr::from(*addr))?;
                return receive(socket);
            }
            Step::AskFor(addr) => {
                socket.send_to(&0u64.to_be_bytes(), &SockAddr::from(*addr))?;
                let (answer, _) = answer(socket)?;
                return Ok(format!("{} saw {}", answer.server, shown(answer.peer)));
            }
            Step::AskAll(addrs) => return ask_all(socket, addrs),
            Step::AskBy(addr, device) => {
                ask_by(socket, *addr, interface(device)?)?;
                return receive(socket);
            }
            Step::Shutdown => socket.shutdown(std::net::Shutdown::Write)?,
            Step::Open(_) | Step::OpenMeeting(_) | Step::Use(_) | Step::Pause | Step::Close => {
                unreachable!("done above")
            }
        }
        done
    }
}

fn open(kind: SocketKind) -> io::Result<Socket> {
    let (domain, kind, protocol) = match kind {
        SocketKind::Tcp4 => (Domain::IPV4, Type::STREAM, Protocol::TCP),
        SocketKind::Tcp6 => (Domain::IPV6, Type::STREAM, Protocol::TCP),
        SocketKind::Udp4 => (Domain::IPV4, Type::DGRAM, Protocol::UDP),
        SocketKind::Udp6 => (Domain::IPV6, Type::DGRAM, Protocol::UDP),
        SocketKind::Mptcp4 => (Domain::IPV4, Type::STREAM, Protocol::MPTCP),
    };
    let socket = Socket::new(domain, kind, Some(protocol))?;
    socket.set_read_timeout(Some(scaled(PATIENCE)))?;
    // Of connect(), too.
    socket.set_write_timeout(Some(scaled(PATIENCE)))?;
    Ok(socket)
}

/// The cell in which the decision on a socket is kept until its SYN leaves.
fn dial_of(socket: &Socket) -> io::Result<u32> {
    Ok(ShadowSocket::dial_of(rustix::net::sockopt::socket_cookie(socket)?))
}

fn is_v6(socket: &Socket) -> io::Result<bool> {
    Ok(socket.domain()? == Domain::IPV6)
}

fn interface(name: &str) -> io::Result<u32> {
    Ok(nix::net::if_::if_nametoindex(name)?)
}

fn name(addr: SockAddr) -> io::Result<StepOutcome> {
    addr.as_socket().map(shown).ok_or_else(|| io::Error::other("no address"))
}

fn disconnect(socket: &Socket) -> io::Result<()> {
    let unspecified = libc::sockaddr { sa_family: 0, sa_data: [0; 14] };
    let size = libc::socklen_t::try_from(size_of::<libc::sockaddr>()).map_err(io::Error::other)?;
    // SAFETY: the address is of the size given.
    let done = unsafe { libc::connect(socket.as_raw_fd(), &raw const unspecified, size) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn await_connection(socket: &Socket) -> io::Result<()> {
    let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    let patience = u16::try_from(scaled(PATIENCE).as_millis()).map_err(io::Error::other)?;
    if poll(&mut polled, patience)? == 0 {
        return Err(nix::errno::Errno::ETIMEDOUT.into());
    }
    socket.set_nonblocking(false)?;
    socket.take_error()?.map_or(Ok(()), Err)
}

fn ask_all(socket: &Socket, addrs: &[SocketAddr]) -> io::Result<StepOutcome> {
    let question = 0u64.to_be_bytes();
    let questions = vec![[IoSlice::new(&question)]; addrs.len()];
    let to: Vec<_> = addrs.iter().map(|addr| Some(SockaddrStorage::from(*addr))).collect();
    let mut headers = MultiHeaders::preallocate(addrs.len(), None);
    let none: [ControlMessage<'_>; 0] = [];
    let fd = socket.as_fd().as_raw_fd();
    let sent = sendmmsg(fd, &mut headers, &questions, &to, none, MsgFlags::empty())?.count();
    let mut answers = (0..sent).map(|_| receive(socket)).collect::<io::Result<Vec<_>>>()?;
    answers.sort();
    Ok(answers.join(", "))
}

fn set_option(socket: &Socket, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let size = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the value is of the size given.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), size) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn read(socket: &Socket) -> io::Result<StepOutcome> {
    let mut line = String::new();
    BufReader::new(TcpStream::from(socket.try_clone()?)).read_line(&mut line)?;
    let answer: Answer = serde_json::from_str(&line).map_err(io::Error::other)?;
    let original = match answer.original_dst {
        // What answers by itself was dialled as it is.
        Some(OriginalDst::Addr(addr)) if ["outbound", "inbound", "dns"].contains(&answer.server.as_str()) => {
            format!(" for {}", shown(addr))
        }
        _ => String::new(),
    };
    Ok(format!("{}{original} from {}", answer.server, shown(answer.peer)))
}

fn receive(socket: &Socket) -> io::Result<StepOutcome> {
    let (answer, from) = answer(socket)?;
    Ok(format!("{} by {from}", answer.server))
}

fn answer(socket: &Socket) -> io::Result<(Answer, StepOutcome)> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 2048];
    let (length, from) = socket.recv_from(&mut buffer)?;
    // SAFETY: the kernel has filled so many.
    let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length) };
    let answer: Answer = serde_json::from_slice(bytes).map_err(io::Error::other)?;
    Ok((answer, from.as_socket().map(shown).unwrap_or_default()))
}

fn ask_by(socket: &Socket, to: SocketAddr, index: u32) -> io::Result<()> {
    let (v4, v6);
    let index = i32::try_from(index).map_err(io::Error::other)?;
    let by = if to.is_ipv4() && !is_v6(socket)? {
        v4 = libc::in_pktinfo {
            ipi_ifindex: index,
            ipi_spec_dst: libc::in_addr { s_addr: 0 },
            ipi_addr: libc::in_addr { s_addr: 0 },
        };
        ControlMessage::Ipv4PacketInfo(&v4)
    } else {
        v6 = libc::in6_pktinfo {
            ipi6_addr: libc::in6_addr { s6_addr: [0; 16] },
            ipi6_ifindex: index.cast_unsigned(),
        };
        ControlMessage::Ipv6PacketInfo(&v6)
    };
    let question = 0u64.to_be_bytes();
    let to = SockaddrStorage::from(to);
    let fd = socket.as_fd().as_raw_fd();
    sendmsg(fd, &[IoSlice::new(&question)], &[by], MsgFlags::empty(), Some(&to))?;
    Ok(())
}

fn error_name(error: &io::Error) -> StepOutcome {
    match error.raw_os_error() {
        Some(number) => format!("{:?}", nix::errno::Errno::from_raw(number)),
        None => error.to_string(),
    }
}
