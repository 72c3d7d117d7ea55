//! A pod in which everything listens, and the outside world.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tests::actor::{Actor, Bind, Dial, DialOutcome, Dialled, Listen, Transport};
use tests::testbed::{Ids, Pod, PodSpec};

/// The proxy listens on its two ports, the application on 8080, and the world on [`WORLD`].
pub(crate) struct SystemFixture {
    pub(crate) inside: Actor,
    pub(crate) world: Actor,
    // Last, so that processes end before the namespaces are removed.
    pub(crate) pod: Pod,
}

/// The ports of the world.
pub(crate) const WORLD: [u16; 3] = [80, 81, 82];

impl SystemFixture {
    pub(crate) fn new(spec: PodSpec) -> Self {
        let pod = Pod::new(spec).expect("a pod");
        let inside = Actor::start(&pod).expect("an actor");
        let world = Actor::start(pod.neighbour()).expect("an actor");
        let fixture = Self { inside, world, pod };
        for any in ["0.0.0.0", "::"] {
            let any: IpAddr = any.parse().expect("an address");
            listen(&fixture.inside, "outbound", Ids::PROXY, SocketAddr::new(any, 15001));
            listen(&fixture.inside, "inbound", Ids::PROXY, SocketAddr::new(any, 15006));
            listen(&fixture.inside, "app", Ids::APP, SocketAddr::new(any, 8080));
            for port in WORLD {
                listen(&fixture.world, "world", Ids::ROOT, SocketAddr::new(any, port));
            }
        }
        fixture
    }

    /// The server that answers the application.
    pub(crate) fn outbound(&self, to: &str) -> String {
        who(&self.inside.dial(Dial::new(Ids::APP, addr(to))).expect("dialled"))
    }

    /// The server that answers a client in the world.
    pub(crate) fn inbound(&self, to: &str) -> String {
        who(&self.world.dial(Dial::new(Ids::ROOT, addr(to))).expect("dialled"))
    }
}

pub(crate) fn listen(actor: &Actor, name: &str, ids: Ids, at: SocketAddr) {
    let bind = Bind::new(ids, at);
    actor.listen(Listen { name: name.into(), transport: Transport::Tcp, bind }).expect("a listener");
}

/// The server that answered, or the error.
pub(crate) fn who(dialled: &Dialled) -> String {
    match &dialled.outcome {
        DialOutcome::Answered(answer) => answer.server.clone(),
        other => format!("{other:?}"),
    }
}

pub(crate) fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| panic!("{text} is not an address with port"))
}

/// Waits until a value is as expected, and panics with the last value after a timeout.
pub(crate) fn eventually<T: PartialEq + std::fmt::Debug>(
    what: &str,
    limit: Duration,
    wanted: &T,
    mut look: impl FnMut() -> T,
) {
    let deadline = Instant::now() + limit;
    loop {
        let seen = look();
        if seen == *wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {seen:?} after {limit:?}, not {wanted:?}");
        std::thread::yield_now();
    }
}
