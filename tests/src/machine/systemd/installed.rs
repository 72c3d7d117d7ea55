//! The cases, each after those before it.

use anyhow::{Result, ensure};

use super::{AGENT, OWN, SERVICE, SystemdMachine, WORLD, documented, property, shell, unit_gets, until};

const CAPTURE: &str = "intercept-mesh.service";
const PROXY: &str = "istio-proxy.service";
const APP: &str = "app.service";

/// Starts what the document says, and looks at the order.
pub(super) fn install(_: &mut SystemdMachine) -> Result<()> {
    for commands in documented("## systemd")? {
        shell(commands)?;
    }
    for unit in [CAPTURE, PROXY, APP] {
        ensure!(property(unit, "ActiveState")? == "active", "{unit} is not active");
    }
    in_order()
}

/// The capture was active before the proxy and the application were started.
fn in_order() -> Result<()> {
    let time = |unit, name| -> Result<u64> { Ok(property(unit, name)?.parse()?) };
    let active = time(CAPTURE, "ActiveEnterTimestampMonotonic")?;
    for unit in [PROXY, APP] {
        let started = time(unit, "ExecMainStartTimestampMonotonic")?;
        ensure!(
            active > 0 && active <= started,
            "{unit} was started at {started}, the capture active at {active}"
        );
    }
    Ok(())
}

/// The application calls and is called.
pub(super) fn flows(machine: &mut SystemdMachine) -> Result<()> {
    listens("8080")?;
    listens("15006")?;
    for (service, own) in SERVICE.iter().zip(OWN) {
        captured_call(machine, service, own)?;
    }
    // The example listens on IPv4 only.
    called(machine, APP, 8080, OWN[0], WORLD[0])
}

/// A unit of the slice calls.
fn captured_call(machine: &mut SystemdMachine, service: &str, own: &str) -> Result<()> {
    ensure!(unit_gets("mesh.slice", &format!("http://{service}/"))? == "world", "the world's page");
    machine.logged("the unit calls", &[format!("outbound {own} to {service}:80")])
}

/// The world calls a unit.
fn called(machine: &mut SystemdMachine, unit: &str, port: u16, own: &str, world: &str) -> Result<()> {
    let page = machine.world_gets(&format!("http://{own}:{port}/etc/hostname"))?;
    ensure!(page == "machine\n", "{unit} answered {page:?}");
    machine.logged("the world calls", &[format!("inbound {world} to {own}:{port}")])?;
    let client = if own.starts_with('[') { "::6" } else { "127.0.0.6" };
    served(unit, client)
}

/// The last request of a unit came from this address.
fn served(unit: &str, client: &str) -> Result<()> {
    until(&format!("{unit} logs a request of {client}"), || {
        let log = shell(&format!("journalctl -u {unit} -o cat --no-pager"))?;
        let last = log.lines().rfind(|line| line.contains("\"GET "));
        let from = last.and_then(|line| line.split(' ').next()).unwrap_or_default();
        Ok((from.trim_start_matches("::ffff:") == client).then_some(()))
    })
}

/// Waits until something listens on a port.
fn listens(port: &str) -> Result<()> {
    until(&format!("a listener on {port}"), || {
        let listening = shell("ss -Hltn")?;
        let ending = format!(":{port}");
        Ok(listening
            .lines()
            .any(|line| line.split_whitespace().nth(3).is_some_and(|at| at.ends_with(&ending)))
            .then_some(()))
    })
}

/// A second unit of the slice, and one that is not in it.
pub(super) fn several(machine: &mut SystemdMachine) -> Result<()> {
    for (unit, slice, port) in [("second", "mesh.slice", "8081"), ("other", "system.slice", "8082")] {
        shell(&format!(
            "systemd-run --quiet --unit={unit} --slice={slice} -p DynamicUser=yes python3 -m http.server {port} --bind ::"
        ))?;
        listens(port)?;
    }
    for ((service, own), world) in SERVICE.iter().zip(OWN).zip(WORLD) {
        ensure!(unit_gets("system.slice", &format!("http://{service}/"))? == "world", "the world's page");
        ensure!(
            machine.world_gets(&format!("http://{own}:8082/etc/hostname"))? == "machine\n",
            "other's page"
        );
        served("other", world.trim_matches(['[', ']']))?;
        // What Envoy logs next is of these.
        captured_call(machine, service, own)?;
        called(machine, "second", 8081, own, world)?;
    }
    called(machine, APP, 8080, OWN[0], WORLD[0])
}

