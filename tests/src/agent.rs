//! The agent under test, on a bpffs that no other agent or test uses.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData};
use intercept_agent::facade::sys::{self, Plain};
use intercept_common::layout::{self, ConnKey, OrigDst};
use intercept_common::names;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::actor::binary;
use crate::status::{StatusAcceleration, StatusEntry};
use crate::testbed::{BpffsMount, Sandbox};

/// The variable with the path of the agent.
pub const VARIABLE: &str = "INTERCEPT_AGENT";

/// The flags of Istio's init container.
pub const INIT_FLAGS: [&str; 16] = [
    "-p",
    "15001",
    "-z",
    "15006",
    "-u",
    "1337",
    "-m",
    "REDIRECT",
    "-i",
    "*",
    "-x",
    "",
    "-b",
    "*",
    "-d",
    "15090,15020",
];

/// The agent and its bpffs. Dropping it unmounts the bpffs, which detaches every link that is pinned there.
#[derive(Debug)]
pub struct Agent {
    program: PathBuf,
    bpffs: BpffsMount,
    // The command that starts the agent's commands, if any.
    starter: Vec<String>,
}

/// The capabilities that a manifest or template in deploy/ gives the agent's container.
pub fn deployed_capabilities(file: &str) -> Result<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let list = text.split_once("- name: agent").and_then(|(_, container)| {
        let (_, list) = container.split_once("add: [")?;
        Some(list.split_once(']')?.0)
    });
    let list = list.with_context(|| format!("{} gives the agent no capabilities", path.display()))?;
    Ok(list.split(", ").map(str::to_owned).collect())
}

/// `intercept-agent run`. Dropping it kills the process.
#[derive(Debug)]
pub struct RunningAgent {
    child: Child,
}

impl Agent {
    /// The agent of this build with an empty bpffs.
    pub fn new(label: &str) -> Result<Self> {
        Self::on(BpffsMount::new(label)?)
    }

    /// Another build of the agent with an empty bpffs.
    pub fn of_build(program: PathBuf, label: &str) -> Result<Self> {
        Ok(Self { program, bpffs: BpffsMount::new(label)?, starter: Vec::new() })
    }

    /// The agent of this build with this bpffs.
    pub fn on(bpffs: BpffsMount) -> Result<Self> {
        Ok(Self { program: binary::locate("intercept-agent", VARIABLE)?, bpffs, starter: Vec::new() })
    }

    /// Restricts further commands to these capabilities, as a Kubernetes container that drops all and adds these. The
    /// names are those of Kubernetes, such as NET_ADMIN.
    pub fn confine(&mut self, capabilities: &[String]) {
        let added = capabilities.iter().map(|name| format!(",+{}", name.to_lowercase()));
        let bounding = format!("--bounding-set=-all{}", added.collect::<String>());
        let confined = ["setpriv", &bounding, "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs"];
        self.starter.extend(confined.map(str::to_owned));
    }

    /// Starts further commands by this one, which gets the program and its arguments.
    pub fn start_by(&mut self, starter: Vec<String>) {
        self.starter = starter;
    }

    /// The binary.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The bpffs with the agent's pins.
    pub fn bpffs(&self) -> &Path {
        self.bpffs.path()
    }

