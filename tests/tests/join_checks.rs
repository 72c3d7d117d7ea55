//! The conditions for a message to bypass TCP. Each test violates one condition while all others hold, and is run with both
//! ways to read the reader's socket.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    net::{Shutdown, TcpStream},
    path::{Path, PathBuf},
};

use aya::programs::ProgramInfo;
use intercept_common::{Family, names};
use rustix::event::PollFlags;
use socket2::Socket;
use tests::{
    agent::Agent,
    joined::{self, Leg, PodPair, given_to_tcp, goes_past, receive, send, set_int, socket, wait},
    status::count_of,
    testbed::{Ids, Sandbox},
};

/// How the programs read the members of the reader's socket.
#[derive(Clone, Copy, PartialEq, Eq)]
enum CastSupport {
    /// By loads, if this kernel has `bpf_rdonly_cast`.
    Own,
    /// By a helper, as on a kernel that does not have it.
    Hidden,
}

impl CastSupport {
    fn label(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Hidden => "hidden",
        }
    }
}

/// Hides `bpf_rdonly_cast` in the types of the kernel that the agent reads.
const HIDDEN: &str = "set -e; mount -t tmpfs none /mnt; \
    LC_ALL=C sed s/bpf_rdonly_cast/bpf_rdonly_gone/g /sys/kernel/btf/vmlinux > /mnt/btf; \
    mount --bind /mnt/btf /sys/kernel/btf/vmlinux; exec \"$@\"";

