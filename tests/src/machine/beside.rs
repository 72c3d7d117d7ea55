//! A workload with what pods are tested with elsewhere: DNS, another build of the agent, and the daemon.

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use intercept_agent::facade::daemon::PodState;

use super::{
    APP, CapturedMachine, ExpectedPath, FIRST, OTHER, SERVICE, any, difference, flow, own, serve, service,
};
use crate::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, Query, QueryReply, Transport},
    agent::succeed,
    daemon::Daemon,
    deadline::scaled,
    testbed::{Ids, Pod, PodSpec},
};

const DNS: u16 = 15053;

/// Queries of the workload go to its proxy, over UDP and TCP; those of other units do not.
pub(super) fn dns(machine: &CapturedMachine) -> Result<()> {
    let (app, other) = (machine.unit("app", &[APP])?, machine.unit("other", &[OTHER])?);
    let envoy = machine.proxy("envoy", FIRST)?;
    for (actor, name, ids, port) in
        [(&envoy.actor, "dns", Ids::PROXY, DNS), (&machine.world, "world", Ids::ROOT, 53)]
    {
        for (any, transport) in
            any().into_iter().flat_map(|any| [(any, Transport::Udp), (any, Transport::Tcp)])
        {
            let bind = Bind::new(ids, SocketAddr::new(any, port));
            actor.listen(Listen { name: name.into(), transport, bind })?;
        }
    }
    let all = [&app, &other, &envoy];
    let before = machine.state(&all)?;
    succeed(machine.attach(&[&app, &envoy], FIRST, &["--redirect-dns", "--capture-all-dns"]))?;
    for v6 in [false, true] {
        let to = SocketAddr::new(service(v6), 53);
        for (unit, server) in [(&app, "dns"), (&other, "world")] {
            let mut query = Query::new(Ids::APP, to);
            query.timeout = scaled(Duration::from_secs(5));
            let queried = unit.actor.query(query)?;
            let Some(QueryReply::Answered { from, answer }) = queried.replies.first() else {
                anyhow::bail!("{to}: {queried:?}")
            };
            ensure!(*from == to && answer.server == server, "{to}: not {server}: {queried:?}");
            let dialled = unit.actor.dial(Dial::new(Ids::APP, to))?;
            let DialOutcome::Answered(answer) = dialled.outcome else {
                anyhow::bail!("{to}: {:?}", dialled.outcome)
            };
            ensure!(answer.server == server, "{to}: answered by {}, not {server}", answer.server);
        }
    }
    succeed(machine.command("detach", &[&app], &["--machine"]))?;
    let left = difference(&before, &machine.state(&all)?);
    ensure!(left.is_empty(), "detach leaves: {left:#?}");
    Ok(())
}

/// Another build of the agent attaches the same: the programs are replaced, and nothing else.
pub(super) fn upgrade(machine: &CapturedMachine) -> Result<()> {
    let app = machine.unit("app", &[APP])?;
    let envoy = machine.proxy("envoy", FIRST)?;
    let before = machine.state(&[&app, &envoy])?;
    let attach = || succeed(machine.attach(&[&app, &envoy], FIRST, &["-b", "*"]));
    attach()?;
    let store = machine.agent.store();
    let mut own_build = None;
    for entry in fs::read_dir(&store)? {
        let name = entry?.file_name().into_string().ok().context("a name")?;
        if name.starts_with("programs-") {
            own_build = Some(name);
        }
    }
    let own_build = own_build.context("no programs")?;
    fs::rename(store.join(&own_build), store.join("programs-0000000000000001")).context("renaming")?;
    let said = attach()?;
    ensure!(said.starts_with("unchanged"), "{said}");
    ensure!(store.join(&own_build).exists(), "the programs were not replaced");
    for v6 in [false, true] {
        let out = SocketAddr::new(service(v6), SERVICE);
        let (outbound, inbound) =
            (ExpectedPath::Proxy(&envoy, "outbound"), ExpectedPath::Proxy(&envoy, "inbound"));
        flow("the app calls", &app.actor, Ids::APP, out, "world", outbound, &[&envoy])?;
        let to = SocketAddr::new(own(v6), APP);
        flow("a client calls", &machine.world, Ids::ROOT, to, "app", inbound, &[&envoy])?;
    }
    succeed(machine.command("detach", &[&app], &["--machine"]))?;
    let left = difference(&before, &machine.state(&[&app, &envoy])?);
    ensure!(left.is_empty(), "detach leaves: {left:#?}");
    Ok(())
}

/// The daemon captures and releases a pod, and leaves the workload alone, also when it starts and ends.
pub(super) fn daemon(machine: &CapturedMachine) -> Result<()> {
    let app = machine.unit("app", &[APP])?;
    let envoy = machine.proxy("envoy", FIRST)?;
    let pod = Pod::new(PodSpec::new("beside"))?;
    let (inside, outside) = (Actor::start(&pod)?, Actor::start(pod.neighbour())?);
    for any in any() {
        serve(&outside, "outside", any, SERVICE)?;
    }
    inside.relays(FIRST)?;
    let before = machine.state(&[&app, &envoy])?;
    succeed(machine.attach(&[&app, &envoy], FIRST, &["-b", "*"]))?;
    let check = |what: &str, pod_relays: bool| -> Result<()> {
        for v6 in [false, true] {
            let out = SocketAddr::new(service(v6), SERVICE);
            let outbound = ExpectedPath::Proxy(&envoy, "outbound");
            flow(what, &app.actor, Ids::APP, out, "world", outbound, &[&envoy])?;
            flow(what, &inside, Ids::APP, out, "outside", ExpectedPath::Direct, &[&envoy])?;
            let relayed = inside.relayed(usize::from(pod_relays), scaled(Duration::from_secs(5))).len();
            ensure!(relayed == usize::from(pod_relays), "{what}: the pod's proxy relayed {relayed}");
        }
        Ok(())
    };
    let mut daemon = Daemon::start(&machine.agent, &[])?;
    ensure!(daemon.reports()?.is_empty(), "the daemon takes the workload for a pod");
    check("before the pod", false)?;
    daemon.put("beside", &pod, &["-u", "1337", "-g", "1337", "-i", "*", "-b", "*"])?;
    daemon.wait_for("beside", PodState::Captured)?;
    check("with the pod", true)?;
    ensure!(daemon.terminate()?.success(), "the daemon failed");
    check("without the daemon", true)?;
    daemon.restart()?;
    daemon.remove("beside")?;
    daemon
        .wait("the pod is released", |daemon| daemon.report("beside").is_ok_and(|report| report.is_none()))?;
    check("after the pod", false)?;
    daemon.kill()?;
    succeed(machine.command("detach", &[&app], &["--machine"]))?;
    let left = difference(&before, &machine.state(&[&app, &envoy])?);
    ensure!(left.is_empty(), "detach leaves: {left:#?}");
    Ok(())
}
