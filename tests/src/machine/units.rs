//! Chosen units of a machine.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};

use super::{
    APP, CapturedMachine, ExpectedPath, FIRST, LATER, OTHER, SECOND, SERVICE, Unit, any, difference, flow,
    own, serve, service,
};
use crate::{
    agent::{finish, succeed},
    testbed::Ids,
};

const SSH: u16 = 22;

/// What is refused, with the text that says why.
pub(super) fn refusals(machine: &CapturedMachine) -> Result<()> {
    let (app, envoy) = (machine.unit("app", &[])?, machine.proxy("envoy", FIRST)?);
    let before = machine.state(&[&app, &envoy])?;
    let refused = |mut command: std::process::Command, text: &str| -> Result<()> {
        let output = finish(&mut command)?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success(), "{command:?} succeeded");
        ensure!(error.contains(text), "{command:?} does not say {text:?}: {error}");
        Ok(())
    };
    let units = [&app, &envoy];
    refused(machine.command("attach", &[&app], &["-i", "*"]), "--machine")?;
    refused(machine.command("attach", &units, &["-i", "*"]), "only --machine takes several")?;
    refused(machine.attach(&units, FIRST, &["--confirm", "0"]), "0 is not in 1..=86400")?;
    refused(machine.command("attach", &units, &["--confirm", "5"]), "--machine")?;
    refused(machine.attach(&units, FIRST, &["--netns", "/proc/1/ns/net"]), "cannot be used with")?;
    refused(machine.attach(&units, FIRST, &["-m", "TPROXY"]), "-m TPROXY")?;
    refused(machine.attach(&units, FIRST, &["-k", "eth0"]), "-k is of pods")?;
    refused(machine.attach(&units, FIRST, &["--accelerate"]), "--accelerate is of pods")?;
    let mut nested = machine.attach(&units, FIRST, &[]);
    nested.arg("--cgroup-path").arg(machine.slice.path());
    refused(nested, "both are named")?;
    refused(machine.attach(&[&app], FIRST, &[]), "outside of the cgroups of the workload")?;
    refused(machine.command("confirm", &[], &[]), "nothing is attached")?;
    refused(machine.command("detach", &[&app], &["--machine"]), "is not attached")?;
    let left = difference(&before, &machine.state(&units)?);
    ensure!(left.is_empty(), "a refusal changed something: {left:#?}");
    Ok(())
}

/// One workload: what is captured, and what is not.
pub(super) fn one_workload(machine: &CapturedMachine) -> Result<()> {
    // One port of the application, and the SSH port, are open before the attach.
    let app = machine.unit("app", &[APP, SSH])?;
    let other = machine.unit("other", &[OTHER])?;
    let envoy = machine.proxy("envoy", FIRST)?;
    let all = [&app, &other, &envoy];
    let before = machine.state(&all)?;

    let said = succeed(machine.attach(&[&app, &envoy], FIRST, &["-b", "*"]))?;
    ensure!(said.starts_with("attached") && said.contains("every port except SSH (22"), "{said}");
    ensure!(succeed(machine.attach(&[&envoy, &app], FIRST, &["-b", "*"]))?.starts_with("unchanged"), "again");
    flows(machine, &app, &other, &envoy)?;
    later(machine, &app, &other, &envoy)?;
    reported(machine, &app)?;

    // Without inbound ports.
    ensure!(succeed(machine.attach(&[&app, &envoy], FIRST, &[]))?.starts_with("replaced"), "other options");
    for v6 in [false, true] {
        let to = SocketAddr::new(own(v6), APP);
        flow(
            "a client calls without -b",
            &machine.world,
            Ids::ROOT,
            to,
            "app",
            ExpectedPath::Direct,
            &[&envoy],
        )?;
        let to = SocketAddr::new(service(v6), SERVICE);
        let way = ExpectedPath::Proxy(&envoy, "outbound");
        flow("the app calls without -b", &app.actor, Ids::APP, to, "world", way, &[&envoy])?;
    }

    // Named by its second cgroup.
    succeed(machine.command("detach", &[&envoy], &["--machine"]))?;
    let left = difference(&before, &machine.state(&all)?);
    ensure!(left.is_empty(), "detach leaves: {left:#?}");
    for v6 in [false, true] {
        let to = SocketAddr::new(service(v6), SERVICE);
        flow(
            "the app calls after detach",
            &app.actor,
            Ids::APP,
            to,
            "world",
            ExpectedPath::Direct,
            &[&envoy],
        )?;
    }
    Ok(())
}

