//! Envoys in two pods of one node, with joined connections between them: what applications send arrives.

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Read as _},
    net::{Shutdown, SocketAddr, TcpStream},
    process::{Child, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use rustix::event::PollFlags;
use socket2::Socket;
use tests::{
    actor::binary::{self, ReadableCopy},
    agent::{Agent, INIT_FLAGS, succeed},
    envoy::{self, Sidecar, Speaks},
    joined::{APP, Leg, PATIENCE, PodPair, send, socket, wait},
    testbed::{Ids, Sandbox},
};

struct JoinedEnvoyFixture {
    agent: Agent,
    pods: PodPair,
    program: ReadableCopy,
}

impl JoinedEnvoyFixture {
    fn new(label: &str) -> Self {
        let agent = Agent::new(label).expect("the agent");
        let pods = PodPair::new(label).expect("pods");
        let flags: Vec<_> = INIT_FLAGS.into_iter().chain(["--accelerate"]).collect();
        for pod in [&pods.dialler, &pods.acceptor] {
            agent.attach(pod, &flags).expect("attached");
        }
        let program = ReadableCopy::of(&envoy::program().expect("Envoy's binary")).expect("a copy");
        Self { agent, pods, program }
    }

    fn sidecars(&self, speaks: Speaks) -> [Sidecar; 2] {
        [&self.pods.dialler, &self.pods.acceptor]
            .map(|pod| Sidecar::start(&self.program, pod, speaks).expect("Envoy"))
    }

    fn joined(&self, pod: &Sandbox) -> u64 {
        let pods = self.agent.status().expect("status");
        let path = pod.cgroup.path().display().to_string();
        let pod = pods.as_array().expect("pods").iter().find(|pod| pod["cgroup"] == path.as_str());
        let counts = pod.expect("attached")["acceleration"]["connections"].clone();
        let count =
            counts.as_array().expect("counts").iter().find(|count| count["reason"] == "joined").cloned();
        count.map_or(0, |count| count["count"].as_u64().expect("a count"))
    }

    /// Bytes that have come from the dialling pod.
    fn bytes_on_the_wire(&self) -> u64 {
        let devices = || std::fs::read_to_string("/proc/thread-self/net/dev").expect("the interfaces");
        let devices = self.pods.router.netns.run(devices).expect("entered");
        let line =
            devices.lines().find_map(|line| line.trim().strip_prefix("pod1:")).expect("the pod's").to_owned();
        line.split_whitespace().next().expect("received bytes").parse().expect("a number")
    }

    /// The application of the accepting pod.
    fn app(&self, v6: bool) -> Socket {
        self.app_on(v6, APP)
    }

    fn app_on(&self, v6: bool, port: u16) -> Socket {
        let listener = socket(&self.pods.acceptor, v6, Ids::APP, None).expect("a socket");
        listener.set_reuse_address(true).expect("set");
        let any: SocketAddr = if v6 { ([0u16; 8], port).into() } else { ([0u8; 4], port).into() };
        listener.bind(&any.into()).expect("bound");
        listener.listen(1024).expect("listening");
        listener
    }

    /// Of an application of the dialling pod with that of the other, through both proxies.
    fn connect(&self, app: &Socket, v6: bool) -> Leg {
        let client = socket(&self.pods.dialler, v6, Ids::APP, None).expect("a socket");
        Leg::of(client, app, PodPair::app(v6)).expect("through both proxies")
    }
}

/// The byte at a position of a stream, so that lost, doubled or moved bytes are found.
fn stream(seed: u64, from: usize, length: usize) -> Vec<u8> {
    let byte = |at: usize| {
        let word = (at as u64 / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed);
        word.to_le_bytes()[at % 8]
    };
    (from..from + length).map(byte).collect()
}

/// Transfers one direction in odd pieces, with a reader that pauses sometimes, and then closes it.
fn one_way(from: &TcpStream, to: &TcpStream, seed: u64, length: usize) {
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

fn both_ways(leg: &Leg, seed: u64, length: usize) {
    std::thread::scope(|scope| {
        scope.spawn(|| one_way(&leg.accepted, &leg.dialled, seed ^ 1, length));
        one_way(&leg.dialled, &leg.accepted, seed, length);
    });
}

#[test]
fn what_is_sent_through_two_envoys_arrives_and_leaves_the_wire_alone() {
    const EACH: usize = 16 << 20;
    let fixture = JoinedEnvoyFixture::new("envoys");
    let _envoys = fixture.sidecars(Speaks::Tcp);
    for (n, v6) in [false, true].into_iter().enumerate() {
        let app = fixture.app(v6);
        let leg = fixture.connect(&app, v6);
        let before = fixture.bytes_on_the_wire();
        both_ways(&leg, 2 * n as u64 + 7, EACH);
        let wire = fixture.bytes_on_the_wire() - before;
        assert!(wire < EACH as u64 / 2, "{wire} bytes of {EACH} went over the wire");
        assert_eq!(fixture.joined(&fixture.pods.dialler), n as u64 + 1);
        assert_eq!(fixture.joined(&fixture.pods.acceptor), n as u64 + 1);
    }
}

struct ServerProcess(Child);

impl Drop for ServerProcess {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn requests_through_two_envoys_are_answered() {
    const REQUESTS: usize = 300;
    let fixture = JoinedEnvoyFixture::new("envoys-http");
    let original = binary::locate("http", "INTERCEPT_HTTP").expect("the HTTP program");
    let http = ReadableCopy::of(&original).expect("a copy");
    let addresses = ["0.0.0.0", "[::]"].map(|any| format!("{any}:{APP}"));
    let mut serve = fixture.pods.acceptor.command_as(http.path(), Ids::APP).expect("a command");
    let mut server =
        ServerProcess(serve.arg("serve").args(addresses).stdout(Stdio::piped()).spawn().expect("a server"));
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().expect("its output")).read_line(&mut line).expect("a line");
    let _envoys = fixture.sidecars(Speaks::Http);
    for v6 in [false, true] {
        for kind in ["fresh", "kept"] {
            let mut get = fixture.pods.dialler.command_as(http.path(), Ids::APP).expect("a command");
            get.args(["get", &PodPair::app(v6).to_string(), &REQUESTS.to_string(), kind]);
            succeed(get).expect("answered");
        }
    }
    // Envoy keeps few connections for many requests.
    assert!(fixture.joined(&fixture.pods.dialler) >= 2);
    assert_eq!(fixture.joined(&fixture.pods.dialler), fixture.joined(&fixture.pods.acceptor));
}

/// Connections that come and go in every way, several at a time, while proxies are killed and the agent attaches and
/// detaches: what is not cut off arrives, and nothing is stuck. `INTERCEPT_SOAK_SECONDS` says how long, ten seconds by
/// default.
#[test]
fn connections_come_and_go_in_every_way() {
    let seconds =
        std::env::var("INTERCEPT_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(10);
    let fixture = JoinedEnvoyFixture::new("envoys-soak");
    let [first, second] = fixture.sidecars(Speaks::Tcp);
    let app = fixture.app(false);
    app.set_nonblocking(true).expect("set");
    let until = Instant::now() + Duration::from_secs(seconds);
    let (whole, cut) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let flags: Vec<_> = INIT_FLAGS.into_iter().chain(["--accelerate"]).collect();
    std::thread::scope(|scope| {
        // Echoes until the end of the stream, and then ends its own.
        scope.spawn(|| {
            while Instant::now() < until + PATIENCE {
                let Ok((end, _)) = app.accept() else {
                    std::thread::park_timeout(Duration::from_millis(1));
                    continue;
                };
                scope.spawn(move || {
                    let end = TcpStream::from(end);
                    end.set_nonblocking(false).expect("set");
                    end.set_read_timeout(Some(PATIENCE)).expect("set");
                    // One that was cut off ends with an error.
                    drop(std::io::copy(&mut &end, &mut &end));
                    drop(end.shutdown(Shutdown::Write));
                });
            }
        });
        let workers: Vec<_> = (0..4_u64)
            .map(|worker| {
                let (fixture, whole, cut) = (&fixture, &whole, &cut);
                scope.spawn(move || {
                    let mut random = SmallRng::seed_from_u64(worker);
                    while Instant::now() < until {
                        match once(fixture, &mut random) {
                            Ok(()) => whole.fetch_add(1, Ordering::Relaxed),
                            Err(_cut_off) => {
                                // Refused at once, again and again, until Envoy is there.
                                std::thread::park_timeout(Duration::from_millis(50));
                                cut.fetch_add(1, Ordering::Relaxed)
                            }
                        };
                    }
                })
            })
            .collect();
        let mut envoys = [Some(first), Some(second)];
        let mut turn = 0;
        while Instant::now() < until {
            std::thread::park_timeout(Duration::from_millis(1500));
            let n = turn % 2;
            let pod = [&fixture.pods.dialler, &fixture.pods.acceptor][n];
            match turn / 2 % 3 {
                0 => {
                    envoys[n] = None;
                    envoys[n] = Some(Sidecar::start(&fixture.program, pod, Speaks::Tcp).expect("Envoy"));
                }
                1 => drop(fixture.agent.attach(pod, &INIT_FLAGS).expect("attached")),
                _ => drop(fixture.agent.attach(pod, &flags).expect("attached")),
            }
            turn += 1;
        }
        for worker in workers {
            worker.join().expect("what was not cut off arrived");
        }
    });
    let (whole, cut) = (whole.into_inner(), cut.into_inner());
    println!("{whole} connections whole, {cut} cut off by kills");
    assert!(whole > 20 && whole > cut, "{whole} whole, {cut} cut off");
    // In the end it is as in the beginning.
    for pod in [&fixture.pods.dialler, &fixture.pods.acceptor] {
        fixture.agent.attach(pod, &flags).expect("attached");
    }
    let _envoys = fixture.sidecars(Speaks::Tcp);
    let before = fixture.joined(&fixture.pods.acceptor);
    let app_again = fixture.app_on(false, APP + 1);
    let client = socket(&fixture.pods.dialler, false, Ids::APP, None).expect("a socket");
    let to = SocketAddr::new(PodPair::app(false).ip(), APP + 1);
    both_ways(&Leg::of(client, &app_again, to).expect("through both proxies"), 3, 1 << 20);
    assert_eq!(fixture.joined(&fixture.pods.acceptor), before + 1);
}

/// One connection: bytes there and back, compared; an error if it was cut off, a panic if other bytes came.
fn once(fixture: &JoinedEnvoyFixture, random: &mut SmallRng) -> anyhow::Result<()> {
    let client = socket(&fixture.pods.dialler, false, Ids::APP, None)?;
    client.connect_timeout(&PodPair::app(false).into(), PATIENCE)?;
    let client = TcpStream::from(client);
    client.set_nonblocking(true)?;
    let seed = random.random();
    let length = 1_usize << random.random_range(0..21);
    let slow = random.random_range(0..4) == 0;
    if random.random_range(0..8) == 0 {
        // Leaves in the middle.
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
                    // A connection that is stuck is neither whole nor cut off.
                    wait(&client, PollFlags::IN).expect("more, or the end");
                }
                Err(error) => break Err(error.into()),
            }
        };
        let sent = sender.join().expect("the sender");
        received.and(sent)
    })
}
