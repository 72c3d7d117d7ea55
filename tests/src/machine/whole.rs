//! The whole machine: the root cgroup, which is captured in a virtual machine only.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};

use super::{APP, CapturedMachine, ExpectedPath, FIRST, OTHER, SERVICE, difference, flow, own, service};
use crate::{
    actor::Actor,
    agent::succeed,
    deadline::scaled,
    testbed::{Ids, Pod, PodSpec},
};

pub(super) fn whole_machine(machine: &CapturedMachine) -> Result<()> {
    let app = machine.unit("app", &[APP])?;
    let other = machine.unit("other", &[OTHER, 22])?;
    let envoy = machine.proxy("envoy", FIRST)?;
    // A container: its cgroup is below the root, and its namespace is another.
    let pod = Pod::new(PodSpec::new("container"))?;
    let (inside, outside) = (Actor::start(&pod)?, Actor::start(pod.neighbour())?);
    super::serve(&outside, "outside", super::any()[0], SERVICE)?;
    let all = [&app, &other, &envoy];
    let before = machine.state(&all)?;

    let said = succeed(machine.attach(&[], FIRST, &["-b", "*", "--confirm", "600"]))?;
    ensure!(said.contains("the whole machine") && said.contains("SSH (22"), "{said}");
    succeed(machine.agent.command("confirm"))?;
    let proxies = [&envoy];
    for v6 in [false, true] {
        let out = SocketAddr::new(service(v6), SERVICE);
        let outbound = ExpectedPath::Proxy(&envoy, "outbound");
        let inbound = ExpectedPath::Proxy(&envoy, "inbound");
        flow("one unit calls", &app.actor, Ids::APP, out, "world", outbound, &proxies)?;
        flow("another calls", &other.actor, Ids::ROOT, out, "world", outbound, &proxies)?;
        flow("the proxy calls", &envoy.actor, Ids::PROXY, out, "world", ExpectedPath::Direct, &proxies)?;
        for (port, server) in [(APP, "app"), (OTHER, "other")] {
            let to = SocketAddr::new(own(v6), port);
            flow("a client calls", &machine.world, Ids::ROOT, to, server, inbound, &proxies)?;
        }
        let to = SocketAddr::new(own(v6), 22);
        flow(
            "a client calls by SSH",
            &machine.world,
            Ids::ROOT,
            to,
            "other",
            ExpectedPath::Direct,
            &proxies,
        )?;
    }
    let to = SocketAddr::new(service(false), SERVICE);
    flow("a container calls", &inside, Ids::APP, to, "outside", ExpectedPath::Direct, &proxies)?;

    // The container is captured by itself below the machine.
    let container = Actor::start(&pod)?;
    container.relays(FIRST)?;
    succeed(machine.agent.for_pod("attach", &pod, &["-u", "1337", "-i", "*"]))?;
    flow("a captured container calls", &inside, Ids::APP, to, "outside", ExpectedPath::Direct, &proxies)?;
    let relayed = container.relayed(1, scaled(Duration::from_secs(5)));
    ensure!(relayed.len() == 1, "the container's proxy saw {relayed:?}");
    succeed(machine.agent.for_pod("detach", &pod, &[]))?;

    let mut detach = machine.agent.command("detach");
    detach.arg("--machine");
    succeed(detach)?;
    let left = difference(&before, &machine.state(&all)?);
    ensure!(left.is_empty(), "detach leaves: {left:#?}");
    Ok(())
}
