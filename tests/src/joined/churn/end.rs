//! The two ends. They are processes of the pods' proxies, with non-blocking sockets and poll.

use std::{
    fmt,
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream},
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use rustix::event::PollFlags;
use socket2::{Domain, SockAddr, Socket, Type};

use super::super::{INBOUND, PATIENCE, receive, send, wait};

/// The line that the accepting end prints when it listens.
pub const READY: &str = "ready";

/// Number of connections of an end at the same time.
const DIALLING: u64 = 4;
/// One more than can be open, so that no connection waits for another.
const ACCEPTING: u64 = DIALLING + 1;
/// The first source port, and the number of ports of each thread.
const FIRST_PORT: u16 = 20_000;
const PORTS: u64 = 64;
/// Most messages in each direction after the greeting, and the size of the longest. There is at least one, because most of
/// many connections with a single message are not joined.
const MESSAGES: u32 = 4;
const LONGEST: usize = 2000;
/// Bytes of a [`Greeting`].
const GREETING: usize = 32;

/// The end that a process is.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum ChurnRole {
    /// Accepts connections
    Accept {
        /// The pair of pods
        #[arg(long)]
        pair: u64,
    },
    /// Makes connections
    Dial {
        /// The pair of pods
        #[arg(long)]
        pair: u64,
        /// The destination
        #[arg(long)]
        to: SocketAddr,
        /// The number of connections
        #[arg(long)]
        connections: u64,
        /// The seed of the sizes
        #[arg(long)]
        seed: u64,
    },
}

/// A line of the connecting end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChurnProgress {
    /// Complete connections, with all bytes compared.
    pub made: u64,
    /// Connections that ended early.
    pub broken: u64,
}

impl fmt::Display for ChurnProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.made, self.broken)
    }
}

impl FromStr for ChurnProgress {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self> {
        let (made, broken) = line.split_once(' ').context("two numbers")?;
        Ok(Self { made: made.parse()?, broken: broken.parse()? })
    }
}

/// The first bytes of each end: its identity and that of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Greeting {
    pair: u64,
    thread: u64,
    serial: u64,
    seed: u64,
}

impl Greeting {
    fn to_bytes(self) -> [u8; GREETING] {
        let mut bytes = [0; GREETING];
        let words = [self.pair, self.thread, self.serial, self.seed];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn of(bytes: &[u8]) -> Self {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        Self { pair: word(0), thread: word(8), serial: word(16), seed: word(24) }
    }
}

/// Why a connection failed.
#[derive(Debug)]
enum Trouble {
    /// It ended early.
    Broken(anyhow::Error),
    /// It had bytes of another connection, or its own in another order.
    Crossed(String),
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Self::Broken(error)
    }
}

impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Self {
        Self::Broken(error.into())
    }
}

impl ChurnRole {
    /// Runs this end until all connections are made.
    pub fn run(self) -> Result<()> {
        match self {
            Self::Accept { pair } => accept(pair),
            Self::Dial { pair, to, connections, seed } => dial(pair, to, connections, seed),
        }
    }
}

fn accept(pair: u64) -> Result<()> {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    listener.set_reuse_address(true)?;
    listener.bind(&SockAddr::from(SocketAddr::from((Ipv4Addr::UNSPECIFIED, INBOUND))))?;
    listener.listen(1024)?;
    listener.set_nonblocking(true)?;
    println!("{READY}");
    std::thread::scope(|scope| {
        for _ in 0..ACCEPTING {
            scope.spawn(|| {
                loop {
                    // After this pause between two connections, the run is over.
                    if wait(&listener, PollFlags::IN).is_err() {
                        continue;
                    }
                    let Ok((socket, _)) = listener.accept() else { continue };
                    if let Err(Trouble::Crossed(what)) = answer(&socket.into(), pair) {
                        fail(&what);
                    }
                }
            });
        }
    });
    Ok(())
}

/// Ends the process, so that the run ends.
fn fail(what: &str) -> ! {
    eprintln!("crossed: {what}");
    std::process::exit(1)
}

