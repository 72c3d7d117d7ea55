//! The node's programs and maps, and the pods they are attached to.
//!
//! One write to POLICIES activates a policy. An attach first makes a plan ([`plan`]); then it adds, makes that one write, and
//! removes ([`apply`]). What it adds affects no connection, so an agent that crashes leaves the old policy active. What it
//! did not get to remove, the next call removes.

mod accelerate;
mod apply;
mod error;
mod links;
mod observe;
mod paused;
mod plan;
mod register;

use std::{
    cell::OnceCell,
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use aya::programs::ProgramInfo;
use aya_log::EbpfLogger;
use intercept_common::{layout::PodPolicy, names};

use crate::{
    cgroup::CgroupDir,
    compile::{compile, outside},
    maps::Maps,
    netns::Netns,
    netns_setup,
    options::Config,
    programs::{self, Lookup, ProgramError},
    store::{Lock, Origin, Record, Store},
    sys,
};

use self::plan::{AttachPlan, PlanInput, plan};

pub use error::NodeError;
pub use observe::Observation;
pub use paused::Paused;
pub use plan::{LivingPod, Rewrite};

/// What a pod is made of.
pub struct Target {
    /// Its cgroup.
    pub cgroup: CgroupDir,
    /// Its network namespace.
    pub netns: Netns,
    /// A path that leads to the namespace, if one was given.
    pub netns_path: Option<PathBuf>,
    /// Who asks.
    pub origin: Origin,
}

/// What `attach` did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attached {
    /// The same was in force.
    Unchanged,
    /// The pod was not attached before.
    New,
    /// Another policy was in force.
    Replaced,
}

impl Attached {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unchanged => "unchanged",
            Self::New => "attached",
            Self::Replaced => "replaced",
        }
    }
}

/// The attached pods.
#[derive(Debug, Default)]
pub struct PodRecords {
    /// Each with its policy, the oldest first.
    pub readable: Vec<(Record, PodPolicy)>,
    /// Those whose record cannot be read.
    pub broken: Vec<BrokenPod>,
}

/// A pod whose record cannot be read: written by another version, or damaged. It stays captured as it is; it can be
/// detached, and attached again.
#[derive(Debug)]
pub struct BrokenPod {
    /// Cookie of its namespace.
    pub cookie: u64,
    /// Its policy.
    pub policy: PodPolicy,
    /// What is wrong.
    pub error: NodeError,
}

/// The node's store and maps, with the store locked.
pub struct Node {
    store: Store,
    maps: Maps,
    lookup: OnceCell<Lookup>,
    living: Option<Living>,
    _lock: Lock,
}

/// The pods that are there, by netns cookie.
pub type Living = BTreeMap<u64, LivingPod>;

impl Node {
    /// Lock the store; load the programs if this build's are not there, and put them under the links of all pods.
    /// `max_connections` is the size of ORIG_DST if it is made now.
    pub fn open(bpffs: &Path, max_connections: u32) -> Result<Self, NodeError> {
        let store = Store::open(bpffs)?;
        let lock = store.lock()?;
        if let Some(other) = store.other_layout()? {
            return Err(NodeError::OtherLayout(other.display().to_string()));
        }
        let load = !store.programs().join(names::CONNECT6).exists() || store.missing_map().is_some();
        if load {
            store.remove_other_layouts()?;
            // What an agent left that died on the way is in the way.
            store.remove(&store.programs())?;
            store.create(&store.maps())?;
            store.create(&store.programs())?;
            if let Err(error) = programs::load_shared(&store.maps(), &store.programs(), max_connections) {
                // Of a node without pods and other agents nothing is left.
                store.remove(&store.programs())?;
                if store.pods()?.is_empty() && !store.is_kept() {
                    store.remove_all()?;
                }
                return Err(error.into());
            }
            sys::give_back_memory();
        }
        let maps = Maps::open(&store.maps())?;
        let mut node = Self { maps, lookup: OnceCell::new(), living: None, store, _lock: lock };
        let others = node.store.other_programs()?;
        if load || !others.is_empty() {
            node.take_over(&others)?;
        }
        Ok(node)
    }