fn flows(machine: &CapturedMachine, app: &Unit, other: &Unit, envoy: &Unit) -> Result<()> {
    let proxies = [envoy];
    for v6 in [false, true] {
        let out = SocketAddr::new(service(v6), SERVICE);
        let to_app = SocketAddr::new(own(v6), APP);
        let localhost: IpAddr = if v6 { [0, 0, 0, 0, 0, 0, 0, 1].into() } else { [127, 0, 0, 1].into() };
        let outbound = ExpectedPath::Proxy(envoy, "outbound");
        let inbound = ExpectedPath::Proxy(envoy, "inbound");
        let world = &machine.world;
        flow("the app calls a service", &app.actor, Ids::APP, out, "world", outbound, &proxies)?;
        flow("the app calls as root", &app.actor, Ids::ROOT, out, "world", outbound, &proxies)?;
        flow(
            "another unit calls a service",
            &other.actor,
            Ids::APP,
            out,
            "world",
            ExpectedPath::Direct,
            &proxies,
        )?;
        flow(
            "the proxy calls a service",
            &envoy.actor,
            Ids::PROXY,
            out,
            "world",
            ExpectedPath::Direct,
            &proxies,
        )?;
        flow("a client calls the app", world, Ids::ROOT, to_app, "app", inbound, &proxies)?;
        let to = SocketAddr::new(own(v6), OTHER);
        flow("a client calls another unit", world, Ids::ROOT, to, "other", ExpectedPath::Direct, &proxies)?;
        let to = SocketAddr::new(own(v6), SSH);
        flow("a client calls by SSH", world, Ids::ROOT, to, "app", ExpectedPath::Direct, &proxies)?;
        flow("the app calls itself", &app.actor, Ids::APP, to_app, "app", ExpectedPath::Direct, &proxies)?;
        let to = SocketAddr::new(localhost, APP);
        flow("the app calls localhost", &app.actor, Ids::APP, to, "app", ExpectedPath::Direct, &proxies)?;
        flow(
            "another unit calls the app",
            &other.actor,
            Ids::APP,
            to_app,
            "app",
            ExpectedPath::Direct,
            &proxies,
        )?;
    }
    Ok(())
}

/// A port that the application opens after the attach, and that another unit opens after it.
fn later(machine: &CapturedMachine, app: &Unit, other: &Unit, envoy: &Unit) -> Result<()> {
    let mut opened = Vec::new();
    for any in any() {
        opened.push(serve(&app.actor, "app", any, LATER)?);
    }
    let inbound = ExpectedPath::Proxy(envoy, "inbound");
    for v6 in [false, true] {
        let to = SocketAddr::new(own(v6), LATER);
        flow("a client calls a new port", &machine.world, Ids::ROOT, to, "app", inbound, &[envoy])?;
    }
    for listening in opened {
        app.actor.close(listening)?;
    }
    let mut opened = Vec::new();
    for any in any() {
        opened.push(serve(&other.actor, "other", any, LATER)?);
    }
    for v6 in [false, true] {
        let to = SocketAddr::new(own(v6), LATER);
        flow(
            "the port is another unit's",
            &machine.world,
            Ids::ROOT,
            to,
            "other",
            ExpectedPath::Direct,
            &[envoy],
        )?;
    }
    for listening in opened {
        other.actor.close(listening)?;
    }
    Ok(())
}

