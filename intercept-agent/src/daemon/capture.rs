//! Captures and releases one pod: the jobs of the worker.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use procfs::{net::TcpState, process::Process};
use rustix::time::{ClockId, clock_gettime};

use super::{
    cause::Cause,
    desired::{CaptureArgsError, CaptureOptions, DesiredPod},
    takeover::Takeover,
    worker::{Access, WorkerFailed},
};
use crate::{
    cgroup::{self, CgroupDir, CgroupError},
    confinement::explained,
    containers,
    cutover::{CutoverError, RulesState},
    escape::OneLine,
    ids::NetnsCookie,
    netns::{Netns, NetnsError},
    node::{Attached, Node, NodeError, Observation, PodRecords, Rewrite, Target},
    options::{Config, OptionError},
    record::{Record, RecordOrigin},
    routes::{RoutesError, Subscription},
    shadow::ShadowReport,
    store::{StoreError, is_short},
};

/// Why a pod is not captured as desired.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error(transparent)]
    Options(#[from] CaptureArgsError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error("following the namespace")]
    Follow(#[from] RoutesError),
    #[error(transparent)]
    Worker(#[from] WorkerFailed),
    /// Its rules of iptables could not be put in again.
    #[error("putting the pod's rules of iptables in again")]
    Rules(#[from] CutoverError),
    /// It was attached by a command and has been detached, which the daemon does not undo.
    #[error("it was detached by command")]
    Detached,
}

impl CaptureError {
    /// Its cause, for metrics.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Options(_) => Cause::Options,
            Self::Cgroup(_) => Cause::Cgroup,
            Self::Netns(NetnsError::Host { .. }) => Cause::HostNetwork,
            Self::Netns(NetnsError::NoProcess { .. }) => Cause::NoProcess,
            Self::Netns(_) | Self::Node(NodeError::Netns(_)) => Cause::Netns,
            Self::Node(NodeError::Table(error)) if error.is_full() => Cause::MapFull,
            Self::Node(NodeError::TooManyPods(_)) => Cause::MapFull,
            Self::Node(NodeError::OverBudget { .. }) => Cause::OverBudget,
            Self::Node(
                NodeError::NetnsTaken { .. } | NodeError::CgroupTaken { .. } | NodeError::Nested { .. },
            ) => Cause::Conflict,
            Self::Node(
                NodeError::Store(
                    StoreError::Mount { .. }
                    | StoreError::Record { .. }
                    | StoreError::Ownership(_)
                    | StoreError::OtherDaemon { .. },
                )
                | NodeError::OtherLayout(_)
                | NodeError::Incomplete(_),
            ) => Cause::Store,
            Self::Node(NodeError::Left) => Cause::Leaving,
            Self::Node(NodeError::RouteSnapshot { .. }) | Self::Follow(_) => Cause::Routes,
            Self::Node(_) => Cause::Kernel,
            Self::Worker(_) => Cause::Internal,
            Self::Detached => Cause::Detached,
            Self::Rules(_) => Cause::Rules,
        }
    }

    /// The error with its causes, separated by colons. On one line, because it may contain values that a pod chose.
    pub fn text(&self) -> String {
        OneLine(explained(self)).to_string()
    }

    /// Whether the pod's cgroup looks like this while its sandbox is being made: empty, or with a process that is not
    /// in its namespace yet.
    pub fn is_of_a_start(&self) -> bool {
        matches!(
            self,
            Self::Netns(NetnsError::NoProcess { .. } | NetnsError::Host { .. } | NetnsError::Several { .. })
        )
    }
}

impl From<OptionError> for CaptureError {
    fn from(error: OptionError) -> Self {
        Self::Options(error.into())
    }
}

/// An applied pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppliedPod {
    /// Cookie of its namespace.
    pub cookie: NetnsCookie,
    /// Its cgroup.
    pub cgroup: PathBuf,
    /// Id of the cgroup, which one of the same name made later does not have.
    pub cgroup_id: u64,
    /// Inode of its namespace.
    pub netns_inode: u64,
    /// The path by which it was opened. `None` if it was found through the pod's processes.
    pub netns_path: Option<PathBuf>,
}

