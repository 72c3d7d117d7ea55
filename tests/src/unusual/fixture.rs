//! The pod in which unusual flows are made.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;

use super::{UnusualOutcome, UnusualProcess, UnusualSocket};
use crate::actor::{Actor, Bind, Listen, Transport};
use crate::differential::Capture;
use crate::iptables::IptablesOptions;
use crate::testbed::{Cgroup, Ids, Pod, PodSpec};

/// A pod with the listeners of a proxy, an application on 8080, and the world on 80 and 53.
#[derive(Debug)]
pub struct UnusualFixture {
    // Dropped in this order: processes, their cgroup, the namespaces.
    inside: Actor,
    world: Actor,
    _elsewhere: Cgroup,
    /// The pod. The listening processes are outside its cgroup.
    pub pod: Pod,
}

impl UnusualFixture {
    /// A pod that is not captured.
    pub fn new(label: &str) -> Result<Self> {
        use Transport::{Tcp, Udp};
        let pod = Pod::new(PodSpec::new(label))?;
        let (inside, world) = (Actor::start(&pod)?, Actor::start(pod.neighbour())?);
        for any in ["0.0.0.0", "::"] {
            let any: IpAddr = any.parse()?;
            let listen = |actor: &Actor, name: &str, transport: Transport, ids: Ids, port: u16| {
                let bind = Bind::new(ids, SocketAddr::new(any, port));
                actor.listen(Listen { name: name.into(), transport, bind })
            };
            listen(&inside, "outbound", Tcp, Ids::PROXY, 15001)?;
            listen(&inside, "inbound", Tcp, Ids::PROXY, 15006)?;
            listen(&inside, "dns", Tcp, Ids::PROXY, 15053)?;
            listen(&inside, "dns", Udp, Ids::PROXY, 15053)?;
            listen(&inside, "app", Tcp, Ids::APP, 8080)?;
            listen(&world, "world", Tcp, Ids::ROOT, 80)?;
            listen(&world, "world", Tcp, Ids::ROOT, 53)?;
            listen(&world, "world", Udp, Ids::ROOT, 53)?;
        }
        let elsewhere = Cgroup::new(&format!("{label}-servers"))?;
        elsewhere.add(inside.pid())?;
        Ok(Self { inside, world, _elsewhere: elsewhere, pod })
    }

    /// The actor that plays the proxy and the application.
    pub fn inside(&self) -> &Actor {
        &self.inside
    }

    /// The actor in the outside world.
    pub fn world(&self) -> &Actor {
        &self.world
    }
}

/// When the socket is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// Before the capture.
    Before,
    /// After the capture.
    After,
}

/// Makes a flow in a new pod with this capture, and returns its result.
pub fn under(
    capture: &Capture,
    options: &IptablesOptions,
    unusual: &UnusualSocket,
    made: Made,
) -> Result<UnusualOutcome> {
    let fixture = UnusualFixture::new("unusual")?;
    if made == Made::Before {
        let process = UnusualProcess::start(&fixture.pod, unusual)?;
        let captured = capture.start(options, &fixture.pod)?;
        let outcome = process.go()?;
        captured.stop()?;
        return Ok(outcome);
    }
    let captured = capture.start(options, &fixture.pod)?;
    let outcome = UnusualProcess::start(&fixture.pod, unusual)?.go()?;
    captured.stop()?;
    Ok(outcome)
}
