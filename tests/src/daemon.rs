//! The daemon under test, with a folder of pods and a socket.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use intercept_agent::facade::daemon::{
    Add, CaptureArgs, DaemonRequest, PodReport, PodState, Response, SandboxInfo, Select, socket,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, Transport},
    agent::Agent,
    testbed::{Ids, Pod, Sandbox, cgroup, name},
};

/// The timeout of everything that is not measured. A cut-over begins within ten seconds, and takes up to ten more on a busy machine.
const PATIENCE: Duration = Duration::from_secs(40);

/// A daemon, which may be stopped. Dropping it kills the process. Captures stay until the [`Agent`] is dropped.
#[derive(Debug)]
pub struct Daemon<'a> {
    agent: &'a Agent,
    folder: TempDir,
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
    child: Option<Child>,
}

impl<'a> Daemon<'a> {
    /// Starts a daemon and waits until it answers.
    pub fn start(agent: &'a Agent, arguments: &[&str]) -> Result<Self> {
        Self::start_with(agent, arguments, &[])
    }

    /// As [`Daemon::start`], with environment variables.
    pub fn start_with(agent: &'a Agent, arguments: &[&str], variables: &[(&str, &str)]) -> Result<Self> {
        let folder = name::scratch("daemon")?;
        fs::create_dir(folder.path().join("pods"))?;
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let variables = variables.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        let mut daemon = Self { agent, folder, arguments, variables, child: None };
        daemon.restart()?;
        Ok(daemon)
    }

    /// Starts it again. Returns how long it took to take over the active captures.
    pub fn restart(&mut self) -> Result<Duration> {
        ensure!(self.child.is_none(), "it runs");
        let started = Instant::now();
        let mut command: Command = self.agent.command("daemon");
        command
            .arg("--pods-dir")
            .arg(self.pods_dir())
            .arg("--socket")
            .arg(self.socket())
            .args(&self.arguments)
            .envs(self.variables.iter().map(|(name, value)| (name, value)));
        self.child = Some(command.stdin(Stdio::null()).spawn().context("starting the daemon")?);
        self.wait("the daemon answers", |daemon| daemon.reports().is_ok())?;
        Ok(started.elapsed())
    }

    /// Gives the next start other arguments.
    pub fn set_arguments(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    }