/// Whether a pod still exists, checked without a descriptor that would keep it alive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Liveness {
    /// It exists.
    Alive,
    /// Nothing leads to its namespace any more, which must not be kept alive.
    Unknown,
    /// Its cgroup is gone.
    Gone,
}

impl AppliedPod {
    /// The applied pod that a record describes.
    pub fn of_record(record: &Record) -> Self {
        Self {
            cookie: record.cookie,
            cgroup: record.cgroup.clone(),
            cgroup_id: record.cgroup_id,
            netns_inode: record.netns_inode,
            netns_path: record.netns_path.clone(),
        }
    }

    /// Checks it, with two system calls, or a dozen if its namespace has no path.
    pub fn liveness(&self) -> Liveness {
        if !leads_to(&self.cgroup, self.cgroup_id) {
            return Liveness::Gone;
        }
        let leads = match &self.netns_path {
            Some(path) => leads_to(path, self.netns_inode),
            // A container that was restarted in the same cgroup is in another namespace.
            None => cgroup::has_process(&self.cgroup, &|pid| {
                leads_to(Path::new(&format!("/proc/{pid}/ns/net")), self.netns_inode)
            }),
        };
        if leads { Liveness::Alive } else { Liveness::Unknown }
    }

    /// Whether the cgroup has a process.
    pub fn has_processes(&self) -> bool {
        let events = fs::read_to_string(self.cgroup.join("cgroup.events"));
        events.is_ok_and(|text| text.lines().any(|line| line == "populated 1"))
    }

    /// Its namespace, if something still leads to it, which a lack of descriptors does not show.
    pub fn netns(&self) -> Result<Option<Netns>, NodeError> {
        let open = || match &self.netns_path {
            Some(path) => Ok(Netns::open(path)?),
            None => Ok(Netns::of_sandbox(&CgroupDir::open(&self.cgroup)?, Some(self.netns_inode))?),
        };
        match open() {
            Err(error) if is_short(&error) => Err(error),
            opened => Ok(opened.ok().filter(|netns: &Netns| netns.cookie() == self.cookie)),
        }
    }
}

/// Whether a path leads to this inode. If the kernel lacks the memory to tell, it does as before.
pub fn leads_to(path: &Path, inode: u64) -> bool {
    match fs::metadata(path) {
        Ok(found) => found.ino() == inode,
        Err(error) => is_short(&error),
    }
}

/// The result of a capture.
pub struct Captured {
    /// What the attach did.
    pub done: Attached,
    /// The pod.
    pub applied: AppliedPod,
    /// Follows its namespace, unless it is already followed.
    pub changes: Option<Subscription>,
    /// Number of connections from before the capture, which continue past the proxy.
    pub preexisting_connections: usize,
    /// Duration, without the wait for the worker.
    pub took: Duration,
    /// Processor time of the worker.
    pub cost: Duration,
    /// The pod had no process when its user namespace was read.
    pub idle: bool,
    /// The cgroups of its containers as they were before; `None` if its options name no container.
    pub containers: Option<Vec<(u64, String)>>,
    /// Its connections are not joined yet, because the self-test of this kernel has not ended.
    pub awaits_self_test: bool,
    /// Where its saved rules of iptables are, if it has some.
    pub rules: Option<RulesState>,
    /// Whether it is to be cut over from them.
    pub takeover: Takeover,
}

/// What was observed of a pod, ready to be attached.
pub struct Prepared {
    target: Target,
    config: Config,
    observed: Observation,
    changes: Option<Subscription>,
    connections: Option<usize>,
    idle: bool,
    containers: Option<Vec<(u64, String)>>,
    takeover: Takeover,
}