/// What status, explain and audit say.
fn reported(machine: &CapturedMachine, app: &Unit) -> Result<()> {
    let pods = machine.agent.status()?;
    let pod = pods.get(0).context("status lists nothing")?;
    ensure!(pod["state"] == "attached", "{pod}");
    ensure!(pod["more_cgroups"].as_array().is_some_and(|cgroups| cgroups.len() == 1), "{pod}");
    let ports = pod["applications"].as_array().context("no applications")?;
    ensure!(ports.iter().any(|listener| listener["port"] == APP), "{pod}");
    ensure!(!ports.iter().any(|listener| listener["port"] == OTHER), "{pod}");
    let explain = |direction: &str, port: &str| {
        let dst = own(false).to_string();
        let mut command = machine.agent.command("explain");
        command.args([direction, "--dst", &dst, "--dport", port, "--src", "10.66.0.1", "--cgroup-path"]);
        command.arg(app.sandbox.cgroup.path());
        succeed(command)
    };
    ensure!(explain("inbound", "8080")?.contains("to the proxy on 15006"), "explain 8080");
    ensure!(explain("inbound", "22")?.contains("not captured"), "explain 22");
    let audit = succeed(machine.command("audit", &[app], &[]))?;
    ensure!(audit.contains("nothing goes around the proxy"), "{audit}");
    Ok(())
}

/// Two workloads with a proxy each; what they share in the namespace stays until the last is gone.
pub(super) fn two_workloads(machine: &CapturedMachine) -> Result<()> {
    let app = machine.unit("app", &[APP])?;
    let second = machine.unit("second", &[OTHER])?;
    let (envoy, envoy2) = (machine.proxy("envoy", FIRST)?, machine.proxy("envoy2", SECOND)?);
    let all = [&app, &second, &envoy, &envoy2];
    let before = machine.state(&all)?;
    succeed(machine.attach(&[&app, &envoy], FIRST, &["-b", "8080,8081"]))?;

    let refused = |mut command: std::process::Command, text: &str| -> Result<()> {
        let error = String::from_utf8(finish(&mut command)?.stderr)?;
        ensure!(error.contains(text), "{command:?} does not say {text:?}: {error}");
        Ok(())
    };
    refused(machine.attach(&[&second, &envoy2], FIRST, &[]), "of the proxy of another workload")?;
    refused(machine.attach(&[&second, &envoy], SECOND, &[]), "in another workload")?;
    let mut outer = machine.attach(&[], SECOND, &[]);
    outer.arg("--cgroup-path").arg(machine.slice.path());
    refused(outer, "would be decided on twice")?;

    succeed(machine.attach(&[&second, &envoy2], SECOND, &["-b", "8080,8081"]))?;
    let proxies = [&envoy, &envoy2];
    for v6 in [false, true] {
        let out = SocketAddr::new(service(v6), SERVICE);
        let (to_app, to_second) = (SocketAddr::new(own(v6), APP), SocketAddr::new(own(v6), OTHER));
        let way = |unit, relay| ExpectedPath::Proxy(unit, relay);
        flow("the first calls", &app.actor, Ids::APP, out, "world", way(&envoy, "outbound"), &proxies)?;
        flow("the second calls", &second.actor, Ids::APP, out, "world", way(&envoy2, "outbound"), &proxies)?;
        flow(
            "the first is called",
            &machine.world,
            Ids::ROOT,
            to_app,
            "app",
            way(&envoy, "inbound"),
            &proxies,
        )?;
        let inbound = way(&envoy2, "inbound");
        flow("the second is called", &machine.world, Ids::ROOT, to_second, "second", inbound, &proxies)?;
    }
    succeed(machine.command("detach", &[&app], &["--machine"]))?;
    for v6 in [false, true] {
        let out = SocketAddr::new(service(v6), SERVICE);
        let way = ExpectedPath::Proxy(&envoy2, "outbound");
        flow("the second calls alone", &second.actor, Ids::APP, out, "world", way, &proxies)?;
        flow("the first is released", &app.actor, Ids::APP, out, "world", ExpectedPath::Direct, &proxies)?;
        let inbound = ExpectedPath::Proxy(&envoy2, "inbound");
        let to = SocketAddr::new(own(v6), OTHER);
        flow("the second is called alone", &machine.world, Ids::ROOT, to, "second", inbound, &proxies)?;
    }
    succeed(machine.command("detach", &[&second], &["--machine"]))?;
    let left = difference(&before, &machine.state(&all)?);
    ensure!(left.is_empty(), "detach leaves: {left:#?}");
    Ok(())
}
