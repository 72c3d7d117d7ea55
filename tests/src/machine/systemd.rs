//! deploy/systemd on a machine whose first process is systemd: the documented commands install it, with a real Envoy.
//!
//! `cargo xtask vm --systemd` makes that machine.

mod containers;
mod installed;
mod reload;
mod ssh;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{connect, difference, state};
use crate::{
    agent::succeed,
    bpf::links,
    testbed::{Namespace, Neighbour},
};

/// How long anything may take: emulated machines are slow.
const PATIENCE: Duration = Duration::from_secs(300);
/// The machine's own addresses and those of the world, as in URLs.
const OWN: [&str; 2] = ["10.66.0.2", "[fd66::2]"];
const WORLD: [&str; 2] = ["10.66.0.1", "[fd66::1]"];
/// Addresses outside.
const SERVICE: [&str; 2] = ["10.96.0.10", "[fd96::10]"];
const DOCUMENT: &str = include_str!("../../../docs/machines.md");
const AGENT: &str = "/usr/local/bin/intercept-agent";

/// The machine, and the world at the other end of its interface.
struct SystemdMachine {
    neighbour: Arc<Neighbour>,
    server: Child,
    before: Vec<String>,
    /// Lines of Envoy's log that were compared.
    read: usize,
    _folder: PathBuf,
}

impl Drop for SystemdMachine {
    fn drop(&mut self) {
        drop(self.server.kill());
        drop(self.server.wait());
    }
}

type SystemdCase = fn(&mut SystemdMachine) -> Result<()>;

/// What is tested, each on a machine that has nothing else.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SystemdSuite {
    /// deploy/systemd
    Units,
    /// All of the machine, by an operator who is logged in over SSH
    Ssh,
    /// Pods and containers of Podman and Docker
    Containers,
    /// Both families in containers
    Families,
    /// Services of Compose
    Compose,
    /// A pod of a user's Podman
    Rootless,
    /// Containers whose cgroups are made without systemd
    Cgroupfs,
}

const UNITS: [(&str, SystemdCase); 10] = [
    ("the documented commands install it, the capture before the proxy", installed::install),
    ("both directions go through Envoy in both families", installed::flows),
    ("several units are captured at once, and others are not", installed::several),
    ("a restarted proxy is captured", installed::proxy_restarts),
    ("services that all stop and start are captured", installed::all_restart),
    ("a restart of the capture restarts the proxy", installed::capture_restarts),
    ("a reload applies the file of options without a gap", reload::reload),
    ("a killed agent captures again", installed::killed),
    ("the capture ends with its unit, and the machine is as before", installed::stop),
    ("what is not confirmed is taken off, though the unit that attached it has ended", installed::confirm),
];

/// Runs all cases, which build on each other. Returns how many did not hold.
pub fn run(suite: SystemdSuite) -> Result<usize> {
    let cases = match suite {
        SystemdSuite::Units => &UNITS[..],
        SystemdSuite::Ssh => &ssh::CASES,
        SystemdSuite::Containers => &containers::CASES,
        SystemdSuite::Families => &containers::families::CASES,
        SystemdSuite::Compose => &containers::compose::CASES,
        SystemdSuite::Rootless => &containers::rootless::CASES,
        SystemdSuite::Cgroupfs => &containers::cgroupfs::CASES,
    };
    let first = fs::read_to_string("/proc/1/comm").context("reading the first process's name")?;
    ensure!(first.trim() == "systemd", "the first process is {first}, not systemd");
    let mut machine = SystemdMachine::new()?;
    for (done, (name, case)) in cases.iter().enumerate() {
        let start = Instant::now();
        if let Err(error) = case(&mut machine) {
            println!("FAILED  {name}: {error:#}");
            println!("{}", shell("systemctl --no-pager --failed; journalctl -b --no-pager -n 60")?);
            println!("{done} of {}", cases.len());
            return Ok(cases.len() - done);
        }
        println!("ok      {name} ({:.1} s)", start.elapsed().as_secs_f32());
    }
    println!("{0} of {0}", cases.len());
    Ok(0)
}

impl SystemdMachine {
    fn new() -> Result<Self> {
        let neighbour = Neighbour::new("machine")?;
        connect(&Namespace::of_machine()?, &neighbour)?;
        let folder = PathBuf::from("/run/world");
        fs::create_dir_all(&folder).context("making a folder")?;
        fs::write(folder.join("index.html"), "world").context("writing a page")?;
        let mut server = neighbour.command("python3")?;
        server.args(["-m", "http.server", "80", "--bind", "::"]).current_dir(&folder);
        let server =
            server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("starting python3")?;
        let mut machine = Self { neighbour, server, before: Vec::new(), read: 0, _folder: folder };
        until("the world answers", || Ok(shell("curl -sS -m 30 http://10.96.0.10/").ok()))?;
        machine.before = machine.state()?;
        Ok(machine)
    }

