//! Joined connections: which are joined, which never are, and that the stream does not change.

use std::{
    io::{ErrorKind, Read as _},
    net::{Shutdown, SocketAddr, TcpStream},
    os::fd::OwnedFd,
    process::Child,
    time::{Duration, Instant},
};

use intercept_common::{Family, names};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use rustix::event::PollFlags;
use socket2::{SockAddr, Socket};
use tests::{
    agent::{Agent, INIT_FLAGS, succeed},
    joined::{
        self, APP, Leg, PodPair, given_to_tcp, goes_past, listen, own_name, pass, receive, send, socket, wait,
    },
    status::count_of,
    testbed::{Ids, Sandbox},
};

fn fixture(label: &str) -> (Agent, PodPair) {
    let agent = Agent::new(label).expect("the agent");
    let pods = PodPair::accelerated(label, &agent).expect("pods");
    (agent, pods)
}

/// A count of a pod's `acceleration` in `status`.
fn count(agent: &Agent, pod: &Sandbox, list: &str, what: &str) -> u64 {
    let acceleration = agent.acceleration_of(pod).expect("accelerated");
    match list {
        "connections" => count_of(&acceleration.connections, what),
        "back_to_tcp" => count_of(&acceleration.back_to_tcp, what),
        other => panic!("{other} is no list of counts"),
    }
}

fn is_joined(leg: &Leg) -> bool {
    let (there, back) = (goes_past(&leg.dialled, &leg.accepted), goes_past(&leg.accepted, &leg.dialled));
    let (there, back) = (there.expect("passed"), back.expect("passed"));
    assert_eq!(there, back, "only one direction is joined");
    there
}

fn joined_leg(pods: &PodPair, family: Family) -> Leg {
    let listener = pods.listen(family).expect("a listener");
    let leg = pods.connect(&listener, PodPair::app(family)).expect("a connection");
    leg.greet().expect("greeted");
    assert!(is_joined(&leg));
    leg
}

#[test]
fn proxies_of_one_node_are_joined_in_both_families() {
    let (agent, pods) = fixture("join");
    let four = pods.listen(Family::V4).expect("a listener");
    let leg = pods.connect(&four, PodPair::app(Family::V4)).expect("a connection");
    leg.greet().expect("greeted");
    assert!(is_joined(&leg));
    drop(four);
    // One IPv6 listener for both families.
    let both = pods.listen(Family::V6).expect("a listener");
    for family in Family::ALL {
        let leg = pods.connect(&both, PodPair::app(family)).expect("a connection");
        leg.greet().expect("greeted");
        assert!(is_joined(&leg), "{family:?}");
    }
    assert_eq!(count(&agent, &pods.dialler, "connections", "joined"), 3);
    assert_eq!(count(&agent, &pods.acceptor, "connections", "joined"), 3);
    // The first answer goes past TCP, since all that came by it has been read.
    let leg = pods.connect(&both, PodPair::app(Family::V6)).expect("a connection");
    pass(&leg.dialled, &leg.accepted, b"first").expect("passed");
    assert!(goes_past(&leg.accepted, &leg.dialled).expect("passed"));
}

#[test]
fn where_many_end_after_one_message_most_stay_on_tcp() {
    const NUMBER: u64 = 300;
    let (agent, pods) = fixture("join-short");
    let listener = pods.listen(Family::V4).expect("a listener");
    let connections = |messages: usize| {
        for _ in 0..NUMBER {
            let leg = pods.connect(&listener, PodPair::app(Family::V4)).expect("a connection");
            for _ in 0..messages {
                pass(&leg.dialled, &leg.accepted, b"request").expect("passed");
            }
        }
    };
    let count = |what| count(&agent, &pods.dialler, "connections", what);
    connections(2);
    assert_eq!((count("joined"), count("short")), (NUMBER, 0));
    // The first of them are joined, and one of sixteen (or of eight, by the ports that the kernel chooses) of the others.
    connections(1);
    let (joined, short) = (count("joined") - NUMBER, count("short"));
    assert_eq!(joined + short, NUMBER);
    assert!((64..64 + 70).contains(&joined), "{joined} joined");
    // Soon after the last of them the next is joined again.
    std::thread::sleep(Duration::from_millis(2500));
    let leg = pods.connect(&listener, PodPair::app(Family::V4)).expect("a connection");
    leg.greet().expect("greeted");
    assert!(is_joined(&leg));
}