pub(super) fn proxy_restarts(machine: &mut SystemdMachine) -> Result<()> {
    let capture = property(CAPTURE, "MainPID")?;
    shell("systemctl restart istio-proxy.service")?;
    ensure!(property(CAPTURE, "MainPID")? == capture, "the capture was restarted with the proxy");
    flows(machine)
}

/// The slice has no process for a moment.
pub(super) fn all_restart(machine: &mut SystemdMachine) -> Result<()> {
    shell("systemctl stop app.service second.service istio-proxy.service")?;
    ensure!(property(CAPTURE, "ActiveState")? == "active", "the capture ended with the services");
    // Without the proxy, connections are refused rather than sent past it.
    ensure!(unit_gets("mesh.slice", "http://10.96.0.10/").is_err(), "a call went past the proxy");
    shell("systemctl start istio-proxy.service app.service")?;
    flows(machine)
}

pub(super) fn capture_restarts(machine: &mut SystemdMachine) -> Result<()> {
    let proxy = property(PROXY, "MainPID")?;
    shell("systemctl restart intercept-mesh.service")?;
    ensure!(property(PROXY, "MainPID")? != proxy, "the proxy was not restarted");
    let active: u64 = property(CAPTURE, "ActiveEnterTimestampMonotonic")?.parse()?;
    let started: u64 = property(PROXY, "ExecMainStartTimestampMonotonic")?.parse()?;
    ensure!(active <= started, "the proxy was started before the capture");
    flows(machine)
}

pub(super) fn killed(machine: &mut SystemdMachine) -> Result<()> {
    shell("systemctl kill --kill-who=main -s KILL intercept-mesh.service")?;
    until("another capture", || {
        let restarted =
            property(CAPTURE, "NRestarts")? != "0" && property(CAPTURE, "ActiveState")? == "active";
        Ok((restarted && property(PROXY, "ActiveState")? == "active").then_some(()))
    })?;
    flows(machine)
}

pub(super) fn stop(machine: &mut SystemdMachine) -> Result<()> {
    shell("systemctl stop intercept-mesh.service")?;
    ensure!(property(PROXY, "ActiveState")? == "inactive", "the proxy runs without the capture");
    ensure!(property(APP, "ActiveState")? == "active", "the application was stopped");
    ensure!(unit_gets("mesh.slice", "http://10.96.0.10/")? == "world", "the unit calls directly");
    ensure!(
        machine.world_gets("http://10.66.0.2:8080/etc/hostname")? == "machine\n",
        "the world calls directly"
    );
    served(APP, WORLD[0])?;
    shell("systemctl stop app.service other.service")?;
    machine.restored("the units are stopped")
}

/// A capture without a proxy, which cuts its services off. It expires although the unit that attached it has ended, with all
/// processes of its cgroup.
pub(super) fn confirm(machine: &mut SystemdMachine) -> Result<()> {
    shell("systemd-run --quiet --unit=bare --slice=bare.slice sleep infinity")?;
    let calls = || unit_gets("bare.slice", "http://10.96.0.10/");
    // On a busy machine it may expire before it is seen.
    let seen = [10, 60, 240].into_iter().try_fold(false, |seen, seconds| -> Result<bool> {
        if seen {
            return Ok(true);
        }
        let said = shell(&format!(
            "systemd-run --quiet --wait --pipe --collect {AGENT} attach --machine --confirm {seconds} \
             --cgroup-path /sys/fs/cgroup/bare.slice -i '*' -b '*'"
        ))?;
        ensure!(said.starts_with("attached"), "{said}");
        let refused = calls().is_err();
        until("the capture to expire", || Ok(calls().ok().filter(|page| page == "world")))?;
        Ok(refused)
    })?;
    ensure!(seen, "no call was refused without a proxy");
    shell("systemctl stop bare.service")?;
    machine.restored("not confirmed")
}