    fn state(&self) -> Result<Vec<String>> {
        let mut lines = state(&[], Path::new("/sys/fs/bpf"))?;
        // This kernel has no other agents.
        lines.extend(links()?.into_iter().map(|id| format!("link {id}")));
        Ok(lines)
    }

    /// Waits until nothing differs from the state at the start.
    fn restored(&self, what: &str) -> Result<()> {
        let mut left = Vec::new();
        let restored = until(what, || {
            left = difference(&self.before, &self.state()?);
            Ok(left.is_empty().then_some(()))
        });
        restored.with_context(|| format!("left: {left:#?}"))
    }

    /// What a client outside gets.
    fn world_gets(&self, url: &str) -> Result<String> {
        let mut curl = self.neighbour.command("curl")?;
        curl.args(["-sS", "-g", "-m", "60", url]);
        succeed(curl)
    }

    /// Waits for these lines, and no others, in Envoy's log; ports of clients are left out.
    fn logged(&mut self, what: &str, expected: &[String]) -> Result<()> {
        self.read += logged("journalctl -u istio-proxy -o cat --no-pager", self.read, what, expected)?;
        Ok(())
    }
}

/// Waits for these lines, and no others, in the log of Envoy that a script prints; the first lines, and ports of clients, are
/// left out. Returns how many lines there were.
fn logged(script: &str, read: usize, what: &str, expected: &[String]) -> Result<usize> {
    let mut found = Vec::new();
    let waited = until("Envoy's log", || {
        found = connections(script)?.split_off(read);
        Ok((found.len() >= expected.len()).then_some(()))
    });
    ensure!(waited.is_ok() && found == expected, "{what}: Envoy logged {found:?}, not {expected:?}");
    Ok(found.len())
}

/// The connections in the log of Envoy that a script prints.
fn connections(script: &str) -> Result<Vec<String>> {
    let text = shell(script)?;
    let lines = text.lines().filter(|line| ["outbound ", "inbound "].iter().any(|way| line.starts_with(way)));
    Ok(lines.filter_map(without_port).collect())
}

/// The commands of a section of the documentation, block by block.
fn documented(heading: &str) -> Result<Vec<&'static str>> {
    blocks(section(heading)?, "sh").with_context(|| format!("a block of {heading} has no end"))
}

/// A section of the documentation.
fn section(heading: &str) -> Result<&'static str> {
    let (_, section) = DOCUMENT
        .split_once(&format!("\n{heading}\n"))
        .with_context(|| format!("there is no section {heading}"))?;
    let end = ["\n## ", "\n### "].iter().filter_map(|next| section.find(next)).min();
    Ok(&section[..end.unwrap_or(section.len())])
}

/// The fenced blocks of a language.
fn blocks(section: &'static str, language: &str) -> Option<Vec<&'static str>> {
    let blocks = section.split(&format!("```{language}\n")).skip(1).collect::<Vec<_>>();
    blocks.into_iter().map(|block| Some(block.split_once("```")?.0)).collect()
}

/// "outbound 10.66.0.2:4711 to 10.96.0.10:80" without the client's port.
fn without_port(line: &str) -> Option<String> {
    let (client, rest) = line.split_once(" to ")?;
    Some(format!("{} to {rest}", client.rsplit_once(':')?.0))
}

/// What a process in a slice gets, as a transient unit of another user.
fn unit_gets(slice: &str, url: &str) -> Result<String> {
    shell(&format!(
        "systemd-run --quiet --wait --pipe --collect --slice={slice} -p User=nobody curl -sS -g -m 60 '{url}'"
    ))
}

/// Runs a script that must succeed. Returns its output.
fn shell(script: &str) -> Result<String> {
    let mut command = Command::new("sh");
    command.args(["-ec", script]).current_dir("/root").stdin(Stdio::null());
    succeed(command)
}

/// A property of a unit.
fn property(unit: &str, name: &str) -> Result<String> {
    Ok(shell(&format!("systemctl show --value -p {name} {unit}"))?.trim().to_owned())
}

/// Polls until there is a result.
fn until<T>(what: &str, mut poll: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(done) = poll()? {
            return Ok(done);
        }
        ensure!(Instant::now() < deadline, "{what}: not after {PATIENCE:?}");
        thread::sleep(Duration::from_millis(200));
    }
}