#[test]
fn a_listener_that_was_there_before_is_known() {
    let agent = Agent::new("join-before").expect("the agent");
    let pods = PodPair::new("join-before").expect("pods");
    let (listener, holder) = held(&pods, Ids::PROXY);
    let names = format!("{},sleep", own_name().expect("a name"));
    let flags: Vec<_> =
        INIT_FLAGS.into_iter().chain(["--accelerate", "--accelerate-proxies", &names]).collect();
    for pod in [&pods.dialler, &pods.acceptor] {
        agent.attach(pod, &flags).expect("attached");
    }
    let leg = pods.connect(&listener, PodPair::app(Family::V4)).expect("a connection");
    leg.greet().expect("greeted");
    assert!(is_joined(&leg));
    // A listener of another user is not joined, nor one of an executable that is not in the list.
    drop((leg, listener, holder));
    let own = own_name().expect("a name");
    for (ids, names) in [(Ids::APP, &names), (Ids::PROXY, &own)] {
        agent.detach(&pods.acceptor).expect("detached");
        let (listener, _holder) = held(&pods, ids);
        let flags: Vec<_> =
            INIT_FLAGS.into_iter().chain(["--accelerate", "--accelerate-proxies", names]).collect();
        agent.attach(&pods.acceptor, &flags).expect("attached");
        let leg = pods.connect(&listener, PodPair::app(Family::V4)).expect("a connection");
        leg.greet().expect("greeted");
        assert!(!is_joined(&leg), "{ids:?} {names}");
    }
}

/// A listener that is shared with a process of the accepting pod, and that process.
fn held(pods: &PodPair, ids: Ids) -> (Socket, Holder) {
    let listener = listen(&pods.acceptor, Family::V4, ids).expect("a listener");
    let also = OwnedFd::from(listener.try_clone().expect("a copy"));
    let mut command = pods.acceptor.command("sleep").expect("a command");
    let holder = command.arg("1000").stdin(also).spawn().expect("a process");
    (listener, Holder(holder))
}

struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn applications_and_unknown_proxies_are_not_joined() {
    let (agent, pods) = fixture("join-whose");
    let listener = pods.listen(Family::V4).expect("a listener");
    // The application of the accelerated pod, as if it were excluded: straight to the other proxy.
    let name = own_name().expect("a name");
    let straight: Vec<_> = INIT_FLAGS
        .into_iter()
        .chain(["-x", "10.72.0.0/24", "--accelerate", "--accelerate-proxies", &name])
        .collect();
    agent.attach(&pods.dialler, &straight).expect("attached");
    let app = socket(&pods.dialler, Family::V4, Ids::APP, None).expect("a socket");
    let leg = Leg::of(app, &listener, PodPair::app(Family::V4)).expect("a connection");
    leg.greet().expect("greeted");
    assert!(!is_joined(&leg), "an application's socket was joined");
    // An executable that is not in the list.
    let known: Vec<_> = INIT_FLAGS.into_iter().chain(["--accelerate"]).collect();
    agent.attach(&pods.dialler, &known).expect("attached");
    let leg = pods.connect(&listener, PodPair::app(Family::V4)).expect("a connection");
    leg.greet().expect("greeted");
    assert!(!is_joined(&leg), "an unknown executable was joined");
    assert_eq!(count(&agent, &pods.dialler, "connections", "refused_proxy"), 1);
    // A listener of another user.
    agent.attach(&pods.dialler, &straight).expect("attached");
    drop(listener);
    let others = listen(&pods.acceptor, Family::V4, Ids::APP).expect("a listener");
    let leg = pods.connect(&others, PodPair::app(Family::V4)).expect("a connection");
    leg.greet().expect("greeted");
    assert!(!is_joined(&leg), "an application's listener was joined");
    // A pod without --accelerate.
    drop(others);
    let listener = pods.listen(Family::V4).expect("a listener");
    agent.attach(&pods.acceptor, &INIT_FLAGS).expect("attached");
    let leg = pods.connect(&listener, PodPair::app(Family::V4)).expect("a connection");
    leg.greet().expect("greeted");
    assert!(!is_joined(&leg), "a pod without --accelerate was joined");
}

