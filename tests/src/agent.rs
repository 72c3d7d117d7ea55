//! The agent under test, with a bpffs of its own: neither an installed agent nor another test is touched.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData};
use intercept_agent::sys::Plain;
use intercept_common::layout::{self, ConnKey, OrigDst};
use intercept_common::names;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::actor::binary;
use crate::testbed::{BpffsMount, Sandbox};

/// The variable that says where the agent is.
pub const VARIABLE: &str = "INTERCEPT_AGENT";

/// The flags of Istio's own init container.
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

/// The agent and its bpffs. Dropping it unmounts that, and with it goes every link that is pinned there.
#[derive(Debug)]
pub struct Agent {
    program: PathBuf,
    bpffs: BpffsMount,
    // What the commands are started by, if anything.
    starter: Vec<String>,
}

/// The capabilities that the agent's container adds to none, in a file of deploy/: the manifests, or the chart's.
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

    /// The agent of this build with this bpffs.
    pub fn on(bpffs: BpffsMount) -> Result<Self> {
        Ok(Self { program: binary::locate("intercept-agent", VARIABLE)?, bpffs, starter: Vec::new() })
    }

    /// From now on every command has these capabilities and can get no others, as in a container of
    /// Kubernetes that drops all and adds these. Named as there: NET_ADMIN.
    pub fn confine(&mut self, capabilities: &[String]) {
        let added = capabilities.iter().map(|name| format!(",+{}", name.to_lowercase()));
        let bounding = format!("--bounding-set=-all{}", added.collect::<String>());
        let confined = ["setpriv", &bounding, "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs"];
        self.starter.extend(confined.map(str::to_owned));
    }

    /// From now on every command is started by this one, which is given the program and its arguments.
    pub fn start_by(&mut self, starter: Vec<String>) {
        self.starter = starter;
    }

    /// The binary.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Where everything of the agent's is pinned.
    pub fn bpffs(&self) -> &Path {
        self.bpffs.path()
    }

    /// A subcommand on this bpffs; everything else is to be added.
    pub fn command(&self, subcommand: &str) -> Command {
        let mut command = self.start(&self.program);
        command.arg(subcommand).arg("--bpffs").arg(self.bpffs());
        // Those of the caller are not the test's.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if name != VARIABLE && (name.starts_with("INTERCEPT_") || name.starts_with("ISTIO_")) {
                command.env_remove(name);
            }
        }
        command.stdin(Stdio::null());
        command
    }

    /// A program, started as the agent's commands are; everything else is to be added.
    pub fn start(&self, program: &Path) -> Command {
        let Some((starter, arguments)) = self.starter.split_first() else { return Command::new(program) };
        let mut command = Command::new(starter);
        command.args(arguments).arg(program);
        command
    }

    /// A subcommand for one pod, whose namespace is named.
    pub fn for_pod(&self, subcommand: &str, pod: &Sandbox, flags: &[&str]) -> Command {
        let mut command = self.command(subcommand);
        command.arg("--cgroup-path").arg(pod.cgroup.path());
        if subcommand != "detach" {
            command.arg("--netns").arg(pod.netns.path());
        }
        command.args(flags);
        command
    }

    /// Attaches a pod; the answer's first word says what was done.
    pub fn attach(&self, pod: &Sandbox, flags: &[&str]) -> Result<String> {
        succeed(self.for_pod("attach", pod, flags))
    }

    /// Detaches a pod.
    pub fn detach(&self, pod: &Sandbox) -> Result<String> {
        succeed(self.for_pod("detach", pod, &[]))
    }

    /// Detaches all pods, and takes out the programs.
    pub fn detach_all(&self) -> Result<String> {
        let mut command = self.command("detach");
        command.arg("--all");
        succeed(command)
    }

    /// What `status --json` says of all pods.
    pub fn status(&self) -> Result<Value> {
        let mut command = self.command("status");
        command.arg("--json");
        Ok(serde_json::from_str(&succeed(command)?)?)
    }

    /// Starts `run` and waits until it is in force; also gives the line that it says then.
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

    /// How many original destinations are remembered, of whichever namespace.
    pub fn remembered(&self) -> Result<usize> {
        let path = self.store().join("maps").join(names::ORIG_DST);
        let data = MapData::from_pin(&path).with_context(|| format!("opening {}", path.display()))?;
        let map: HashMap<_, Plain<ConnKey>, Plain<OrigDst>> = Map::HashMap(data).try_into()?;
        Ok(map.keys().filter_map(Result::ok).count())
    }

    /// Whether the programs write events for `trace`.
    pub fn tracing(&self) -> Result<bool> {
        let path = self.store().join("maps").join(names::TRACING);
        let data = MapData::from_pin(&path).with_context(|| format!("opening {}", path.display()))?;
        let map: Array<_, u32> = Map::Array(data).try_into()?;
        Ok(map.get(&0, 0)? != 0)
    }

    /// The folder of this build's layout.
    pub fn store(&self) -> PathBuf {
        self.bpffs().join("intercept").join(format!("v{}", layout::VERSION))
    }
}

impl RunningAgent {
    /// Ends it as systemd and the kubelet do; its status and what it logged.
    pub fn terminate(mut self) -> Result<(ExitStatus, String)> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).context("signalling the agent")?;
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

/// Runs a command, which must succeed, and gives what it prints.
pub fn succeed(mut command: Command) -> Result<String> {
    let output = finish(&mut command)?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {error}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs a command to its end.
pub fn finish(command: &mut Command) -> Result<Output> {
    let program: &OsStr = command.get_program();
    let what = format!("starting {}", program.display());
    command.output().context(what)
}