    /// Put this build's programs under the links of all pods, and remove those of other builds.
    fn take_over(&mut self, others: &[PathBuf]) -> Result<(), NodeError> {
        // The links of pods that are gone take no other program.
        self.sweep()?;
        let mut failed = false;
        for cookie in self.store.pods()? {
            if let Err(error) = self.replace_programs(cookie) {
                failed = true;
                tracing::error!(
                    cookie,
                    error = &error as &dyn std::error::Error,
                    "this pod keeps the programs that it has"
                );
            }
        }
        // Kept where one failed, so that the next agent tries it again.
        for other in others.iter().filter(|_| !failed) {
            self.store.remove(other)?;
        }
        Ok(())
    }

    /// The store and maps if there are any: for those who only look, and for those who take away.
    pub fn find(bpffs: &Path) -> Result<Option<Self>, NodeError> {
        let Some(store) = Store::find(bpffs) else { return Ok(None) };
        let lock = store.lock()?;
        // Another agent may have taken it away while we waited, or have died before all of it was there.
        if let Some(map) = store.missing_map() {
            return if store.pods()?.is_empty() { Ok(None) } else { Err(NodeError::Incomplete(map)) };
        }
        let maps = Maps::open(&store.maps())?;
        Ok(Some(Self { maps, lookup: OnceCell::new(), living: None, store, _lock: lock }))
    }

    /// What reads the log lines of this build's programs.
    pub fn log_reader(&self) -> Result<EbpfLogger<&'static dyn log::Log>, NodeError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| NodeError::Logs { source };
        let program = ProgramInfo::from_pin(self.store.programs().join(names::SOCK_OPS))
            .map_err(|e| failed(e.into()))?;
        EbpfLogger::init_from_id(program.id()).map_err(|e| failed(e.into()))
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The maps.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// The attached pods.
    pub fn pods(&self) -> Result<PodRecords, NodeError> {
        let mut pods = PodRecords::default();
        for (cookie, policy) in self.maps.policies()? {
            match self.store.read_record(cookie, policy.id) {
                Ok(Some(record)) => pods.readable.push((record, policy)),
                Ok(None) => {
                    pods.broken.push(BrokenPod { cookie, policy, error: NodeError::NoRecord(cookie) })
                }
                Err(error) => pods.broken.push(BrokenPod { cookie, policy, error: error.into() }),
            }
        }
        pods.readable.sort_by_key(|(record, _)| record.since);
        pods.broken.sort_by_key(|pod| pod.cookie);
        Ok(pods)
    }

    /// The pod that is attached to this cgroup, by the cookie of its namespace. The links tell; its record is not read.
    pub fn pod_of_cgroup(&self, cgroup_id: u64) -> Result<Option<(u64, PodPolicy)>, NodeError> {
        for (cookie, policy) in self.maps.policies()? {
            if self.cgroup_of(cookie)? == Some(cgroup_id) {
                return Ok(Some((cookie, policy)));
            }
        }
        Ok(None)
    }

    /// The record of a namespace's active policy, if it can be read.
    pub fn record_of(&self, cookie: u64) -> Result<Option<Record>, NodeError> {
        let Some(policy) = self.maps.policy(cookie)? else { return Ok(None) };
        match self.store.read_record(cookie, policy.id) {
            Err(error) if error.may_pass() => Err(error.into()),
            read => Ok(read.ok().flatten()),
        }
    }

    /// Attach a pod, or replace its policy. `config` has the ids as the pod sees them. `observed` was taken shortly before;
    /// after the call it has the routes as the attach changes them.
    pub fn attach(
        &mut self,
        target: &Target,
        config: &Config,
        observed: &mut Observation,
        rewrite: Rewrite,
    ) -> Result<Attached, NodeError> {
        self.refuse_unsupported(config)?;
        let leftovers = self.has_leftovers(target.netns.cookie())?;
        let living = self.living()?;
        // Half of the steps are taken inside the namespace, which is entered once.
        target.netns.run(|| {
            let record = self.settle(target)?;
            if leftovers {
                // What was observed has been undone since.
                *observed = Observation::of(target, config, None)?;
            }
            self.put_in_force(target, config, observed, rewrite, (record, &living))
        })?
    }