    /// Sends SIGKILL, as the kernel does when memory is short.
    pub fn kill(&mut self) -> Result<()> {
        let mut child = self.child.take().context("it does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Sends SIGTERM, as the kubelet does.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        let mut child = self.child.take().context("it does not run")?;
        kill_process(Pid::from_child(&child), Signal::TERM).context("signalling the daemon")?;
        Ok(child.wait()?)
    }

    /// The process id.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The folder of pods.
    pub fn pods_dir(&self) -> PathBuf {
        self.folder.path().join("pods")
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    /// A scratch folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes the file of a pod into the folder.
    pub fn put(&self, name: &str, sandbox: &Sandbox, arguments: &[&str]) -> Result<()> {
        let text =
            json!({ "cgroup": sandbox.cgroup.path(), "netns": sandbox.netns.path(), "arguments": arguments });
        self.put_text(name, &text.to_string())
    }

    /// Writes any text into the folder.
    pub fn put_text(&self, name: &str, text: &str) -> Result<()> {
        let beside = self.pods_dir().join(format!(".{name}"));
        fs::write(&beside, text)?;
        Ok(fs::rename(beside, self.pods_dir().join(format!("{name}.json")))?)
    }

    /// Removes the file of a pod from the folder.
    pub fn remove(&self, name: &str) -> Result<()> {
        Ok(fs::remove_file(self.pods_dir().join(format!("{name}.json")))?)
    }

    /// Sends a request to the socket.
    pub fn ask(&self, request: &DaemonRequest) -> Result<Response> {
        Ok(socket::request(&self.socket(), request)?)
    }

    /// The reports on all pods.
    pub fn reports(&self) -> Result<Vec<PodReport>> {
        match self.ask(&DaemonRequest::Report)? {
            Response::Pods(reports) => Ok(reports),
            other => bail!("another answer: {other:?}"),
        }
    }

    /// The report on a pod of the folder.
    pub fn report(&self, name: &str) -> Result<Option<PodReport>> {
        let key = format!("file/{name}.json");
        Ok(self.reports()?.into_iter().find(|report| report.pod == key))
    }

    /// Waits until a pod of the folder has a state.
    pub fn wait_for(&self, name: &str, state: PodState) -> Result<PodReport> {
        self.wait(&format!("{name} is {state:?}"), |daemon| {
            daemon.report(name).is_ok_and(|report| report.is_some_and(|report| report.state == state))
        })?;
        self.report(name)?.context("it is gone again")
    }

    /// Waits until a condition holds.
    pub fn wait(&self, what: &str, so: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !so(self) {
            ensure!(Instant::now() < deadline, "waited in vain: {what}; {:?}", self.reports());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let killed = child.kill().and_then(|()| child.wait());
            if !std::thread::panicking() {
                killed.expect("killed");
            }
        }
    }
}

/// The request of the CNI plugin for a new pod, with capture options.
pub fn add(sandbox: &Sandbox, uid: &str, arguments: Vec<String>) -> Result<DaemonRequest> {
    let relative = sandbox.cgroup.path().strip_prefix(cgroup::mount_point()?)?;
    Ok(DaemonRequest::Add(Box::new(Add {
        pod: sandbox_info(uid),
        netns: sandbox.netns.path().to_owned(),
        cgroup: Some(relative.display().to_string()),
        annotations: None,
        addresses: Vec::new(),
        select: Select::All,
        given: CaptureArgs { arguments, ..CaptureArgs::default() },
    })))
}

/// The request of the CNI plugin for a removed pod.
pub fn delete(uid: &str) -> DaemonRequest {
    DaemonRequest::Delete(sandbox_info(uid))
}

fn sandbox_info(uid: &str) -> SandboxInfo {
    SandboxInfo { sandbox: uid.into(), uid: Some(uid.into()), ..SandboxInfo::default() }
}

/// Captures all outbound connections.
pub const OUTBOUND: [&str; 4] = ["-i", "*", "-u", "1337"];

/// The address of a service without endpoints.
pub fn service() -> SocketAddr {
    SocketAddr::from(([10, 96, 0, 10], 80))
}

/// Starts an actor in the pod that plays the proxy on 15001.
pub fn proxy(pod: &Pod) -> Actor {
    let actor = Actor::start(pod).expect("an actor");
    listen_as_proxy(&actor);
    actor
}

/// Has an actor play the proxy on 15001.
pub fn listen_as_proxy(actor: &Actor) {
    let bind = Bind::new(Ids::PROXY, SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 15001));
    actor.listen(Listen { name: "proxy".into(), transport: Transport::Tcp, bind }).expect("a proxy");
}

/// The server that answers the application, if any.
pub fn answers(actor: &Actor, to: SocketAddr) -> Option<String> {
    match actor.dial(Dial::new(Ids::APP, to)).expect("dialled").outcome {
        DialOutcome::Answered(answer) => Some(answer.server),
        _ => None,
    }
}

/// Sends GET. Returns the status and the whole response.
pub fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("connected");
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").expect("written");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("read");
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, text)
}

/// An address without a listener.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port")
}

/// Calls the CNI plugin of this folder for a sandbox, as a runtime does. Returns whether it succeeded, and its output.
pub fn call_plugin(
    binaries: &Path,
    command: &str,
    config: &Value,
    sandbox: &Sandbox,
    (id, interface): (&str, &str),
) -> (bool, String) {
    let mut child = Command::new(binaries.join("intercept-cni"))
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", id)
        .env("CNI_NETNS", sandbox.netns.path())
        .env("CNI_IFNAME", interface)
        .env("CNI_ARGS", format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=uid-{id}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    child.stdin.take().expect("piped").write_all(config.to_string().as_bytes()).expect("written");
    let output = child.wait_with_output().expect("ended");
    (output.status.success(), String::from_utf8(output.stdout).expect("text"))
}
