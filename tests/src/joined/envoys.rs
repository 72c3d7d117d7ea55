//! Envoys in two pods of one node, with joined connections between them, and a soak of these. All bytes that applications
//! send through both Envoys are compared.

use std::{
    io::{ErrorKind, Read as _},
    net::{Shutdown, SocketAddr, TcpStream},
    process::Stdio,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use intercept_common::Family;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use rustix::event::PollFlags;
use socket2::Socket;

use super::{APP, Leg, PATIENCE, PodPair, footprint, joined, send, socket, wait};
use crate::{
    actor::binary::ReadableCopy,
    agent::{Agent, INIT_FLAGS},
    envoy::{self, Sidecar, Speaks},
    testbed::{Ids, Sandbox},
};

/// How often the soak prints its counts.
const PROGRESS: Duration = Duration::from_secs(30);
/// The time between two faults.
const PAUSE: Duration = Duration::from_millis(1500);
/// Number of clients at the same time.
const WORKERS: u64 = 4;

/// Two captured and accelerated pods of one node with Envoy as their proxy.
#[derive(Debug)]
pub struct JoinedEnvoyFixture {
    /// The agent.
    pub agent: Agent,
    /// The pods.
    pub pods: PodPair,
    program: ReadableCopy,
}

impl JoinedEnvoyFixture {
    /// Captures the pods.
    pub fn new(label: &str) -> Self {
        let agent = Agent::new(label).expect("the agent");
        let pods = PodPair::new(label).expect("pods");
        let flags: Vec<_> = INIT_FLAGS.into_iter().chain(["--accelerate"]).collect();
        for pod in [&pods.dialler, &pods.acceptor] {
            agent.attach(pod, &flags).expect("attached");
        }
        let program = ReadableCopy::of(&envoy::program().expect("Envoy's binary")).expect("a copy");
        Self { agent, pods, program }
    }

    /// Starts both Envoys.
    pub fn sidecars(&self, speaks: Speaks) -> [Sidecar; 2] {
        [&self.pods.dialler, &self.pods.acceptor]
            .map(|pod| Sidecar::start(&self.program, pod, speaks).expect("Envoy"))
    }

    /// Counted ends of joined connections in a pod.
    pub fn joined(&self, pod: &Sandbox) -> u64 {
        joined(&self.agent, pod).expect("status")
    }

    /// Bytes that the node has received from the connecting pod.
    pub fn bytes_on_the_wire(&self) -> u64 {
        let devices = || std::fs::read_to_string("/proc/thread-self/net/dev").expect("the interfaces");
        let devices = self.pods.router.netns.run(devices).expect("entered");
        let line =
            devices.lines().find_map(|line| line.trim().strip_prefix("pod1:")).expect("the pod's").to_owned();
        line.split_whitespace().next().expect("received bytes").parse().expect("a number")
    }

    /// Opens the listener of the application.
    pub fn app(&self, family: Family) -> Socket {
        self.app_on(family, APP)
    }

    /// The same, on another port.
    pub fn app_on(&self, family: Family, port: u16) -> Socket {
        let listener = socket(&self.pods.acceptor, family, Ids::APP, None).expect("a socket");
        listener.set_reuse_address(true).expect("set");
        let any: SocketAddr =
            if family == Family::V6 { ([0u16; 8], port).into() } else { ([0u8; 4], port).into() };
        listener.bind(&any.into()).expect("bound");
        listener.listen(1024).expect("listening");
        listener
    }

    /// Connects an application of one pod to that of the other, through both proxies.
    pub fn connect(&self, app: &Socket, family: Family) -> Leg {
        let client = socket(&self.pods.dialler, family, Ids::APP, None).expect("a socket");
        Leg::of(client, app, PodPair::app(family)).expect("through both proxies")
    }
}

/// The byte at a position of a stream. Lost, duplicate and moved bytes differ from it.
pub fn stream(seed: u64, from: usize, length: usize) -> Vec<u8> {
    let byte = |at: usize| {
        let word = (at as u64 / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed);
        word.to_le_bytes()[at % 8]
    };
    (from..from + length).map(byte).collect()
}

/// Transfers bytes in one direction in pieces of odd sizes, with a reader that sometimes pauses, and closes it.
pub fn one_way(from: &TcpStream, to: &TcpStream, seed: u64, length: usize) {
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (mut random, mut at) = (SmallRng::seed_from_u64(seed), 0);
            while at < length {
                let most = 1_usize << random.random_range(0..17);
                let piece = random.random_range(1..=most).min(length - at);
                send(from, &stream(seed, at, piece)).expect("sent");
                at += piece;
            }
            from.shutdown(Shutdown::Write).expect("shut down");
        });
        let (mut random, mut at, mut buffer) = (SmallRng::seed_from_u64(!seed), 0, vec![0; 1 << 17]);
        loop {
            if random.random_range(0..500) == 0 {
                std::thread::park_timeout(Duration::from_millis(20));
            }
            match { to }.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => {
                    assert!(buffer[..read] == stream(seed, at, read), "other bytes at {at}");
                    at += read;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => wait(to, PollFlags::IN).expect("more"),
                Err(error) => panic!("{error} after {at} bytes"),
            }
        }
        assert_eq!(at, length, "the stream ended early");
    });
}