    /// Whether a pod has something besides its active policy: an agent crashed, or could not finish.
    fn has_leftovers(&self, cookie: u64) -> Result<bool, NodeError> {
        let active = self.maps.policy(cookie)?.map(|policy| policy.id);
        Ok(self.store.policies_of(cookie)?.into_iter().any(|id| Some(id) != active))
    }

    fn put_in_force(
        &mut self,
        target: &Target,
        config: &Config,
        observed: &mut Observation,
        rewrite: Rewrite,
        (record, living): (Option<Record>, &Living),
    ) -> Result<Attached, NodeError> {
        let policies = self.maps.policies()?;
        let made = record.as_ref().map(|record| record.netns_setup.clone()).unwrap_or_default();
        let interfaces = observed.snapshot.interface_names();
        let namespace = netns_setup::plan(config, &interfaces, &observed.found, &made);
        let expected = namespace.expected(observed.snapshot.clone());
        let (outside_config, unmapped) = outside(config, &observed.ids);
        if !unmapped.is_empty() {
            let cgroup = target.cgroup.path().display();
            tracing::warn!(%cgroup, ids = ?unmapped, "ids that the pod's user namespace does not map match nobody");
        }
        let input = PlanInput {
            target,
            config,
            policies: &policies,
            record: record.as_ref(),
            living,
            lineage: &target.cgroup.lineage()?,
            links_intact: self.links_intact(target.netns.cookie(), target)?,
            namespace,
            max_connections: self.maps.max_connections_per_pod(),
            compiled: compile(&outside_config, &expected),
            now: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
        };
        let done = match plan(input, rewrite, random)? {
            AttachPlan::Unchanged(policy) => {
                // A proxy may have started to listen while another capture held its socket.
                self.register_unknown(target, config, &policy)?;
                self.accelerate(target, config, &policy);
                Attached::Unchanged
            }
            AttachPlan::PolicyChange(plan) => self.apply(target, &plan)?,
        };
        observed.snapshot = expected;
        Ok(done)
    }

    /// The record of the pod's active policy, if it can be read. Removes what an agent that crashed left beside it.
    fn settle(&mut self, target: &Target) -> Result<Option<Record>, NodeError> {
        let cookie = target.netns.cookie();
        let Some(policy) = self.maps.policy(cookie)? else {
            if self.store.pods()?.binary_search(&cookie).is_ok() {
                self.take_out(cookie, Some(&target.netns))?;
            }
            return Ok(None);
        };
        self.remove_leftovers(cookie, policy.id, &target.netns)?;
        match self.store.read_record(cookie, policy.id) {
            Err(error) if !error.may_pass() => {
                tracing::warn!(error = &error as &dyn std::error::Error, "replacing the pod's record");
                Ok(None)
            }
            read => Ok(read?),
        }
    }

    /// Take a pod out of force and leave nothing of it. `netns` is its namespace, if it still can be reached.
    pub fn detach(&mut self, cookie: u64, netns: Option<&Netns>) -> Result<(), NodeError> {
        match netns {
            Some(netns) => self.take_out(cookie, Some(netns)),
            None => self.take_out_unreached(cookie),
        }
    }

    /// Remove programs and maps if no pod uses them and no daemon keeps them.
    pub fn remove_if_unused(self) -> Result<(), NodeError> {
        if self.store.pods()?.is_empty() && !self.store.is_kept() {
            self.switch_joining_off();
            self.store.remove_all()?;
        }
        Ok(())
    }

    /// Remove programs, maps and all pods that are left.
    pub fn remove_everything(self) -> Result<(), NodeError> {
        self.switch_joining_off();
        Ok(self.store.remove_all()?)
    }