/// Observes a desired pod, on a thread of its own, so that a slow pod delays no other. `before` is the applied pod, and
/// `followed` the cookie of the followed namespace.
pub fn prepare(
    desired: &DesiredPod,
    before: Option<&AppliedPod>,
    followed: Option<NetnsCookie>,
) -> Result<Prepared, CaptureError> {
    let cgroup = CgroupDir::open(&desired.cgroup)?;
    let config = match &desired.options {
        CaptureOptions::Args(given) => given.validate(&cgroup)?,
        CaptureOptions::Config(config) => (**config).clone(),
    };
    let netns = match &desired.netns {
        Some(path) => Netns::open(path)?,
        None => Netns::of_sandbox(&cgroup, before.map(|applied| applied.netns_inode))?,
    };
    let cookie = netns.cookie();
    // Before the observation, so that a process that starts meanwhile causes another one.
    let containers = config.names_containers().then(|| containers::fingerprint(&desired.cgroup));
    let idle = cgroup.processes().is_ok_and(|processes| processes.is_empty());
    let target = Target {
        cgroup,
        also: Vec::new(),
        netns,
        netns_path: desired.netns.clone(),
        origin: desired.origin.clone(),
        confirm: None,
    };
    target
        .netns
        .run(|| {
            // Before the attach, so that no change falls in between.
            let mut changes = if followed == Some(cookie) {
                None
            } else {
                let mut changes = Subscription::open(&target.netns)?;
                if !config.virt_interfaces.is_empty() {
                    changes.watch_listeners(&target.netns, config.proxy_port).map_err(|source| {
                        NodeError::Listeners { netns: target.netns.name().to_owned(), source }
                    })?;
                }
                Some(changes)
            };
            let observed = Observation::of(&target, &config, changes.as_mut())?;
            let is_new = before.is_none_or(|applied| applied.cookie != cookie);
            let connections = if is_new { established(&target.netns).ok() } else { None };
            Ok::<_, CaptureError>((observed, changes, connections))
        })?
        .map(|(observed, changes, connections)| Prepared {
            target,
            config,
            observed,
            changes,
            connections,
            idle,
            containers,
            takeover: desired.takeover,
        })
}

/// Attaches a prepared pod. `before` is the applied pod.
pub fn capture(
    access: &mut Access,
    prepared: Prepared,
    before: Option<&AppliedPod>,
) -> Result<Captured, CaptureError> {
    let (started, before_cost) = (Instant::now(), processor_time());
    let Prepared { target, mut config, mut observed, mut changes, connections, idle, containers, takeover } =
        prepared;
    let cookie = target.netns.cookie();
    let (done, awaits_self_test, rules) = access.with(|node| {
        if let Some(before) = before.filter(|applied| applied.cookie != cookie) {
            // The pod has a new sandbox: the cgroup cannot have both.
            node.detach(before.cookie, None)?;
        }
        let active = node.maps().policy(cookie).map_err(NodeError::from)?.is_some();
        if target.origin == RecordOrigin::Command && !active {
            return Err(CaptureError::Detached);
        }
        let awaits_self_test = !config.accelerate.is_empty() && !node.can_accelerate_at_once();
        if awaits_self_test {
            // A pod that starts does not wait for it, nor do the pods behind it.
            config.accelerate.clear();
        }
        let rules = node.store().saved_rules(cookie).map_err(NodeError::from)?.map(|saved| saved.state);
        if takeover != Takeover::None {
            // Only the cut-over enforces it.
            config.shadow = rules.is_none() || node.is_in_shadow(cookie)?;
        }
        let done = node.attach(&target, &config, &mut observed, Rewrite::IfChanged)?;
        Ok::<_, CaptureError>((done, awaits_self_test, rules))
    })?;
    if let Some(changes) = &mut changes {
        changes.expect(observed.into_routes());
    }
    let applied = AppliedPod {
        cookie,
        cgroup: target.cgroup.path().to_owned(),
        cgroup_id: target.cgroup.id(),
        netns_inode: target.netns.inode(),
        netns_path: target.netns_path.clone(),
    };
    let preexisting_connections = connections.unwrap_or_default();
    let cost = processor_time().saturating_sub(before_cost);
    Ok(Captured {
        done,
        applied,
        changes,
        preexisting_connections,
        took: started.elapsed(),
        cost,
        idle,
        containers,
        awaits_self_test,
        rules,
        takeover,
    })
}

