//! A well-behaved pod: its connections are checked at both ends while others misbehave.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use intercept_common::Family;

use super::{
    dice::Dice,
    ledger::{Expected, Ledger, SeenProxy},
    node::ApiPod,
};
use crate::{
    actor::{Actor, Bind, Dial, Listen, Listening, Transport},
    testbed::{Ids, Neighbour, Pod, PodInterface, PodSpec},
};

/// Ports at which the world listens, so that a connection that goes past the proxy is answered by it.
pub const PORTS: [u16; 3] = [80, 443, 9000];
/// The port of every pod's app, which an uncaptured connection from outside reaches.
const APP: u16 = 8080;
/// Longer than any answer takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(15);

/// A pod with a proxy and an app.
#[derive(Debug)]
pub struct SteadyPod {
    label: String,
    inside: Actor,
    proxy: Mutex<Vec<Listening>>,
    /// Odd while the proxy restarts.
    restarts: AtomicU64,
    pod: Pod,
}

/// The world outside, which answers on [`PORTS`].
#[derive(Debug)]
pub struct World {
    actor: Actor,
    neighbour: Arc<Neighbour>,
    pods: AtomicU64,
}

impl World {
    /// A new one.
    pub fn new() -> Result<Self> {
        let neighbour = Neighbour::new("soak")?;
        let actor = Actor::start(&neighbour)?;
        for any in wildcards() {
            for port in PORTS {
                listen(&actor, "world", Ids::ROOT, SocketAddr::new(any, port))?;
            }
        }
        Ok(Self { actor, neighbour, pods: AtomicU64::new(0) })
    }

    /// A pod with addresses of its own, joined to the world by eth0.
    pub fn pod(&self, label: &str) -> Result<Pod> {
        let number = self.pods.fetch_add(1, Ordering::Relaxed);
        let (high, low) = (70 + number / 250 % 100, number % 250);
        let net = |host: u8| {
            Ok([
                format!("10.{high}.{low}.{host}/24").parse()?,
                format!("fd66:{high}:{low}::{host}/64").parse()?,
            ])
        };
        let nets = |host| net(host).map_err(|error: ipnet::AddrParseError| error);
        let eth0 = PodInterface {
            name: "eth0".into(),
            pod: nets(2)?.to_vec(),
            neighbour: nets(1)?.to_vec(),
            routes: vec!["0.0.0.0/0".parse()?, "::/0".parse()?],
        };
        Pod::join(PodSpec { label: label.into(), interfaces: vec![eth0] }, Arc::clone(&self.neighbour))
    }

    /// The namespace that all pods are joined to.
    pub fn neighbour(&self) -> &Neighbour {
        &self.neighbour
    }
}

impl SteadyPod {
    /// A pod whose proxy and app listen; in the cgroup that the kubelet has made, if it has.
    pub fn new(label: &str, world: &World, api: Option<&ApiPod>) -> Result<Self> {
        let pod = world.pod(label)?;
        let inside = Actor::start(&pod)?;
        // Before there are sockets: a socket stays in the cgroup in which it was made.
        api.map_or(Ok(()), |api| api.take(&[inside.pid()]))?;
        for any in wildcards() {
            listen(&inside, "app", Ids::APP, SocketAddr::new(any, APP))?;
        }
        let steady =
            Self { label: label.into(), inside, proxy: Mutex::default(), restarts: AtomicU64::new(0), pod };
        *steady.proxy.lock().unwrap_or_else(PoisonError::into_inner) = steady.listen()?;
        Ok(steady)
    }

    /// Its namespace and cgroup.
    pub fn pod(&self) -> &Pod {
        &self.pod
    }

    /// The process in which all of its sockets are.
    pub fn pid(&self) -> u32 {
        self.inside.pid()
    }

    /// Stops the proxy, and starts it again a little later.
    pub fn restart_proxy(&self, absent: Duration) -> Result<()> {
        let mut proxy = self.proxy.lock().unwrap_or_else(PoisonError::into_inner);
        self.restarts.fetch_add(1, Ordering::SeqCst);
        for listening in proxy.drain(..) {
            self.inside.close(listening)?;
        }
        std::thread::sleep(absent);
        *proxy = self.listen()?;
        self.restarts.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Makes one connection of a random kind and judges it.
    pub fn connect(&self, world: &World, dice: &mut Dice, ledger: &Ledger) -> Result<()> {
        let port = dice.one_of(&PORTS);
        let low = u8::try_from(dice.number(1..255))?;
        let family = dice.one_of(&Family::ALL);
        let outside = match family {
            Family::V4 => IpAddr::from(Ipv4Addr::new(10, 200, low, 9)),
            Family::V6 => IpAddr::from(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, low.into())),
        };
        let outside = SocketAddr::new(outside, port);
        let inward = SocketAddr::new(self.pod.address(family), APP);
        let (what, actor, ids, expected) = match dice.number(0..8) {
            0..4 => ("outbound", &self.inside, Ids::APP, Expected::SeenProxy(outside)),
            4..7 => ("inbound", &world.actor, Ids::APP, Expected::SeenProxy(inward)),
            _ => ("the proxy's own", &self.inside, Ids::PROXY, Expected::Direct("world", outside)),
        };
        let (Expected::SeenProxy(to) | Expected::Direct(_, to)) = expected;
        let before = self.restarts.load(Ordering::SeqCst);
        let dialled = actor.dial(Dial { timeout: PATIENCE, ..Dial::new(ids, to) })?;
        let undisturbed = before.is_multiple_of(2) && self.restarts.load(Ordering::SeqCst) == before;
        let proxy = if undisturbed { SeenProxy::Listening } else { SeenProxy::Restarted };
        ledger.judge(&format!("{} {what}", self.label), expected, proxy, &dialled);
        Ok(())
    }

    /// Waits for the port: a process that has just been forked still has the listener that was closed, until it executes
    /// its program.
    fn listen_on(&self, address: SocketAddr) -> Result<Listening> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match listen(&self.inside, "proxy", Ids::PROXY, address) {
                Err(error) if Instant::now() < deadline && format!("{error:#}").contains("in use") => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                listening => return listening,
            }
        }
    }

    fn listen(&self) -> Result<Vec<Listening>> {
        let mut all = Vec::new();
        for any in wildcards() {
            for port in [15001, 15006] {
                all.push(self.listen_on(SocketAddr::new(any, port))?);
            }
        }
        Ok(all)
    }
}

fn wildcards() -> [IpAddr; 2] {
    [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()]
}

fn listen(actor: &Actor, name: &str, ids: Ids, addr: SocketAddr) -> Result<Listening> {
    actor.listen(Listen { name: name.into(), transport: Transport::Tcp, bind: Bind::new(ids, addr) })
}