    /// Take away what dead pods and dead agents left: folders without a policy in force, pods whose cgroup or
    /// namespace is gone. Says which pods live, by cookie and cgroup.
    pub fn sweep(&mut self) -> Result<Living, NodeError> {
        let in_force = self.maps.policies()?;
        let mut living = Living::new();
        for cookie in self.store.pods()? {
            let policy = in_force.iter().find(|(netns, _)| *netns == cookie).map(|(_, policy)| policy);
            let pod = match policy {
                Some(policy) => self.living_pod(cookie, policy)?,
                None => None,
            };
            match pod {
                Some(pod) => _ = living.insert(cookie, pod),
                None => self.take_out_unreached(cookie)?,
            }
        }
        self.living = Some(living.clone());
        Ok(living)
    }

    /// The pods that are there. Who stays sweeps now and then, and looks in between only at pods that others added: a pod
    /// that died since is in nobody's way, because nothing else ever has its cookie or the id of its cgroup.
    fn living(&mut self) -> Result<Living, NodeError> {
        let Some(mut living) = self.living.take() else { return self.sweep() };
        let listed = self.store.pods()?;
        living.retain(|cookie, _| listed.binary_search(cookie).is_ok());
        for cookie in listed {
            if !living.contains_key(&cookie)
                && let Some(policy) = self.maps.policy(cookie)?
                && let Some(pod) = self.living_pod(cookie, &policy)?
            {
                living.insert(cookie, pod);
            }
        }
        self.living = Some(living.clone());
        Ok(living)
    }

    /// A pod, if it is there.
    fn living_pod(&self, cookie: u64, policy: &PodPolicy) -> Result<Option<LivingPod>, NodeError> {
        let Some((cgroup, netns_inode)) = self.place_of(cookie)? else { return Ok(None) };
        let record = self.store.read_record(cookie, policy.id).ok().flatten();
        let cgroup_path = record.map(|record| record.cgroup);
        let opened = cgroup_path.as_ref().and_then(|path| CgroupDir::open(path).ok());
        let lineage = opened.filter(|dir| dir.id() == cgroup).and_then(|dir| dir.lineage().ok());
        Ok(Some(LivingPod { cgroup, cgroup_path, lineage: lineage.unwrap_or_default(), netns_inode }))
    }

    /// Take out a pod whose namespace the caller does not have. If it still exists and the agent changed something in it,
    /// the record leads to it.
    fn take_out_unreached(&mut self, cookie: u64) -> Result<(), NodeError> {
        let mut netns = None;
        if self.may_have_netns(cookie)? {
            for (_, record) in self.store.records(cookie)? {
                match record {
                    Ok(record) if netns.is_none() && !record.netns_setup.is_empty() => netns = record.netns(),
                    Err(error) if error.may_pass() => return Err(error.into()),
                    _ => {}
                }
            }
        }
        self.take_out(cookie, netns.as_ref())
    }

    /// What all instances of the `sk_lookup` program are made of.
    fn lookup(&self) -> Result<&Lookup, ProgramError> {
        if let Some(lookup) = self.lookup.get() {
            return Ok(lookup);
        }
        let lookup = Lookup::prepare(&self.store.maps())?;
        Ok(self.lookup.get_or_init(|| lookup))
    }

    /// Register listeners of an attached pod that the programs did not: those of ports for which none is registered.
    /// Another capture may have had them, or the options name another port now.
    fn register_unknown(
        &mut self,
        target: &Target,
        config: &Config,
        policy: &PodPolicy,
    ) -> Result<(), NodeError> {
        let cookie = target.netns.cookie();
        let known: BTreeSet<(u16, u8)> =
            self.maps.listeners(cookie)?.iter().map(|key| (key.port, key.family)).collect();
        self.register_listeners_but(target, config, policy, |listener| {
            known.contains(&(listener.port, listener.family))
        })
    }
}

/// Hashing a constant with fresh keys is all the chance that is needed.
fn random() -> u32 {
    use std::hash::{BuildHasher as _, RandomState};
    (RandomState::new().hash_one(0) & 0xffff_ffff) as u32
}