#[test]
fn it_is_joined_behind_dnat_and_tcp_with_syn_cookies() {
    let (_agent, pods) = fixture("join-dnat");
    let rules = "*nat\n-A PREROUTING -d 10.96.0.10/32 -p tcp --dport 80 -j DNAT --to-destination 10.72.0.2:8080\nCOMMIT\n";
    iptables(&pods.router, rules);
    let listener = pods.listen(Family::V4).expect("a listener");
    let service: SocketAddr = "10.96.0.10:80".parse().expect("an address");
    // With cookies the kernel keeps nothing of a SYN, and the end that dials does not learn in time who got it.
    for (cookies, is_to_be) in [("1", true), ("2", false), ("1", true)] {
        pods.acceptor.netns.sysctl("net/ipv4/tcp_syncookies", cookies).expect("set");
        let leg = pods.connect(&listener, service).expect("a connection");
        leg.greet().expect("greeted");
        assert_eq!(is_joined(&leg), is_to_be, "tcp_syncookies = {cookies}");
        assert_eq!(leg.dialled.peer_addr().expect("a peer"), service);
        assert_eq!(leg.accepted.local_addr().expect("an address").port(), APP);
    }
}

fn iptables(sandbox: &Sandbox, rules: &str) {
    use std::io::Write as _;
    let mut restore = sandbox.command("iptables-restore").expect("a command");
    let mut child = restore.stdin(std::process::Stdio::piped()).spawn().expect("iptables");
    child.stdin.take().expect("its input").write_all(rules.as_bytes()).expect("written");
    assert!(child.wait().expect("ended").success());
}

/// Two pairs of pods with the same addresses, and connections with the same ports at the same time.
#[test]
fn pods_with_equal_addresses_and_ports_are_never_crossed() {
    let agent = Agent::new("join-twins").expect("the agent");
    let twins =
        ["one", "two"].map(|label| PodPair::accelerated(&format!("join-{label}"), &agent).expect("pods"));
    let listeners = [&twins[0], &twins[1]].map(|pods| pods.listen(Family::V4).expect("a listener"));
    for round in 0..100_u16 {
        // The same ports again and again, too.
        let from = SocketAddr::from(([10, 71, 0, 2], 40_000 + round % 7));
        let dialled = [&twins[0], &twins[1]].map(|pods| {
            let dialled = socket(&pods.dialler, Family::V4, Ids::PROXY, None).expect("a socket");
            dialled.set_reuse_address(true).expect("set");
            dialled.set_linger(Some(Duration::ZERO)).expect("set");
            dialled.bind(&SockAddr::from(from)).expect("bound");
            dialled.set_nonblocking(true).expect("set");
            dialled
        });
        // Both SYNs before either is accepted.
        for socket in &dialled {
            let error =
                socket.connect(&SockAddr::from(PodPair::app(Family::V4))).expect_err("it takes a while");
            assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
        }
        let mut legs = Vec::new();
        for (dialled, listener) in dialled.into_iter().zip(&listeners) {
            wait(&dialled, PollFlags::OUT).expect("connected");
            legs.push(Leg::accepted(dialled, listener).expect("accepted"));
        }
        assert_eq!(legs[0].dialled.local_addr().expect("a"), legs[1].dialled.local_addr().expect("b"));
        for (n, leg) in legs.iter().enumerate() {
            for more in 0..3 {
                let text = format!("{n} {round} {more}");
                pass(&leg.dialled, &leg.accepted, text.as_bytes()).expect("its own");
                pass(&leg.accepted, &leg.dialled, text.as_bytes()).expect("its own");
            }
            assert!(is_joined(leg), "round {round}, pair {n}");
        }
    }
}

/// Data in the SYN shifts the sequence numbers, so such a connection stays with TCP.
#[test]
fn fast_open_with_data_stays_tcp() {
    let (_agent, pods) = fixture("join-tfo");
    for pod in [&pods.dialler, &pods.acceptor] {
        // Both ways, without a cookie.
        pod.netns.sysctl("net/ipv4/tcp_fastopen", "1543").expect("Fast Open");
    }
    let listener = pods.listen(Family::V4).expect("a listener");
    joined::set_int(&listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 16).expect("set");
    let dialled = socket(&pods.dialler, Family::V4, Ids::PROXY, None).expect("a socket");
    let sent = dialled
        .send_to_with_flags(b"early", &SockAddr::from(PodPair::app(Family::V4)), libc::MSG_FASTOPEN)
        .expect("sent in the SYN");
    assert_eq!(sent, 5);
    let leg = Leg::accepted(dialled, &listener).expect("accepted");
    assert_eq!(receive(&leg.accepted, 5).expect("received"), b"early");
    for _ in 0..3 {
        leg.greet().expect("greeted");
    }
    assert!(!is_joined(&leg));
    // Without data it is joined as any other.
    let leg = pods.connect(&listener, PodPair::app(Family::V4)).expect("a connection");
    leg.greet().expect("greeted");
    assert!(is_joined(&leg));
}