fn dial(pair: u64, to: SocketAddr, connections: u64, seed: u64) -> Result<()> {
    let (made, broken) = (AtomicU64::new(0), AtomicU64::new(0));
    let say = || {
        let [made, broken] = [&made, &broken].map(|count| count.load(Ordering::Relaxed));
        println!("{}", ChurnProgress { made, broken });
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..DIALLING)
            .map(|thread| {
                let (made, broken) = (&made, &broken);
                scope.spawn(move || {
                    let mut random = SmallRng::seed_from_u64(seed ^ (pair << 32) ^ thread);
                    for serial in (0..connections).filter(|serial| serial % DIALLING == thread) {
                        let greeting = Greeting { pair, thread, serial, seed: random.random() };
                        match talk(to, greeting) {
                            Ok(()) => made.fetch_add(1, Ordering::Relaxed),
                            Err(Trouble::Broken(why)) => {
                                if broken.fetch_add(1, Ordering::Relaxed) < 3 {
                                    eprintln!("broken: {greeting:?}: {why:#}");
                                }
                                0
                            }
                            Err(Trouble::Crossed(what)) => fail(&what),
                        };
                    }
                })
            })
            .collect();
        while threads.iter().any(|thread| !thread.is_finished()) {
            std::thread::sleep(Duration::from_millis(200));
            say();
        }
    });
    say();
    Ok(())
}

/// Makes one connection.
fn talk(to: SocketAddr, greeting: Greeting) -> Result<(), Trouble> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    let port = u64::from(FIRST_PORT) + greeting.thread * PORTS + (greeting.serial / DIALLING) % PORTS;
    let port = u16::try_from(port).map_err(|error| anyhow!(error))?;
    socket.bind(&SockAddr::from(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))))?;
    socket.set_tcp_nodelay(true)?;
    // Closed by a reset, unless the other end has closed, so that no port is left in TIME_WAIT.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.connect_timeout(&SockAddr::from(to), PATIENCE).context("dialling")?;
    socket.set_nonblocking(true)?;
    let end = TcpStream::from(socket);
    send(&end, &greeting.to_bytes())?;
    let back = Greeting::of(&receive(&end, GREETING)?);
    if back != greeting {
        return Err(Trouble::Crossed(format!("{greeting:?} was answered by {back:?}")));
    }
    let mut random = SmallRng::seed_from_u64(greeting.seed);
    for _ in 0..random.random_range(1..=MESSAGES) {
        let [there, back] = [(); 2].map(|()| message(&mut random));
        send(&end, &there)?;
        compare(&end, &back, greeting)?;
    }
    if is_closed_by_the_other(greeting) {
        let rest = std::io::Read::read(&mut &end, &mut [0]);
        if rest.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock) {
            wait(&end, PollFlags::IN)?;
            ensure_ended(std::io::Read::read(&mut &end, &mut [0])?, greeting)?;
        } else {
            ensure_ended(rest?, greeting)?;
        }
        end.shutdown(Shutdown::Write)?;
    }
    Ok(())
}

/// Serves one accepted connection.
fn answer(end: &TcpStream, pair: u64) -> Result<(), Trouble> {
    end.set_nonblocking(true)?;
    end.set_nodelay(true)?;
    let greeting = Greeting::of(&receive(end, GREETING)?);
    if greeting.pair != pair {
        return Err(Trouble::Crossed(format!("the pods of pair {pair} were dialled by {greeting:?}")));
    }
    send(end, &greeting.to_bytes())?;
    let mut random = SmallRng::seed_from_u64(greeting.seed);
    for _ in 0..random.random_range(1..=MESSAGES) {
        let [there, back] = [(); 2].map(|()| message(&mut random));
        compare(end, &there, greeting)?;
        send(end, &back)?;
    }
    if is_closed_by_the_other(greeting) {
        end.shutdown(Shutdown::Write)?;
    }
    // Until the other end closes or resets.
    wait(end, PollFlags::IN)?;
    Ok(())
}

/// Whether the accepting end closes this connection in order: every other one.
fn is_closed_by_the_other(greeting: Greeting) -> bool {
    greeting.seed.is_multiple_of(2)
}

fn ensure_ended(read: usize, greeting: Greeting) -> Result<(), Trouble> {
    match read {
        0 => Ok(()),
        _ => Err(Trouble::Crossed(format!("{greeting:?}: more than was sent"))),
    }
}

fn message(random: &mut SmallRng) -> Vec<u8> {
    let mut bytes = vec![0; random.random_range(1..=LONGEST)];
    random.fill(&mut bytes[..]);
    bytes
}

fn compare(end: &TcpStream, expected: &[u8], greeting: Greeting) -> Result<(), Trouble> {
    let got = receive(end, expected.len())?;
    if got == expected {
        Ok(())
    } else {
        Err(Trouble::Crossed(format!("{greeting:?}: other bytes than were sent")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_and_progress_survive_the_way() {
        let greeting = Greeting { pair: 1, thread: 2, serial: 3, seed: u64::MAX };
        assert_eq!(Greeting::of(&greeting.to_bytes()), greeting);
        let progress = ChurnProgress { made: 7, broken: 1 };
        assert_eq!(progress.to_string().parse::<ChurnProgress>().expect("it is one"), progress);
    }
}