    /// A subcommand on this bpffs, without further arguments.
    pub fn command(&self, subcommand: &str) -> Command {
        let mut command = self.start(&self.program);
        command.arg(subcommand).arg("--bpffs").arg(self.bpffs());
        // Variables of the caller must not change the test.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if name != VARIABLE && (name.starts_with("INTERCEPT_") || name.starts_with("ISTIO_")) {
                command.env_remove(name);
            }
        }
        // Its probes are connections that other tests do not expect; a flag takes precedence.
        command.env("INTERCEPT_PROVE_INTERVAL", "0");
        command.stdin(Stdio::null());
        command
    }

    /// A program, started as the agent's commands are, without arguments.
    pub fn start(&self, program: &Path) -> Command {
        let Some((starter, arguments)) = self.starter.split_first() else { return Command::new(program) };
        let mut command = Command::new(starter);
        command.args(arguments).arg(program);
        command
    }

    /// A subcommand for a pod, with its cgroup and its namespace.
    pub fn for_pod(&self, subcommand: &str, pod: &Sandbox, flags: &[&str]) -> Command {
        let mut command = self.command(subcommand);
        command.arg("--cgroup-path").arg(pod.cgroup.path());
        if subcommand != "detach" {
            command.arg("--netns").arg(pod.netns.path());
        }
        command.args(flags);
        command
    }

    /// Attaches a pod. The first word of the output says what was done.
    pub fn attach(&self, pod: &Sandbox, flags: &[&str]) -> Result<String> {
        succeed(self.for_pod("attach", pod, flags))
    }

    /// Detaches a pod.
    pub fn detach(&self, pod: &Sandbox) -> Result<String> {
        succeed(self.for_pod("detach", pod, &[]))
    }

    /// Detaches all pods and removes the programs.
    pub fn detach_all(&self) -> Result<String> {
        let mut command = self.command("detach");
        command.arg("--all");
        succeed(command)
    }

    /// The output of `status --json`.
    pub fn status(&self) -> Result<Value> {
        let mut command = self.command("status");
        command.arg("--json");
        Ok(serde_json::from_str(&succeed(command)?)?)
    }

    /// The attached pods, as `status` lists them.
    pub fn pods(&self) -> Result<Vec<StatusEntry>> {
        Ok(serde_json::from_value(self.status()?)?)
    }

    /// The joined connections of a pod.
    pub fn acceleration_of(&self, pod: &Sandbox) -> Result<StatusAcceleration> {
        let found = self.pods()?.into_iter().find(|found| found.cgroup == pod.cgroup.path());
        found.and_then(|found| found.acceleration).context("the pod is not accelerated")
    }

    /// Starts `run` and waits until the capture is active. Also returns the line that it prints then.
    pub fn run(&self, pod: &Sandbox, flags: &[&str]) -> Result<(RunningAgent, String)> {
        let mut child = self
            .for_pod("run", pod, flags)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let output = child.stdout.take();
        let mut running = RunningAgent { child };
        let mut said = String::new();
        BufReader::new(output.context("the agent has no standard output")?).read_line(&mut said)?;
        if said.is_empty() {
            let mut why = String::new();
            running.child.stderr.take().context("no standard error")?.read_to_string(&mut why)?;
            anyhow::bail!("intercept-agent run: {why}");
        }
        Ok((running, said))
    }

    /// The number of entries in ORIG_DST, of all namespaces.
    pub fn remembered(&self) -> Result<usize> {
        let map: HashMap<_, Plain<ConnKey>, Plain<OrigDst>> =
            Map::HashMap(self.map(names::ORIG_DST)?).try_into()?;
        Ok(map.keys().filter_map(Result::ok).count())
    }

    /// The entries of a map that can be listed.
    pub fn entries<K: bytemuck::Pod, V: bytemuck::Pod>(&self, map: &str) -> Result<Vec<(K, V)>> {
        let data = self.map(map)?;
        sys::entries(data.fd().as_fd()).with_context(|| format!("reading {map}"))
    }

    /// A map.
    pub fn map(&self, map: &str) -> Result<MapData> {
        let path = self.store().join("maps").join(map);
        MapData::from_pin(&path).with_context(|| format!("opening {}", path.display()))
    }

    /// Whether the programs write events for `trace`.
    pub fn tracing(&self) -> Result<bool> {
        let map: Array<_, u32> = Map::Array(self.map(names::TRACING)?).try_into()?;
        Ok(map.get(&0, 0)? != 0)
    }

    /// The folder of the current layout in bpffs.
    pub fn store(&self) -> PathBuf {
        self.bpffs().join("intercept").join(format!("v{}", layout::VERSION))
    }
}

impl RunningAgent {
    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM, as systemd and the kubelet do. Returns the exit status and the log.
    pub fn terminate(self) -> Result<(ExitStatus, String)> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).context("signalling the agent")?;
        self.wait()
    }

    /// Waits until it ends by itself. Returns the exit status and the log.
    pub fn ended(mut self, limit: Duration) -> Result<(ExitStatus, String)> {
        let deadline = Instant::now() + limit;
        while self.child.try_wait().context("waiting for the agent")?.is_none() {
            ensure!(Instant::now() < deadline, "the agent still runs after {limit:?}");
            thread::sleep(Duration::from_millis(10));
        }
        self.wait()
    }

    fn wait(mut self) -> Result<(ExitStatus, String)> {
        let mut log = String::new();
        if let Some(mut output) = self.child.stderr.take() {
            output.read_to_string(&mut log)?;
        }
        Ok((self.child.wait()?, log))
    }
}

impl Drop for RunningAgent {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Runs a command that must succeed. Returns its output.
pub fn succeed(mut command: Command) -> Result<String> {
    let output = finish(&mut command)?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {error}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs a command until it ends.
pub fn finish(command: &mut Command) -> Result<Output> {
    let program: &OsStr = command.get_program();
    let what = format!("starting {}", program.display());
    command.output().context(what)
}