/// Odd sizes in both directions, with a reader that pauses, so that the connection switches to TCP and back: every byte
/// arrives once and in order.
#[test]
fn nothing_is_lost_doubled_or_out_of_order() {
    const EACH: usize = 24 << 20;
    let (agent, pods) = fixture("join-order");
    for family in Family::ALL {
        let leg = joined_leg(&pods, family);
        let way = |from: &TcpStream, to: &TcpStream, seed: u64| {
            let mut by_tcp = given_to_tcp(from).expect("a count");
            std::thread::scope(|scope| {
                let sender = scope.spawn(move || {
                    let (mut random, mut at) = (SmallRng::seed_from_u64(seed), 0);
                    while at < EACH {
                        let most = 1_usize << random.random_range(0..18);
                        let length = random.random_range(1..=most).min(EACH - at);
                        send(from, &stream(seed, at, length)).expect("sent");
                        at += length;
                    }
                });
                let (mut random, mut at, mut buffer) = (SmallRng::seed_from_u64(!seed), 0, vec![0; 1 << 18]);
                let mut pauses = [0, EACH / 4, EACH / 2].into_iter().peekable();
                while at < EACH {
                    if pauses.next_if(|pause| *pause <= at).is_some() {
                        // Until the queue is full, and something has gone by TCP since the last time.
                        let deadline = Instant::now() + joined::PATIENCE;
                        while given_to_tcp(from).expect("a count") == by_tcp {
                            assert!(Instant::now() < deadline, "nothing goes by TCP although nobody reads");
                            std::thread::yield_now();
                        }
                        by_tcp = given_to_tcp(from).expect("a count");
                    }
                    let most = random.random_range(1..=buffer.len());
                    match { to }.read(&mut buffer[..most]) {
                        Ok(0) => panic!("the stream ended after {at} bytes"),
                        Ok(read) => {
                            assert!(buffer[..read] == stream(seed, at, read), "other bytes at {at}");
                            at += read;
                        }
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {
                            wait(to, PollFlags::IN).expect("more")
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                sender.join().expect("sent");
            });
        };
        std::thread::scope(|scope| {
            let back = scope.spawn(|| way(&leg.accepted, &leg.dialled, 1));
            way(&leg.dialled, &leg.accepted, 2);
            back.join().expect("received");
        });
        let by_tcp = given_to_tcp(&leg.dialled).expect("a count");
        assert!(by_tcp > 0 && by_tcp < EACH as u64, "{by_tcp} bytes went by TCP: not both ways were taken");
    }
    let back: u64 = ["unread_bytes", "unread_messages"]
        .iter()
        .map(|why| count(&agent, &pods.dialler, "back_to_tcp", why))
        .sum();
    assert!(back > 0, "no connection ever went back to TCP");
}

fn stream(seed: u64, from: usize, length: usize) -> Vec<u8> {
    let byte = |at: usize| {
        let word = (at as u64 / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed);
        word.to_le_bytes()[at % 8]
    };
    (from..from + length).map(byte).collect()
}

#[test]
fn closing_is_seen_as_by_tcp() {
    let (_agent, pods) = fixture("join-close");
    let mut byte = [0];
    // One end says that it has sent everything: what it sent is read first, and the other goes on.
    let leg = joined_leg(&pods, Family::V4);
    send(&leg.dialled, &[7; 100_000]).expect("sent");
    leg.dialled.shutdown(Shutdown::Write).expect("shut down");
    assert_eq!(receive(&leg.accepted, 100_000).expect("received"), [7; 100_000]);
    wait(&leg.accepted, PollFlags::IN).expect("the end");
    assert_eq!((&leg.accepted).read(&mut byte).expect("the end"), 0);
    assert!(goes_past(&leg.accepted, &leg.dialled).expect("passed"));
    let error = rustix::io::write(&leg.dialled, b"more").expect_err("it was shut down");
    assert_eq!(error, rustix::io::Errno::PIPE);
    drop(leg.accepted);
    wait(&leg.dialled, PollFlags::IN).expect("the end");
    assert_eq!((&leg.dialled).read(&mut byte).expect("the end"), 0);

    // One end is reset.
    let leg = joined_leg(&pods, Family::V4);
    rustix::net::sockopt::set_socket_linger(&leg.dialled, Some(Duration::ZERO)).expect("set");
    drop(leg.dialled);
    wait(&leg.accepted, PollFlags::IN).expect("the reset");
    let error = (&leg.accepted).read(&mut byte).expect_err("it was reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    // One end is closed; the other may still send for a while, and then learns it.
    let leg = joined_leg(&pods, Family::V4);
    drop(leg.accepted);
    wait(&leg.dialled, PollFlags::IN).expect("the end");
    let mut sent = 0;
    let error = loop {
        match rustix::io::write(&leg.dialled, b"more") {
            Ok(_) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 1_000_000, "a connection whose other end is closed takes everything");
    };
    assert!([rustix::io::Errno::PIPE, rustix::io::Errno::CONNRESET].contains(&error), "{error}");
}

#[test]
fn a_switch_takes_effect_at_the_next_message() {
    let (agent, pods) = fixture("join-switch");
    let leg = joined_leg(&pods, Family::V4);
    let switch = |to: &str| {
        let mut command = agent.command("accelerate");
        command.arg(to);
        succeed(command).expect("switched");
    };
    // What waits is read all the same, and before what follows.
    send(&leg.dialled, b"past ").expect("sent");
    switch("off");
    send(&leg.dialled, b"by TCP").expect("sent");
    assert_eq!(receive(&leg.accepted, 11).expect("received"), b"past by TCP");
    assert!(!is_joined(&leg));
    assert_eq!(count(&agent, &pods.dialler, "back_to_tcp", "switched_off"), 1);
    switch("on");
    assert!(is_joined(&leg));
    // That of a pod, for either end.
    agent.attach(&pods.acceptor, &INIT_FLAGS).expect("attached");
    assert!(!is_joined(&leg));
    let name = own_name().expect("a name");
    let flags: Vec<_> =
        INIT_FLAGS.into_iter().chain(["--accelerate", "--accelerate-proxies", &name]).collect();
    agent.attach(&pods.acceptor, &flags).expect("attached");
    assert!(is_joined(&leg));
    // Detached with bytes that wait: they are read, and the connection goes on.
    send(&leg.dialled, b"past ").expect("sent");
    for pod in [&pods.acceptor, &pods.dialler] {
        agent.detach(pod).expect("detached");
    }
    assert!(!agent.bpffs().join("intercept").exists());
    send(&leg.dialled, b"by TCP").expect("sent");
    assert_eq!(receive(&leg.accepted, 11).expect("received"), b"past by TCP");
    assert!(!is_joined(&leg));
}

#[test]
fn status_shows_the_active_acceleration_until_it_ends() {
    let (agent, pods) = fixture("join-told");
    let name = own_name().expect("a name");
    let flags: Vec<_> =
        INIT_FLAGS.into_iter().chain(["--accelerate", "--accelerate-proxies", &name]).collect();
    let said = agent.attach(&pods.dialler, &flags).expect("attached");
    assert!(said.starts_with("unchanged"), "{said}");
    assert_eq!(agent.acceleration_of(&pods.dialler).expect("accelerated").state, "on");
    let path = pods.dialler.cgroup.path();
    let pod = || agent.pods().expect("status").into_iter().find(|pod| pod.cgroup == path).expect("attached");
    let link = agent.store().join("pods").join(pod().netns_cookie.to_string()).join(names::JOIN_OPS);
    assert!(link.exists());
    agent.attach(&pods.dialler, &INIT_FLAGS).expect("attached");
    assert!(!link.exists());
    assert_eq!(pod().acceleration, None);
    agent.detach_all().expect("detached");
    assert!(!agent.bpffs().join("intercept").exists());
}

#[test]
fn the_cases_for_other_kernels_hold_here() {
    let said = joined::cases::run().expect("they hold");
    assert_eq!(said, "joined, 5 cases");
}

#[test]
fn offers_go_with_the_option() {
    let (agent, pods) = fixture("join-offers");
    let before = joined::footprint(&agent).expect("the maps");
    let listener = pods.listen(Family::V4).expect("a listener");
    // The end that dialled learns of the other when it sends, which these do not.
    let legs: Vec<_> =
        (0..5).map(|_| pods.connect(&listener, PodPair::app(Family::V4)).expect("a connection")).collect();
    let open = joined::footprint(&agent).expect("the maps");
    assert!(open[0] > before[0] && open[1] > before[1], "{open:?}, before {before:?}");
    agent.attach(&pods.dialler, &INIT_FLAGS).expect("attached");
    drop(legs);
    let deadline = Instant::now() + joined::PATIENCE;
    while joined::footprint(&agent).expect("the maps") != before {
        let now = joined::footprint(&agent).expect("the maps");
        assert!(Instant::now() < deadline, "{now:?} bytes in the maps, before {before:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