/// Transfers bytes in both directions at once.
pub fn both_ways(leg: &Leg, seed: u64, length: usize) {
    std::thread::scope(|scope| {
        scope.spawn(|| one_way(&leg.accepted, &leg.dialled, seed ^ 1, length));
        one_way(&leg.dialled, &leg.accepted, seed, length);
    });
}

/// How the connections of a soak ended.
#[derive(Debug, Default)]
pub struct Soaked {
    /// Complete.
    pub whole: AtomicUsize,
    /// Cut off when a proxy was killed.
    pub cut: AtomicUsize,
}

/// Makes connections that end in every way while proxies are killed, and the agent attaches, detaches and is killed.
///
/// # Panics
/// A connection that was not cut off is incomplete or stuck, or the maps keep entries.
pub fn soak(duration: Duration, seed: u64) -> Soaked {
    let fixture = JoinedEnvoyFixture::new("envoys-soak");
    let before = footprint(&fixture.agent).expect("the maps");
    let envoys = fixture.sidecars(Speaks::Tcp).map(Some);
    let app = fixture.app(Family::V4);
    app.set_nonblocking(true).expect("set");
    let (begun, until) = (Instant::now(), Instant::now() + duration);
    let soaked = Soaked::default();
    std::thread::scope(|scope| {
        scope.spawn(|| echo(&app, until + PATIENCE));
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let (fixture, soaked) = (&fixture, &soaked);
                scope.spawn(move || work(fixture, SmallRng::seed_from_u64(seed ^ worker), until, soaked))
            })
            .collect();
        scope.spawn(|| {
            while Instant::now() + PROGRESS < until {
                std::thread::sleep(PROGRESS);
                println!("soak: {} s: {soaked}", begun.elapsed().as_secs());
            }
        });
        let envoys = disturb(&fixture, envoys, SmallRng::seed_from_u64(!seed), until);
        for worker in workers {
            worker.join().expect("what was not cut off arrived");
        }
        drop(envoys);
    });
    drop(app);
    works_as_in_the_beginning(&fixture);
    // A reset takes a moment to reach both ends.
    let deadline = Instant::now() + PATIENCE;
    let mut after = footprint(&fixture.agent).expect("the maps");
    while after != before && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
        after = footprint(&fixture.agent).expect("the maps");
    }
    assert_eq!(after, before, "bytes in the maps of joined connections, after and before");
    soaked
}

impl std::fmt::Display for Soaked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [whole, cut] = [&self.whole, &self.cut].map(|count| count.load(Ordering::Relaxed));
        write!(f, "{whole} connections whole, {cut} cut off by kills")
    }
}

/// Echoes each connection until the end of its stream, then closes it.
fn echo(app: &Socket, until: Instant) {
    std::thread::scope(|scope| {
        while Instant::now() < until {
            let Ok((end, _)) = app.accept() else {
                std::thread::park_timeout(Duration::from_millis(1));
                continue;
            };
            scope.spawn(move || {
                let end = TcpStream::from(end);
                end.set_nonblocking(false).expect("set");
                end.set_read_timeout(Some(PATIENCE)).expect("set");
                // A connection that was cut off ends with an error.
                drop(std::io::copy(&mut &end, &mut &end));
                drop(end.shutdown(Shutdown::Write));
            });
        }
    });
}

fn work(fixture: &JoinedEnvoyFixture, mut random: SmallRng, until: Instant, soaked: &Soaked) {
    while Instant::now() < until {
        match once(fixture, &mut random) {
            Ok(()) => soaked.whole.fetch_add(1, Ordering::Relaxed),
            Err(_cut_off) => {
                // Refused until Envoy listens.
                std::thread::park_timeout(Duration::from_millis(50));
                soaked.cut.fetch_add(1, Ordering::Relaxed)
            }
        };
    }
}

