//! `systemctl reload` of the capture, while connections are made.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::{SystemdMachine, connections, property, shell, unit_gets, until};

const CAPTURE: &str = "intercept-mesh.service";
const LOG: &str = "journalctl -u istio-proxy -o cat --no-pager";
const OPTIONS: &str = "/etc/intercept/mesh.env";
/// What the load calls, what the held connection calls, and what the new options exclude.
const CALLED: &str = "10.96.0.10";
const HELD: &str = "10.96.0.12";
const EXCLUDED: &str = "10.96.0.11";
/// Sends a request in two parts, the second when it is told to.
const HOLD: &str = "import socket, sys
held = socket.create_connection(('10.96.0.12', 80), 600)
held.sendall(b'GET / HTTP/1.0\\r\\n')
print('held', flush=True)
sys.stdin.readline()
held.sendall(b'\\r\\n')
print(held.makefile().read().split('\\n')[-1])
";

/// Options are replaced, are kept when they are wrong, and go back; the load has no failure and no call past the proxy.
pub(super) fn reload(machine: &mut SystemdMachine) -> Result<()> {
    let processes = || [CAPTURE, "istio-proxy"].map(|unit| property(unit, "MainPID").ok());
    let before = processes();
    start_load()?;
    let mut held = HeldCall::open()?;
    call_excluded(machine, CallPath::Captured)?;
    fs::create_dir_all("/etc/intercept").context("making a folder")?;
    fs::write(OPTIONS, format!("ISTIO_SERVICE_EXCLUDE_CIDR={EXCLUDED}/32\n")).context("writing options")?;
    shell("systemctl reload intercept-mesh")?;
    call_excluded(machine, CallPath::Direct)?;
    ensure!(held.finish()? == "world", "a connection that was open at the reload ended");
    follow_addresses()?;
    call_excluded(machine, CallPath::Direct)?;

    fs::write(OPTIONS, "ISTIO_SERVICE_EXCLUDE_CIDR=nonsense\n").context("writing options")?;
    ensure!(shell("systemctl reload intercept-mesh").is_err(), "wrong options were accepted");
    ensure!(property(CAPTURE, "ActiveState")? == "active", "wrong options ended the capture");
    call_excluded(machine, CallPath::Direct)?;

    fs::remove_file(OPTIONS).context("removing options")?;
    shell("systemctl reload intercept-mesh")?;
    call_excluded(machine, CallPath::Captured)?;
    ensure!(processes() == before, "a reload has restarted a unit");
    let calls = stop_load()?;
    all_through_the_proxy(machine, calls)
}

enum CallPath {
    Captured,
    Direct,
}

/// A unit of the slice calls what the new options exclude.
fn call_excluded(machine: &SystemdMachine, path: CallPath) -> Result<()> {
    let count = || -> Result<usize> { Ok(to(machine, EXCLUDED)?.len()) };
    let before = count()?;
    ensure!(unit_gets("mesh.slice", &format!("http://{EXCLUDED}/"))? == "world", "the world's page");
    match path {
        CallPath::Captured => until("a captured call", || Ok((count()? == before + 1).then_some(()))),
        CallPath::Direct => {
            // Envoy writes its log once a second: a later call of the load is in it.
            let seen = to(machine, CALLED)?.len();
            until("a later call", || Ok((to(machine, CALLED)?.len() > seen + 1).then_some(())))?;
            ensure!(count()? == before, "a call of what is excluded was captured");
            Ok(())
        }
    }
}

/// Connections to an address that Envoy has logged since the other cases.
fn to(machine: &SystemdMachine, address: &str) -> Result<Vec<String>> {
    let mut lines = connections(LOG)?.split_off(machine.read);
    lines.retain(|line| line.ends_with(&format!(" to {address}:80")));
    Ok(lines)
}

/// An address comes and goes: the agent writes its policy again, with the options of the reload.
fn follow_addresses() -> Result<()> {
    let applied = || -> Result<usize> {
        let log = shell(&format!("journalctl -u {CAPTURE} -o cat --no-pager"))?;
        Ok(log.lines().filter(|line| line.contains("applied a change of addresses or routes")).count())
    };
    let before = applied()?;
    shell("ip addr add 10.97.0.1/32 dev lo")?;
    until("a policy with the new address", || Ok((applied()? > before).then_some(())))?;
    shell("ip addr del 10.97.0.1/32 dev lo")
        .and_then(|_| until("a policy without it", || Ok((applied()? > before + 1).then_some(()))))
}

fn start_load() -> Result<()> {
    shell(&format!(
        "systemd-run --quiet --unit=load --slice=mesh.slice -p User=nobody sh -c \
         'until [ -e /run/stop-load ]; do curl -sS -m 120 -o /dev/null http://{CALLED}/ && echo called; done'"
    ))?;
    until("the load", || Ok((calls()? > 2).then_some(())))
}

fn calls() -> Result<usize> {
    let log = shell("journalctl -u load -o cat --no-pager")?;
    Ok(log.lines().filter(|line| *line == "called").count())
}

/// Returns how many calls there were, all of which must have succeeded.
fn stop_load() -> Result<usize> {
    fs::write("/run/stop-load", "").context("stopping the load")?;
    until("the end of the load", || Ok((property("load", "ActiveState")? == "inactive").then_some(())))?;
    fs::remove_file("/run/stop-load").context("removing a file")?;
    let log = shell("journalctl -u load -o cat --no-pager")?;
    let failed: Vec<_> = log.lines().filter(|line| line.starts_with("curl:")).collect();
    ensure!(failed.is_empty(), "calls of the load failed: {failed:?}");
    calls()
}

fn all_through_the_proxy(machine: &mut SystemdMachine, calls: usize) -> Result<()> {
    let mut found = 0;
    let logged = until("Envoy's log", || {
        found = to(machine, CALLED)?.len();
        Ok((found >= calls).then_some(()))
    });
    ensure!(logged.is_ok() && found == calls, "of {calls} calls {found} went through the proxy");
    ensure!(to(machine, HELD)?.len() == 1, "the held connection did not go through the proxy");
    machine.read = connections(LOG)?.len();
    Ok(())
}

/// A connection of a unit of the slice.
struct HeldCall(Child);

impl HeldCall {
    fn open() -> Result<Self> {
        let mut command = Command::new("systemd-run");
        command.args(["--quiet", "--wait", "--pipe", "--collect", "--slice=mesh.slice", "-p", "User=nobody"]);
        command.args(["python3", "-c", HOLD]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut held = Self(command.spawn().context("starting systemd-run")?);
        ensure!(held.line()? == "held", "no connection was made");
        Ok(held)
    }

    /// A line that it prints, which is the only one until it is told to go on.
    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().context("it has no output")?).read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    /// Sends the rest of the request. Returns the page.
    fn finish(&mut self) -> Result<String> {
        writeln!(self.0.stdin.as_mut().context("it has no input")?).context("telling it to go on")?;
        self.line()
    }
}

impl Drop for HeldCall {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