/// Processor time of the calling thread, which does not grow while another agent has the store's lock.
fn processor_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default()
}

/// The TCP connections in a namespace, both ends counted where both are in it.
fn established(netns: &Netns) -> Result<usize, NetnsError> {
    // A new pod has none. The table of connections need not be read.
    if netns.has_no_tcp_sockets()? {
        return Ok(0);
    }
    let count = || {
        let thread = Process::new(rustix::thread::gettid().as_raw_nonzero().get()).ok()?;
        let entries = thread.tcp().ok()?.into_iter().chain(thread.tcp6().unwrap_or_default());
        let is_open =
            |state: &TcpState| !matches!(state, TcpState::Listen | TcpState::TimeWait | TcpState::Close);
        Some(entries.filter(|entry| is_open(&entry.state)).count())
    };
    Ok(netns.run(count)?.unwrap_or_default())
}

/// What becomes of a pod that is released.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReleasedPod {
    /// It goes on without the agent.
    Lives,
    /// It ends, and nothing has to capture it.
    Ends,
}

/// Releases a pod.
pub fn release(access: &mut Access, applied: &AppliedPod, released: ReleasedPod) -> Result<(), NodeError> {
    let netns = applied.netns()?;
    access.with(|node| {
        if released == ReleasedPod::Ends {
            node.store().forget_rules(applied.cookie)?;
        }
        node.detach(applied.cookie, netns.as_ref())
    })
}

/// Whether cgroup and namespace of a pod still exist.
pub fn is_alive(access: &mut Access, cookie: NetnsCookie) -> Result<bool, NodeError> {
    access.with(|node| Ok(node.cgroup_of(cookie)?.is_some()))
}

/// Removes the state of pods that are gone, and returns the records of the others.
pub fn sweep(access: &mut Access) -> Result<Vec<Record>, NodeError> {
    access.with(|node| {
        let before = node.store().pods()?.len();
        let living = node.sweep()?.len();
        if before > living {
            tracing::info!(pods = before - living, "removed the state of pods that are gone");
        }
        stop_unread_trace(node)?;
        Ok(readable(node.pods()?))
    })
}

/// What a comparison of the applied pods with the maps has found.
pub struct ResyncResult {
    /// The cookies of all applied pods.
    pub active: Vec<NetnsCookie>,
    /// The records of those that were not known.
    pub new: Vec<Record>,
    /// The reports of those in shadow mode.
    pub shadows: Vec<ShadowReport>,
}

/// As [`sweep`]. Also compares the applied pods with the maps.
pub fn resync(access: &mut Access, known: &[NetnsCookie]) -> Result<ResyncResult, NodeError> {
    access.with(|node| {
        node.sweep()?;
        stop_unread_trace(node)?;
        let active: Vec<NetnsCookie> =
            node.maps().policies()?.into_iter().map(|(cookie, _)| cookie).collect();
        let unknown = active.iter().any(|cookie| !known.contains(cookie));
        let records = if unknown { readable(node.pods()?) } else { Vec::new() };
        let new = records.into_iter().filter(|record| !known.contains(&record.cookie)).collect();
        let shadows = ShadowReport::read_all(node.maps().shadow())?;
        Ok(ResyncResult { active, new, shadows })
    })
}

/// The readable records. Other pods stay attached until their source asks for them again.
fn readable(pods: PodRecords) -> Vec<Record> {
    for pod in pods.broken {
        tracing::error!(
            cookie = pod.cookie.0,
            error = &pod.error as &dyn std::error::Error,
            "a pod is broken"
        );
    }
    pods.readable.into_iter().map(|(record, _)| record).collect()
}

/// Switches events off if their reader was killed.
fn stop_unread_trace(node: &Node) -> Result<(), NodeError> {
    crate::trace::switch_off_if_unread(node.store()).map_err(NodeError::from)
}
