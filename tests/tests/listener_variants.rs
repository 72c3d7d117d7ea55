//! The proxy's listening sockets in every mixture of families and addresses, under iptables and under the agent: who gets
//! a connection from outside.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use intercept_common::Family;

use tests::actor::{Actor, Bind, Dial, DialOutcome, Listen, Listening, Transport};
use tests::differential::Capture;
use tests::iptables::{Backend, IptablesOptions};
use tests::testbed::{Ids, Pod, PodSpec};

/// What is done before it is looked who answers.
#[derive(Debug, Clone, Copy)]
enum Do {
    /// A listener of this name at an address.
    Listen(&'static str, &'static str),
    /// One at `::` that takes IPv4 as well.
    ListenDual(&'static str),
    /// All of this name are closed.
    Close(&'static str),
    /// These answer over IPv4 and over IPv6, `-` for nobody.
    Answers(&'static str, &'static str),
}

use Do::{Answers, Close, ListenDual};

const FOUR: &str = "0.0.0.0";
const SIX: &str = "::";

struct ListenerVariantsFixture {
    inside: Actor,
    world: Actor,
    pod: Pod,
    open: Vec<(&'static str, Listening)>,
}

impl ListenerVariantsFixture {
    fn new() -> Self {
        let pod = Pod::new(PodSpec::new("mixed")).expect("a pod");
        let inside = Actor::start(&pod).expect("an actor");
        let world = Actor::start(pod.neighbour()).expect("an actor");
        Self { inside, world, pod, open: Vec::new() }
    }

    fn listen(&mut self, name: &'static str, at: &str) {
        let at: IpAddr = at.parse().expect("an address");
        self.listen_as(name, Bind { v6only: true, ..Bind::new(Ids::PROXY, SocketAddr::new(at, 15006)) });
    }

    fn listen_dual(&mut self, name: &'static str) {
        let at = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 15006);
        self.listen_as(name, Bind { v6only: false, ..Bind::new(Ids::PROXY, at) });
    }

    fn listen_as(&mut self, name: &'static str, bind: Bind) {
        let bind = Bind { reuseport: true, ..bind };
        let listen = Listen { name: name.into(), transport: Transport::Tcp, bind };
        self.open.push((name, self.inside.listen(listen).expect("a listener")));
    }

    fn close(&mut self, name: &str) {
        let (gone, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.open).into_iter().partition(|(other, _)| *other == name);
        self.open = left;
        for (_, listening) in gone {
            self.inside.close(listening).expect("closed");
        }
    }

    /// Whoever answers, of some connections.
    fn answers(&self, family: Family) -> String {
        let to = SocketAddr::new(self.pod.address(family), 8080);
        let one = || match self.world.dial(Dial::new(Ids::ROOT, to)).expect("dialled").outcome {
            DialOutcome::Answered(answer) => answer.server,
            DialOutcome::Refused => "-".to_owned(),
            other => format!("{other:?}"),
        };
        let names: BTreeSet<String> = (0..16).map(|_| one()).collect();
        names.into_iter().collect::<Vec<_>>().join(" ")
    }
}

fn check(script: &[Do]) {
    let agent = Capture::agent().expect("the agent");
    let iptables = Capture::Iptables(Backend::Nft);
    // Attached before the first, and before the last look.
    for (capture, late) in [(&iptables, 0), (&agent, 0), (&agent, script.len() - 1)] {
        let mut fixture = ListenerVariantsFixture::new();
        let mut captured = None;
        for (i, step) in script.iter().enumerate() {
            if i == late {
                captured = Some(capture.start(&IptablesOptions::injected(), &fixture.pod).expect("captured"));
            }
            match *step {
                Do::Listen(name, at) => fixture.listen(name, at),
                ListenDual(name) => fixture.listen_dual(name),
                Close(name) => fixture.close(name),
                Answers(..) if captured.is_none() => {}
                Answers(v4, v6) => {
                    let seen = (fixture.answers(Family::V4), fixture.answers(Family::V6));
                    assert_eq!(seen, (v4.to_owned(), v6.to_owned()), "{capture:?}, step {i} of {script:?}");
                }
            }
        }
        captured.expect("captured").stop().expect("stopped");
    }
}

#[test]
fn one_socket_of_both_families_takes_both() {
    check(&[ListenDual("dual"), Answers("dual", "dual"), Close("dual"), Answers("-", "-")]);
}

#[test]
fn a_socket_of_ipv4_comes_before_one_of_both() {
    check(&[
        ListenDual("dual"),
        Do::Listen("four", FOUR),
        Answers("four", "dual"),
        Close("four"),
        Answers("dual", "dual"),
        Do::Listen("again", FOUR),
        Close("dual"),
        Answers("again", "-"),
    ]);
}

#[test]
fn a_socket_of_ipv6_alone_takes_no_ipv4() {
    check(&[
        Do::Listen("four", FOUR),
        Do::Listen("six", SIX),
        Answers("four", "six"),
        Close("four"),
        Answers("-", "six"),
    ]);
}

/// Three kinds at once, of which one is older and one is newer.
#[test]
fn mixtures_are_handed_over() {
    check(&[
        Do::Listen("six", SIX),
        Do::Listen("four", FOUR),
        Answers("four", "six"),
        Do::Listen("newer", FOUR),
        Do::Listen("newer", SIX),
        Close("four"),
        Close("six"),
        Answers("newer", "newer"),
    ]);
    check(&[
        Do::Listen("old", FOUR),
        Do::Listen("old", FOUR),
        Do::Listen("new", FOUR),
        ListenDual("dual"),
        Close("old"),
        Answers("new", "dual"),
        Close("new"),
        Answers("dual", "dual"),
    ]);
}

#[test]
fn one_on_the_pods_own_address_will_do() {
    check(&[
        Do::Listen("own", "10.66.0.2"),
        Answers("own", "-"),
        Do::Listen("six", "fd66::2"),
        Answers("own", "six"),
    ]);
}
