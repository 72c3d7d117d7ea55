//! `attach`, also with the command line of istio-iptables.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use super::{
    Failed, detach,
    machine::{self, MachineError, ProtectedPorts},
    print_line,
};
use crate::{
    cgroup::CgroupDir,
    cli::{AttachArgs, IstioArgs},
    netns::Netns,
    node::{Attached, Node, Observation, Rewrite, Target},
    options::{Config, EtcFiles, NameSource, Note, PodFiles, RawOptions, RunOptions},
    record::RecordOrigin,
    routes::Subscription,
    userns::{IdMap, IdMaps},
    validation::{self, Probe, Validated},
};

/// A pod and its validated options. Nothing has been changed yet.
pub(super) struct AttachRequest {
    pub(super) target: Target,
    pub(super) config: Config,
    pub(super) switches: RunOptions,
    pub(super) bpffs: PathBuf,
    pub(super) max_connections: u32,
    /// Of a machine, the ports that are left alone.
    pub(super) protected: Option<ProtectedPorts>,
}

/// A pod that a command names.
fn of_command(cgroup: CgroupDir, netns: Netns, netns_path: Option<PathBuf>) -> Target {
    Target { cgroup, also: Vec::new(), netns, netns_path, origin: RecordOrigin::Command, confirm: None }
}

impl AttachRequest {
    pub(super) fn of(args: AttachArgs) -> Result<Self> {
        if args.machine {
            return Self::of_machine(args);
        }
        let [path] = args.cgroup_path.as_slice() else {
            return Err(Failed::Machine(MachineError::Several(args.cgroup_path.len())).into());
        };
        let cgroup = CgroupDir::open(path)?;
        let options = Checked::of(args.options, &PodFiles::of(&cgroup))?;
        let netns_path = args.netns.or_else(|| options.switches.network_namespace.clone());
        let netns = match &netns_path {
            Some(path) => Netns::open(path)?,
            None => Netns::of_cgroup(&cgroup)?,
        };
        Ok(Self {
            target: of_command(cgroup, netns, netns_path),
            config: options.config,
            switches: options.switches,
            bpffs: args.bpffs.bpffs,
            max_connections: args.load.max_connections,
            protected: None,
        })
    }

    fn of_machine(args: AttachArgs) -> Result<Self> {
        let target = machine::target(&args)?;
        let Checked { mut config, switches } = Checked::of(args.options, &EtcFiles::below("/"))?;
        machine::refuse_options(&config, &switches)?;
        let protected = ProtectedPorts::exclude(&mut config, &target.netns);
        Ok(Self {
            target,
            config,
            switches,
            bpffs: args.bpffs.bpffs,
            max_connections: args.load.max_connections,
            protected: Some(protected),
        })
    }
}

struct Checked {
    config: Config,
    switches: RunOptions,
}

impl Checked {
    /// Users, groups and resolvers are looked up in `names`: the pod's, if it has a process.
    fn of(options: RawOptions, names: &dyn NameSource) -> Result<Self> {
        let (config, switches, notes) = options.read_process_env().validate(names).map_err(Failed::Usage)?;
        for Note { origin, why } in notes {
            tracing::info!(option = %origin, "{why}");
        }
        Ok(Self { config, switches })
    }
}

pub(super) fn attach(args: AttachArgs) -> Result<()> {
    apply(AttachRequest::of(args)?)
}

/// Runs the command line of an init container, for the namespace of this process.
pub(super) fn istio_iptables(args: IstioArgs) -> Result<()> {
    let path = match args.cgroup_path {
        Some(path) => path,
        None => around_own_cgroup()?,
    };
    let cgroup = CgroupDir::open(&path)?;
    let options = Checked::of(args.options, &PodFiles::of(&cgroup))?;
    let netns_path = options.switches.network_namespace.clone();
    let netns = match &netns_path {
        Some(path) => Netns::open(path)?,
        None => Netns::own()?,
    };
    apply(AttachRequest {
        target: of_command(cgroup, netns, netns_path),
        config: options.config,
        switches: options.switches,
        bpffs: args.bpffs.bpffs,
        max_connections: args.load.max_connections,
        protected: None,
    })
}

/// Returns the pod's cgroup, the parent of this container's.
fn around_own_cgroup() -> Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let parent = Path::new(path).parent().filter(|parent| *parent != Path::new("/") && !path.contains(".."));
    let mount = crate::cgroup::mounts().into_iter().next();
    match (parent, mount) {
        (Some(parent), Some(mount)) => Ok(mount.join(parent.strip_prefix("/").unwrap_or(parent))),
        _ => bail!(
            "looking for the pod's cgroup around {path} of /proc/self/cgroup: it is not visible from this container; \
             name it with --cgroup-path or INTERCEPT_CGROUP_PATH (mount the host's cgroup2 hierarchy, or let the \
             node's agent attach the pod)"
        ),
    }
}