macro_rules! conditions {
    ($($condition:ident,)*) => {
        mod by_loads {
            $(#[test] fn $condition() { super::$condition(super::CastSupport::Own); })*
        }
        mod by_a_helper {
            $(#[test] fn $condition() { super::$condition(super::CastSupport::Hidden); })*
        }
    };
}
conditions! {
    bytes_that_tcp_has_are_read_first,
    a_reader_that_blocks_is_served_by_tcp,
    low_water_is_kept,
    an_end_that_is_shut_is_told_so_by_tcp,
    unread_bytes_stop_the_sender,
    unread_messages_are_bounded_as_well,
    a_reader_without_memory_is_served_by_tcp,
}

#[test]
fn the_helper_is_used_where_there_is_no_cast() {
    let length = |support| {
        let fixture = JoinChecksFixture::new("cond-kernels", support);
        let folders = fs::read_dir(fixture.agent.store()).expect("a store");
        let mut paths = folders.map(|folder| folder.expect("an entry").path().join(names::JOIN_MSG));
        let pin = paths.find(|path| path.exists()).expect("the program");
        ProgramInfo::from_pin(pin).expect("opened").size_translated().expect("known to root")
    };
    assert_ne!(length(CastSupport::Own), length(CastSupport::Hidden), "both read in the same way");
}

struct JoinChecksFixture {
    agent: Agent,
    pods: PodPair,
    listener: Socket,
}

impl JoinChecksFixture {
    fn new(label: &str, support: CastSupport) -> Self {
        let label = &format!("{label}-{}", support.label());
        let mut agent = Agent::new(label).expect("the agent");
        if support == CastSupport::Hidden {
            agent.start_by(["unshare", "-m", "sh", "-c", HIDDEN, "--"].map(str::to_owned).to_vec());
        }
        let pods = PodPair::accelerated(label, &agent).expect("pods");
        let listener = pods.listen(Family::V4).expect("a listener");
        Self { agent, pods, listener }
    }

    fn joined(&self) -> Leg {
        let leg = self.pods.connect(&self.listener, PodPair::app(Family::V4)).expect("a connection");
        leg.greet().expect("greeted");
        assert!(is_past(&leg));
        leg
    }

    /// The number of connections of this pod that returned to TCP for a reason.
    fn back(&self, pod: &Sandbox, why: &str) -> u64 {
        count_of(&self.agent.acceleration_of(pod).expect("accelerated").back_to_tcp, why)
    }
}

fn is_past(leg: &Leg) -> bool {
    goes_past(&leg.dialled, &leg.accepted).expect("passed")
}

/// Sends until the socket would block. Returns the number of bytes.
fn fill(mut end: &TcpStream, piece: &[u8], most: usize) -> usize {
    let mut sent = 0;
    while sent < most {
        match end.write(piece) {
            Ok(written) => sent += written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("sending failed after {sent} bytes: {error}"),
        }
    }
    sent
}

fn bytes_that_tcp_has_are_read_first(support: CastSupport) {
    let fixture = JoinChecksFixture::new("cond-unread", support);
    let leg = fixture.joined();
    // The reader blocks for the moment, so this goes by TCP.
    leg.accepted.set_nonblocking(false).expect("set");
    send(&leg.dialled, b"by TCP ").expect("sent");
    leg.accepted.set_nonblocking(true).expect("set");
    wait(&leg.accepted, PollFlags::IN).expect("arrived");
    let before = given_to_tcp(&leg.dialled).expect("a count");
    send(&leg.dialled, b"and this ").expect("sent");
    assert_eq!(given_to_tcp(&leg.dialled).expect("a count") - before, 9, "it would have been read first");
    assert_eq!(receive(&leg.accepted, 7).expect("received"), b"by TCP ");
    send(&leg.dialled, b"too").expect("sent");
    assert_eq!(given_to_tcp(&leg.dialled).expect("a count") - before, 12, "it would have been read first");
    assert_eq!(receive(&leg.accepted, 12).expect("received"), b"and this too");
    assert!(is_past(&leg));
}

fn a_reader_that_blocks_is_served_by_tcp(support: CastSupport) {
    let fixture = JoinChecksFixture::new("cond-blocks", support);
    let leg = fixture.joined();
    leg.accepted.set_nonblocking(false).expect("set");
    assert!(!is_past(&leg));
    assert!(goes_past(&leg.accepted, &leg.dialled).expect("passed"), "the other direction is not concerned");
    assert_eq!(fixture.back(&fixture.pods.dialler, "reader_blocks"), 1);
    leg.accepted.set_nonblocking(true).expect("set");
    assert!(is_past(&leg));
    // Not accepted yet, so whether the reader blocks is unknown.
    let dialled = socket(&fixture.pods.dialler, Family::V4, Ids::PROXY, None).expect("a socket");
    dialled.connect(&PodPair::app(Family::V4).into()).expect("connected");
    let dialled = TcpStream::from(dialled);
    wait(&fixture.listener, PollFlags::IN).expect("arrived");
    let sent = |text: &[u8]| {
        let before = given_to_tcp(&dialled).expect("a count");
        send(&dialled, text).expect("sent");
        given_to_tcp(&dialled).expect("a count") - before
    };
    assert_eq!(sent(b"early"), 5);
}

fn low_water_is_kept(support: CastSupport) {
    let fixture = JoinChecksFixture::new("cond-lowat", support);
    let leg = fixture.joined();
    set_int(&leg.accepted, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 10).expect("set");
    assert!(!is_past(&leg));
    assert_eq!(fixture.back(&fixture.pods.dialler, "reader_low_water"), 1);
    set_int(&leg.accepted, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 1).expect("set");
    assert!(is_past(&leg));
}

fn an_end_that_is_shut_is_told_so_by_tcp(support: CastSupport) {
    let fixture = JoinChecksFixture::new("cond-shut", support);
    let leg = fixture.joined();
    leg.dialled.shutdown(Shutdown::Write).expect("shut down");
    let error = (&leg.dialled).write(b"more").expect_err("it was shut down");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    // The other direction is open.
    assert!(goes_past(&leg.accepted, &leg.dialled).expect("passed"));

    // The reader has shut its receiving side: TCP decides what happens to the bytes.
    let leg = fixture.joined();
    leg.accepted.shutdown(Shutdown::Read).expect("shut down");
    let before = given_to_tcp(&leg.dialled).expect("a count");
    send(&leg.dialled, b"unwanted").expect("sent");
    assert_eq!(given_to_tcp(&leg.dialled).expect("a count") - before, 8);
    assert_eq!(fixture.back(&fixture.pods.dialler, "peer_closed"), 1);
}

fn unread_bytes_stop_the_sender(support: CastSupport) {
    const MOST: usize = 2 << 20;
    let fixture = JoinChecksFixture::new("cond-bytes", support);
    let leg = fixture.joined();
    // As with TCP.
    set_int(&leg.dialled, libc::SOL_SOCKET, libc::SO_SNDBUF, 128 << 10).expect("set");
    set_int(&leg.accepted, libc::SOL_SOCKET, libc::SO_RCVBUF, 128 << 10).expect("set");
    for piece in [100, 16 << 10, 512 << 10] {
        let before = given_to_tcp(&leg.dialled).expect("a count");
        let sent = fill(&leg.dialled, &vec![1; piece], 64 << 20);
        let by_tcp = given_to_tcp(&leg.dialled).expect("a count") - before;
        let past = sent - usize::try_from(by_tcp).expect("fits");
        assert!(past > 0 && past <= 1 << 20, "{past} bytes past TCP in pieces of {piece}");
        assert!(sent <= MOST, "{sent} bytes in pieces of {piece}");
        // It continues when the reader reads.
        receive(&leg.accepted, sent).expect("received");
        wait(&leg.dialled, PollFlags::OUT).expect("room");
        // After EAGAIN the kernel keeps the last verdict, which was TCP's, for one message more.
        leg.greet().expect("greeted");
        assert!(
            is_past(&leg),
            "it does not join again after pieces of {piece}: {:?}",
            joined::last(&fixture.agent, &leg.dialled)
        );
    }
}

fn unread_messages_are_bounded_as_well(support: CastSupport) {
    const SENT: usize = 20_000;
    let fixture = JoinChecksFixture::new("cond-messages", support);
    let leg = fixture.joined();
    for round in 0..3 {
        let before = given_to_tcp(&leg.dialled).expect("a count");
        let sent = fill(&leg.dialled, &[1], SENT);
        let past =
            sent - usize::try_from(given_to_tcp(&leg.dialled).expect("a count") - before).expect("fits");
        assert!((200..=256).contains(&past), "{past} messages of {sent} in round {round}");
        receive(&leg.accepted, sent).expect("received");
        assert!(is_past(&leg));
    }
    assert!(fixture.back(&fixture.pods.dialler, "unread_messages") >= 3);

    // A reader that is always a hundred messages behind does not stop the sender.
    let mut late = 0;
    let before = given_to_tcp(&leg.dialled).expect("a count");
    for _ in 0..5_000 {
        send(&leg.dialled, b"12345678").expect("sent");
        late += 1;
        if late > 100 {
            receive(&leg.accepted, 8).expect("received");
            late -= 1;
        }
    }
    assert_eq!(given_to_tcp(&leg.dialled).expect("a count"), before, "it went back to TCP");
}

/// A cgroup of version 1, which has the memory controller on this machine.
struct MemoryCgroup(PathBuf);

impl MemoryCgroup {
    fn new(label: &str) -> Self {
        let name = format!("intercept-test.{}.{label}", std::process::id());
        let path = Path::new("/sys/fs/cgroup/memory").join(name);
        fs::create_dir(&path).expect("a memory cgroup of version 1");
        Self(path)
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        drop(fs::remove_dir(&self.0));
    }
}

fn a_reader_without_memory_is_served_by_tcp(support: CastSupport) {
    let fixture = JoinChecksFixture::new("cond-memory", support);
    let memory = MemoryCgroup::new(support.label());
    let limit = memory.0.join("memory.kmem.tcp.limit_in_bytes");
    fs::write(&limit, (16 << 20).to_string()).expect("a limit");
    // The end that reads is the one that dials: its socket is charged from the start.
    let dialled = socket(&fixture.pods.dialler, Family::V4, Ids::PROXY, Some(&memory.0)).expect("a socket");
    let leg = Leg::of(dialled, &fixture.listener, PodPair::app(Family::V4)).expect("a connection");
    leg.greet().expect("greeted");
    assert!(goes_past(&leg.accepted, &leg.dialled).expect("passed"));
    // Little is left, and less than a message.
    fs::write(&limit, (128 << 10).to_string()).expect("a limit");
    let before = given_to_tcp(&leg.accepted).expect("a count");
    let sent = fill(&leg.accepted, &vec![1; 200_000], 4 << 20);
    assert!(given_to_tcp(&leg.accepted).expect("a count") > before);
    receive(&leg.dialled, sent.min(50_000)).expect("received");
    assert_eq!(fixture.back(&fixture.pods.acceptor, "reader_memory"), 1);
}
