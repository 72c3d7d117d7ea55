//! A machine as a workload: `attach --machine`, `confirm`, and the guard that takes off what is not confirmed.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::{Failed, print_line};
use crate::{
    cgroup::{self, CgroupDir},
    cli::{AttachArgs, ConfirmArgs, GuardArgs},
    ids::NetnsCookie,
    listeners,
    netns::Netns,
    node::{self, Node, Target},
    options::{Config, InboundMode, InboundPorts, Ports, RunOptions},
    record::RecordOrigin,
};

/// Why a machine cannot be captured as asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    #[error("a pod has one cgroup, and {0} are named: only --machine takes several")]
    Several(usize),
    #[error("{0} is of pods and cannot be used with --machine: {1}")]
    Option(&'static str, &'static str),
    #[error("cgroup {} is inside {}, and both are named: the outer one includes it", inner.display(), outer.display())]
    Nested { inner: PathBuf, outer: PathBuf },
    #[error("--confirm is for `attach`: `run` releases the machine when it ends")]
    ConfirmRun,
}

/// Ports of the machine that `-b '*'` leaves alone.
pub(super) struct ProtectedPorts {
    ssh: BTreeSet<u16>,
    agent: BTreeSet<u16>,
}

/// The cgroups, sorted by age: the first gives the workload its id, in whichever order they are named.
fn cgroups(paths: &[PathBuf]) -> Result<(CgroupDir, Vec<CgroupDir>)> {
    let mut opened = match paths {
        [] => vec![CgroupDir::root()?],
        paths => paths.iter().map(CgroupDir::open_any).collect::<Result<Vec<_>, _>>()?,
    };
    opened.sort_by_key(CgroupDir::id);
    opened.dedup_by_key(|cgroup| cgroup.id());
    for inner in &opened {
        let lineage = inner.lineage()?;
        if let Some(outer) = opened.iter().find(|outer| lineage.contains(&outer.id())) {
            let (inner, outer) = (inner.path().to_owned(), outer.path().to_owned());
            return Err(Failed::Machine(MachineError::Nested { inner, outer }).into());
        }
    }
    let also = opened.split_off(1);
    Ok((opened.remove(0), also))
}

/// The target of `attach --machine`. Nothing has been changed yet.
pub(super) fn target(args: &AttachArgs) -> Result<Target> {
    let (cgroup, also) = cgroups(&args.cgroup_path)?;
    let netns = Netns::of_machine(NetnsCookie::of_workload(cgroup.id()))?;
    let confirm = args.confirm.map(|seconds| Duration::from_secs(seconds.into()));
    Ok(Target { cgroup, also, netns, netns_path: None, origin: RecordOrigin::Command, confirm })
}

/// Refuses options that a machine has no use for.
pub(super) fn refuse_options(config: &Config, switches: &RunOptions) -> Result<(), Failed> {
    let tproxy = "the marks and rules of TPROXY would be those of the whole host; use REDIRECT";
    let guests = "guests of the host are routed by its own rules";
    let named = "containers are found by a pod's UID; use --proxy-cgroup and --exempt-cgroup";
    let refused = [
        (config.mode == InboundMode::Tproxy, "-m TPROXY", tproxy),
        (!config.virt_interfaces.is_empty(), "-k", guests),
        (!config.accelerate.is_empty(), "--accelerate", "connections are joined between pods"),
        (!config.proxy_containers.is_empty(), "--proxy-container", named),
        (!config.exempt_containers.is_empty(), "--exempt-containers", named),
        (config.shadow, "--shadow", "a machine has no rules of istio-iptables to compare with"),
        (switches.network_namespace.is_some(), "--network-namespace", "it is the host's"),
        (switches.run_validation, "--run-validation", "its probes run in a pod's cgroup"),
    ];
    match refused.into_iter().find(|(is_given, ..)| *is_given) {
        Some((_, option, why)) => Err(Failed::Machine(MachineError::Option(option, why))),
        None => Ok(()),
    }
}

impl ProtectedPorts {
    /// Finds them, and excludes them from `-b '*'`.
    pub(super) fn exclude(config: &mut Config, netns: &Netns) -> Self {
        let mut found = Self { ssh: BTreeSet::from([22]), agent: BTreeSet::new() };
        if config.inbound_ports != InboundPorts::All {
            return found;
        }
        found.ssh.extend(configured_ssh_ports(Path::new("/etc/ssh")));
        // The session in which this command runs: client address and port, server address and port.
        let session = std::env::var("SSH_CONNECTION").ok();
        found.ssh.extend(session.and_then(|session| session.split(' ').nth(3)?.parse::<u16>().ok()));
        found.ssh.extend(listeners::ports_of(netns, "sshd"));
        found.agent.extend(listeners::ports_of(netns, "intercept-agent"));
        let own = found.ssh.iter().chain(&found.agent).map(|&port| port..=port);
        config.inbound_exclude =
            config.inbound_exclude.ranges().iter().cloned().chain(own).collect::<Ports>();
        found
    }