fn apply(request: AttachRequest) -> Result<()> {
    let AttachRequest { target, config, switches, bpffs, max_connections, protected } = request;
    if switches.dry_run {
        print_line!("{config}");
        print_line!("{}", serde_json::to_string_pretty(&config)?);
        return Ok(());
    }
    if switches.cleanup_only {
        let paths = [target.cgroup.path().to_owned()];
        return detach::detach_cgroups(&bpffs, &paths, detach::Absent::IsFine);
    }
    super::check::require_privileges()?;
    super::accelerate::admit(&bpffs, &config)?;
    if !switches.skip_rule_apply {
        let rewrite = if switches.force_apply { Rewrite::Always } else { Rewrite::IfChanged };
        machine::start_guard(&bpffs, target.confirm)?;
        let done = apply_capture(&bpffs, max_connections, (&target, &config), rewrite, None)?;
        print_line!(
            "{} {} in namespace {} (cookie {})",
            done.as_str(),
            machine::name_of(&target),
            target.netns.name(),
            target.netns.cookie()
        );
        if let Some(protected) = protected {
            print_line!("inbound: {}", protected.describe(&config));
        }
        if let Some(time) = target.confirm {
            print_line!(
                "run `intercept-agent confirm` within {} s, or everything is taken off again",
                time.as_secs()
            );
        }
    }
    if switches.run_validation {
        validate(&target, &config, &switches)?;
    }
    Ok(())
}

/// Reads the pod's routes and attaches it. A subscription to its namespace is given the expected state.
pub(super) fn apply_capture(
    bpffs: &Path,
    max_connections: u32,
    (target, config): (&Target, &Config),
    rewrite: Rewrite,
    mut changes: Option<&mut Subscription>,
) -> Result<Attached> {
    let mut observed =
        Observation::of(target, config, changes.as_deref_mut()).with_context(|| attaching(target))?;
    let node = open(bpffs, max_connections)?;
    let done = apply_observed(node, (target, config), &mut observed, rewrite)?;
    if let Some(changes) = changes {
        changes.expect(observed.into_routes());
    }
    Ok(done)
}

/// Attaches the pod again with the routes that it has now. If another command has replaced its options meanwhile, `config`
/// becomes those.
pub(super) fn apply_again(
    bpffs: &Path,
    max_connections: u32,
    target: &Target,
    config: &mut Config,
) -> Result<Attached> {
    loop {
        let mut observed = Observation::of(target, config, None).with_context(|| attaching(target))?;
        let node = open(bpffs, max_connections)?;
        match node.record_of(target.netns.cookie())? {
            Some(record) if record.config != *config => *config = record.config,
            _ => return apply_observed(node, (target, config), &mut observed, Rewrite::IfChanged),
        }
    }
}

fn attaching(target: &Target) -> String {
    format!("attaching cgroup {} in {}", target.cgroup.path().display(), target.netns.name())
}

fn open(bpffs: &Path, max_connections: u32) -> Result<Node> {
    Node::open(bpffs, max_connections).with_context(|| format!("opening the state in {}", bpffs.display()))
}

fn apply_observed(
    mut node: Node,
    (target, config): (&Target, &Config),
    observed: &mut Observation,
    rewrite: Rewrite,
) -> Result<Attached> {
    let done = node.attach(target, config, observed, rewrite).with_context(|| attaching(target));
    if done.is_err() && target.is_workload() {
        // A machine that is not captured has no programs.
        node.remove_if_unused()?;
    }
    done
}

/// Runs Istio's own check. The capture stays active if it fails.
pub(super) fn validate(target: &Target, config: &Config, switches: &RunOptions) -> Result<()> {
    let ids = IdMaps::of_pod(&target.netns, &target.cgroup)?;
    let outside = |map: &IdMap, ids: &[u32]| {
        ids.first()
            .and_then(|&id| map.outside(id))
            .context("the proxy's first id does not exist in the pod's user namespace")
    };
    let probe = Probe {
        proxy_port: config.proxy_port,
        inbound_port: config.inbound_port,
        probe_port: switches.probe_port,
        timeout: switches.probe_timeout,
        uid: outside(&ids.users, &config.proxy_uids)?,
        gid: outside(&ids.groups, &config.proxy_gids)?,
    };
    let Validated { v4, v6 } =
        validation::validate(&target.netns, &target.cgroup, &probe).map_err(Failed::Validation)?;
    let v6 =
        v6.map_or("the namespace has no IPv6 to check".to_owned(), |port| format!("IPv6 at port {port}"));
    print_line!("validated: IPv4 arrives at port {v4}, {v6}");
    Ok(())
}