/// Restarts proxies and attaches with and without the option, each pod in turn. Returns the last proxies.
fn disturb(
    fixture: &JoinedEnvoyFixture,
    mut envoys: [Option<Sidecar>; 2],
    mut random: SmallRng,
    until: Instant,
) -> [Option<Sidecar>; 2] {
    let flags = accelerated();
    let mut turn = 0;
    while Instant::now() < until {
        std::thread::park_timeout(PAUSE);
        let n = turn % 2;
        let pod = [&fixture.pods.dialler, &fixture.pods.acceptor][n];
        match turn / 2 % 4 {
            0 => {
                envoys[n] = None;
                envoys[n] = Some(Sidecar::start(&fixture.program, pod, Speaks::Tcp).expect("Envoy"));
            }
            1 => drop(fixture.agent.attach(pod, &INIT_FLAGS).expect("attached")),
            2 => {
                let mut attach = fixture.agent.for_pod("attach", pod, &flags);
                let attach = attach.stdout(Stdio::null()).stderr(Stdio::null());
                let mut killed = attach.spawn().expect("the agent");
                std::thread::sleep(Duration::from_millis(random.random_range(0..60)));
                killed.kill().expect("killed");
                killed.wait().expect("ended");
            }
            _ => drop(fixture.agent.attach(pod, &flags).expect("attached")),
        }
        turn += 1;
    }
    envoys
}

fn accelerated() -> Vec<&'static str> {
    INIT_FLAGS.into_iter().chain(["--accelerate"]).collect()
}

fn works_as_in_the_beginning(fixture: &JoinedEnvoyFixture) {
    for pod in [&fixture.pods.dialler, &fixture.pods.acceptor] {
        fixture.agent.attach(pod, &accelerated()).expect("attached");
    }
    let _envoys = fixture.sidecars(Speaks::Tcp);
    let before = fixture.joined(&fixture.pods.acceptor);
    let app = fixture.app_on(Family::V4, APP + 1);
    let client = socket(&fixture.pods.dialler, Family::V4, Ids::APP, None).expect("a socket");
    let to = SocketAddr::new(PodPair::app(Family::V4).ip(), APP + 1);
    both_ways(&Leg::of(client, &app, to).expect("through both proxies"), 3, 1 << 20);
    assert_eq!(fixture.joined(&fixture.pods.acceptor), before + 1);
}

/// Makes one connection and compares the echoed bytes.
///
/// # Errors
/// The connection was cut off.
///
/// # Panics
/// The bytes differ.
fn once(fixture: &JoinedEnvoyFixture, random: &mut SmallRng) -> anyhow::Result<()> {
    let client = socket(&fixture.pods.dialler, Family::V4, Ids::APP, None)?;
    client.connect_timeout(&PodPair::app(Family::V4).into(), PATIENCE)?;
    let client = TcpStream::from(client);
    client.set_nonblocking(true)?;
    let seed = random.random();
    let length = 1_usize << random.random_range(0..21);
    let slow = random.random_range(0..4) == 0;
    if random.random_range(0..8) == 0 {
        // Closes before the end.
        send(&client, &stream(seed, 0, length.min(30_000)))?;
        return Ok(());
    }
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| -> anyhow::Result<()> {
            let (mut random, mut at) = (SmallRng::seed_from_u64(seed), 0);
            while at < length {
                let most = 1_usize << random.random_range(0..16);
                let piece = random.random_range(1..=most).min(length - at);
                send(&client, &stream(seed, at, piece))?;
                at += piece;
            }
            client.shutdown(Shutdown::Write)?;
            Ok(())
        });
        let (mut at, mut buffer) = (0, vec![0; 1 << 16]);
        let received = loop {
            if slow {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            match (&client).read(&mut buffer) {
                Ok(0) => {
                    break if at == length {
                        Ok(())
                    } else {
                        Err(anyhow::anyhow!("cut off after {at} bytes"))
                    };
                }
                Ok(read) => {
                    assert!(buffer[..read] == stream(seed, at, read), "other bytes at {at}");
                    at += read;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    // A connection that is stuck is neither complete nor cut off.
                    wait(&client, PollFlags::IN).expect("more, or the end");
                }
                Err(error) => break Err(error.into()),
            }
        };
        let sent = sender.join().expect("the sender");
        received.and(sent)
    })
}