    /// What is captured inbound, for the output.
    pub(super) fn describe(&self, config: &Config) -> String {
        let list = |ports: &BTreeSet<u16>| ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
        match &config.inbound_ports {
            InboundPorts::All => {
                let agent = if self.agent.is_empty() {
                    String::new()
                } else {
                    format!(" and the agent ({})", list(&self.agent))
                };
                format!(
                    "every port except SSH ({}){agent}; excluded in all: {}",
                    list(&self.ssh),
                    config.inbound_exclude
                )
            }
            InboundPorts::Only(ports) if ports.is_empty() => "nothing (-b names no port)".to_owned(),
            InboundPorts::Only(ports) => format!("ports {ports}"),
        }
    }
}

/// The ports that the configuration of sshd names.
fn configured_ssh_ports(folder: &Path) -> Vec<u16> {
    let more = fs::read_dir(folder.join("sshd_config.d")).into_iter().flatten().flatten();
    let files = more.map(|entry| entry.path()).chain([folder.join("sshd_config")]);
    files.filter_map(|file| fs::read_to_string(file).ok()).flat_map(|text| ssh_ports(&text)).collect()
}

fn ssh_ports(text: &str) -> Vec<u16> {
    let port = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (option, value) = (words.next()?, words.next()?);
        if option.eq_ignore_ascii_case("Port") {
            value.parse().ok()
        } else if option.eq_ignore_ascii_case("ListenAddress") {
            value.parse::<std::net::SocketAddr>().map(|address| address.port()).ok().or_else(|| {
                let (host, port) = value.rsplit_once(':')?;
                if host.contains(':') { None } else { port.parse().ok() }
            })
        } else {
            None
        }
    };
    text.lines().filter_map(port).collect()
}

/// The name of a target in the output.
pub(super) fn name_of(target: &Target) -> String {
    let names: Vec<_> = target.cgroups().iter().map(|cgroup| cgroup.path().display().to_string()).collect();
    match names.as_slice() {
        [_] if target.is_workload() && target.cgroup.is_root() => format!("the whole machine ({})", names[0]),
        [one] => format!("cgroup {one}"),
        several => format!("cgroups {}", several.join(", ")),
    }
}

/// Starts the process that takes off what is not confirmed. It is started before the attach, so that no failure after that can
/// prevent it.
pub(super) fn start_guard(bpffs: &Path, confirm: Option<Duration>) -> Result<()> {
    let Some(time) = confirm else { return Ok(()) };
    let program = std::env::current_exe().context("finding this program, to start the guard of --confirm")?;
    Command::new(program)
        .arg("guard")
        .args(["--seconds", &time.as_secs().to_string()])
        .arg("--bpffs")
        .arg(bpffs)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting the guard of --confirm: nothing was attached")?;
    Ok(())
}

/// Waits, and removes what was not confirmed. The programs themselves ignore an expired policy, so that nothing is captured
/// even if this process is killed; the next command, or the daemon, then removes what is left.
pub(super) fn guard(args: &GuardArgs) -> Result<()> {
    let attach = rustix::process::getppid();
    leave_session();
    let until = node::boot_time() + u64::from(args.seconds) * 1_000_000_000;
    // A sleep does not count the time that the machine is suspended.
    while node::boot_time() < until {
        thread::sleep(Duration::from_millis(200));
    }
    let mut tries = 0;
    loop {
        // The time begins when the attach activates the policy, after it has loaded the programs.
        let is_attaching = rustix::process::getppid() == attach;
        match remove_expired(&args.bpffs.bpffs) {
            Ok(None) if is_attaching => thread::sleep(Duration::from_millis(100)),
            Ok(None) => return Ok(()),
            Ok(Some(left)) => thread::sleep(left.min(Duration::from_secs(1)).max(Duration::from_millis(20))),
            Err(error) if tries == 20 => return Err(error),
            Err(_) => {
                tries += 1;
                thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

/// Removes expired workloads. Returns the time until the next one expires.
fn remove_expired(bpffs: &Path) -> Result<Option<Duration>> {
    let Some(mut node) = Node::find(bpffs)? else { return Ok(None) };
    let waiting = |node: &Node| -> Result<Vec<Duration>> {
        Ok(node.maps().policies()?.iter().filter_map(|(_, policy)| node::remaining(policy)).collect())
    };
    let expired = waiting(&node)?.contains(&Duration::ZERO);
    if expired {
        node.sweep()?;
    }
    let next = waiting(&node)?.into_iter().min();
    node.remove_if_unused()?;
    if expired && let Ok(mut log) = fs::OpenOptions::new().write(true).open("/dev/kmsg") {
        // The terminal may be gone; the kernel's log is kept.
        _ = log.write_all(b"<5>intercept-agent: a capture was not confirmed in time and was taken off\n");
    }
    Ok(next)
}

/// Leaves the session of the terminal and the cgroup of the login, which may be ended with all of their processes.
fn leave_session() {
    // Fails only for the leader of a process group, which a child that was just started is not.
    _ = rustix::process::setsid();
    if let Some(mount) = cgroup::mounts().first() {
        _ = fs::write(mount.join("cgroup.procs"), "0");
    }
}

pub(super) fn confirm(args: &ConfirmArgs) -> Result<()> {
    let Some(mut node) = Node::find(&args.bpffs.bpffs)? else {
        bail!("confirming: nothing is attached; it may have been taken off already");
    };
    let mut only = None;
    if let Some(path) = &args.cgroup_path {
        let cgroup = CgroupDir::open_any(path)?;
        let found = node.pod_of_cgroup(cgroup.id())?;
        only = Some(found.with_context(|| format!("confirming: {} is not attached", path.display()))?.0);
    }
    let confirmed = node.confirm(only)?;
    if confirmed.is_empty() {
        bail!("confirming: no capture waits for it; it was confirmed before, or has been taken off");
    }
    for cookie in confirmed {
        let record = node.record_of(cookie)?;
        let cgroups = record.iter().flat_map(|record| record.cgroups());
        let cgroups: Vec<_> = cgroups.map(|path| path.display().to_string()).collect();
        print_line!("confirmed {}: it stays until it is detached", cgroups.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ports_of_sshd_are_read_from_its_configuration() {
        let text = "# Port 1\nPort 2222\n  port 22\nListenAddress 0.0.0.0:2022\nListenAddress [::]:2023\n\
                    ListenAddress host:2024\nListenAddress ::1\nPermitRootLogin no\n";
        assert_eq!(ssh_ports(text), [2222, 22, 2022, 2023, 2024]);
    }

    #[test]
    fn options_of_pods_are_refused() {
        let switches = RunOptions::default();
        assert!(refuse_options(&Config::default(), &switches).is_ok());
        let config = Config { mode: InboundMode::Tproxy, ..Config::default() };
        let error = refuse_options(&config, &switches).expect_err("TPROXY").to_string();
        assert!(error.contains("-m TPROXY") && error.contains("--machine"), "{error}");
        let config = Config { accelerate: vec!["envoy".to_owned()], ..Config::default() };
        assert!(refuse_options(&config, &switches).is_err());
        let switches = RunOptions { run_validation: true, ..switches };
        assert!(refuse_options(&Config::default(), &switches).is_err());
    }

    #[test]
    fn one_cgroup_inside_another_is_refused() {
        use crate::testing::TestCgroup;
        let (one, other) = (TestCgroup::new(), TestCgroup::new());
        let inner = one.cgroup.path().join("inner");
        fs::create_dir(&inner).expect("a cgroup");
        let paths = |paths: &[&Path]| paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>();
        let error = cgroups(&paths(&[&inner, other.cgroup.path(), one.cgroup.path()])).expect_err("nested");
        assert!(error.to_string().contains("inner is inside"), "{error}");
        let (first, also) = cgroups(&paths(&[other.cgroup.path(), one.cgroup.path()])).expect("two");
        let (same, _) = cgroups(&paths(&[one.cgroup.path(), other.cgroup.path()])).expect("two");
        assert_eq!((first.id(), also.len()), (same.id(), 1), "the order does not matter");
    }

    #[test]
    fn what_is_left_alone_inbound_is_said() {
        let netns = crate::testing::new_netns();
        let mut config = Config { inbound_ports: InboundPorts::All, ..Config::default() };
        let protected = ProtectedPorts::exclude(&mut config, &netns);
        assert!(config.inbound_exclude.contains(22), "{}", config.inbound_exclude);
        assert!(protected.describe(&config).contains("22"), "{}", protected.describe(&config));
        let mut config = Config { inbound_ports: InboundPorts::Only([22].into_iter().collect()), ..config };
        config.inbound_exclude = Ports::default();
        ProtectedPorts::exclude(&mut config, &netns);
        assert!(config.inbound_exclude.is_empty(), "a port that -b names is captured");
    }
}
