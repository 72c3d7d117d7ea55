//! The node's programs and maps, and the pods they are attached to.
//!
//! A pod is put in force by one write to PODS. Everything before it (folder, record, lists, links, listeners) has no
//! effect on any connection, so that an agent that dies on the way leaves the old state in force; everything after it
//! is tidying that the next call makes up for.

mod accelerate;
mod error;
mod hold;
mod links;
mod paused;

use std::{
    cell::OnceCell,
    collections::{BTreeMap, BTreeSet},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use aya::programs::ProgramInfo;
use aya_log::EbpfLogger;
use intercept_common::{layout, layout::PodPolicy, names};

use crate::{
    cgroup::CgroupDir,
    compile::{Compiled, compile, outside},
    kernel,
    mirror::{Follower, Mirror},
    netns::Netns,
    options::Config,
    plumbing,
    programs::{self, Lookup, ProgramError},
    store::{Lock, Origin, Record, Store},
    tables::Tables,
    userns::IdMaps,
};

pub use error::NodeError;
pub use paused::Paused;

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
    pub fn word(self) -> &'static str {
        match self {
            Self::Unchanged => "unchanged",
            Self::New => "attached",
            Self::Replaced => "replaced",
        }
    }
}

/// The node's store and maps, with the store locked.
pub struct Node {
    store: Store,
    tables: Tables,
    lookup: OnceCell<Lookup>,
    living: Option<Living>,
    _lock: Lock,
}

/// Cgroup ids by cookie of the pods that are there.
type Living = BTreeMap<u64, u64>;

impl Node {
    /// Lock the store; load the programs if this build's are not there, and put them under the links of all pods.
    /// `max_connections` is the size of ORIG_DST if it is made now.
    pub fn open(bpffs: &Path, max_connections: u32) -> Result<Self, NodeError> {
        let store = Store::open(bpffs)?;
        let lock = store.lock()?;
        if let Some(other) = store.other_layout()? {
            return Err(NodeError::OtherLayout(other.display().to_string()));
        }
        if !store.programs().join(names::CONNECT6).exists() {
            store.remove_other_layouts()?;
            // What an agent left that died on the way is in the way.
            store.remove(&store.programs())?;
            store.create(&store.maps())?;
            store.create(&store.programs())?;
            programs::load_shared(&store.maps(), &store.programs(), max_connections)?;
            kernel::give_back_memory();
        }
        let tables = Tables::open(&store.maps())?;
        let mut node = Self { tables, lookup: OnceCell::new(), living: None, store, _lock: lock };
        let others = node.store.other_programs()?;
        if !others.is_empty() {
            // The links of pods that are gone take no other program.
            node.sweep()?;
            for cookie in node.store.pods()? {
                node.replace_programs(cookie)?;
            }
            for other in others {
                node.store.remove(&other)?;
            }
        }
        Ok(node)
    }

    /// The store and maps if there are any: for those who only look, and for those who take away.
    pub fn find(bpffs: &Path) -> Result<Option<Self>, NodeError> {
        let Some(store) = Store::find(bpffs) else { return Ok(None) };
        let lock = store.lock()?;
        // Another agent may have taken it away while we waited.
        if !store.maps().is_dir() {
            return Ok(None);
        }
        let tables = Tables::open(&store.maps())?;
        Ok(Some(Self { tables, lookup: OnceCell::new(), living: None, store, _lock: lock }))
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
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The records in force, each with its policy.
    pub fn pods(&self) -> Result<Vec<(Record, PodPolicy)>, NodeError> {
        let mut pods = Vec::new();
        for (cookie, policy) in self.tables.policies()? {
            if let Some(record) = self.store.read_record(cookie, policy.id)? {
                pods.push((record, policy));
            }
        }
        pods.sort_by_key(|(record, _)| record.since);
        Ok(pods)
    }

    /// The pod that is attached to this cgroup.
    pub fn pod_of_cgroup(&self, cgroup_id: u64) -> Result<Option<(Record, PodPolicy)>, NodeError> {
        Ok(self.pods()?.into_iter().find(|(record, _)| record.cgroup_id == cgroup_id))
    }

    /// Put a policy in force for a pod. `config` has the ids as the pod sees them.
    pub fn attach(&mut self, target: &Target, config: &Config) -> Result<Attached, NodeError> {
        self.attach_followed(target, config, None)
    }

    /// The same, also if it is in force already: every entry is written anew.
    pub fn attach_anew(&mut self, target: &Target, config: &Config) -> Result<Attached, NodeError> {
        self.enter_and_put_in_force(target, config, true, None)
    }

    /// The same for a namespace that is followed from the state that is put in force, if by anybody.
    pub fn attach_followed(
        &mut self,
        target: &Target,
        config: &Config,
        follower: Option<&mut Follower>,
    ) -> Result<Attached, NodeError> {
        self.enter_and_put_in_force(target, config, false, follower)
    }

    /// Half of the steps are taken inside the namespace, which is entered once.
    fn enter_and_put_in_force(
        &mut self,
        target: &Target,
        config: &Config,
        anew: bool,
        follower: Option<&mut Follower>,
    ) -> Result<Attached, NodeError> {
        target.netns.run(|| self.put_in_force(target, config, anew, follower))?
    }

    fn put_in_force(
        &mut self,
        target: &Target,
        config: &Config,
        anew: bool,
        follower: Option<&mut Follower>,
    ) -> Result<Attached, NodeError> {
        let cookie = target.netns.cookie();
        let living = self.living()?;
        self.refuse_conflicts(target, &living)?;
        let netns = || target.netns.name().to_owned();
        let before = self.tables.policy(cookie)?;
        let old = match &before {
            Some(policy) => self.store.read_record(cookie, policy.id)?,
            None => None,
        };

        let was = old.as_ref().map(|record| record.plumbing.clone()).unwrap_or_default();
        let plumbing = plumbing::apply(&target.netns, config, &was)
            .map_err(|source| NodeError::Plumbing { netns: netns(), source })?;
        let compiled = self.compile(target, config, follower)?;
        let digest = compiled.digest();
        if !anew
            && let (Some(policy), Some(record)) = (&before, &old)
            && record.config == *config
            && record.digest == digest
            && record.origin == target.origin
            && self.links_intact(cookie, target)
        {
            // A proxy may have started to listen while another capture held its socket.
            self.register_unknown(target, config, policy)?;
            self.accelerate(target, config, policy);
            return Ok(Attached::Unchanged);
        }

        let (slot, id) = self.free(before.as_ref())?;
        let record = Record {
            cookie,
            policy: id,
            slot,
            cgroup: target.cgroup.path().to_owned(),
            cgroup_id: target.cgroup.id(),
            netns_inode: target.netns.inode(),
            netns_path: target.netns_path.clone(),
            config: config.clone(),
            digest,
            plumbing: plumbing.clone(),
            origin: target.origin.clone(),
            since: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
        };
        self.lookup()?;
        let start = Instant::now();
        let installed = self.install(target, &record, &compiled, before.is_none());
        tracing::debug!(seconds = start.elapsed().as_secs_f64(), cookie, "wrote maps and made links");
        if let Err(error) = installed {
            // Best effort: what is left has no effect and is swept by the next call.
            if before.is_none() {
                let _swept_later = self.take_out(cookie);
                plumbing::remove(&target.netns, &plumbing);
            }
            return Err(error);
        }
        // In force from here on: a failure below is not one of the attach.
        self.accelerate(target, config, &PodPolicy { id, slot, ..compiled.policy });
        if let Err(error) = self.tidy_after(cookie, id, before.map(|policy| policy.id)) {
            tracing::warn!(error = &error as &dyn std::error::Error, "tidying after attach");
        }
        Ok(if before.is_some() { Attached::Replaced } else { Attached::New })
    }

    /// Take a pod out of force and leave nothing of it. `netns` is its namespace, if it still can be reached.
    pub fn detach(&mut self, cookie: u64, netns: Option<&Netns>) -> Result<(), NodeError> {
        let record = match self.tables.policy(cookie)? {
            Some(policy) => self.store.read_record(cookie, policy.id)?,
            None => None,
        };
        self.take_out(cookie)?;
        if let (Some(record), Some(netns)) = (record, netns) {
            plumbing::remove(netns, &record.plumbing);
        }
        Ok(())
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
        let in_force = self.tables.policies()?;
        let mut living = Living::new();
        for cookie in self.store.pods()? {
            let cgroup =
                self.cgroup_of(cookie).filter(|_| in_force.iter().any(|(netns, _)| *netns == cookie));
            match cgroup {
                Some(cgroup) => _ = living.insert(cookie, cgroup),
                None => self.take_out(cookie)?,
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
                && let Some(cgroup) = self.cgroup_of(cookie)
            {
                living.insert(cookie, cgroup);
            }
        }
        self.living = Some(living.clone());
        Ok(living)
    }

    fn take_out(&mut self, cookie: u64) -> Result<(), NodeError> {
        if let Some(policy) = self.tables.policy(cookie)?
            && let Err(error) = self.stop_accelerating(cookie, policy.slot)
        {
            tracing::warn!(
                cookie,
                error = &error as &dyn std::error::Error,
                "joined connections stay joined"
            );
        }
        self.tables.switch_off(cookie)?;
        for program in names::CGROUP_PROGRAMS.iter().chain([&names::SK_LOOKUP]) {
            // So that nothing is attached any more when this returns. Whoever fails here leaves it to the removal.
            let link = kernel::open_pin(&self.store.pod(cookie).join(program));
            let _goes_with_its_pin = link.and_then(|link| kernel::link_detach(link.as_fd()));
        }
        self.store.remove(&self.store.pod(cookie))?;
        let in_force: Vec<_> = self.tables.policies()?;
        self.tables.purge_lists(|id| in_force.iter().any(|(_, policy)| policy.id == id))?;
        self.tables.purge_connections(|netns| netns != cookie)?;
        Ok(())
    }

    /// What all instances of the `sk_lookup` program are made of.
    fn lookup(&self) -> Result<&Lookup, ProgramError> {
        if let Some(lookup) = self.lookup.get() {
            return Ok(lookup);
        }
        let lookup = Lookup::prepare(&self.store.maps())?;
        Ok(self.lookup.get_or_init(|| lookup))
    }

    fn compile(
        &self,
        target: &Target,
        config: &Config,
        follower: Option<&mut Follower>,
    ) -> Result<Compiled, NodeError> {
        let mirror = match follower {
            Some(follower) => follower.look().cloned(),
            None => Mirror::snapshot(&target.netns),
        };
        let mirror =
            mirror.map_err(|source| NodeError::Mirror { netns: target.netns.name().to_owned(), source })?;
        let cgroup = || target.cgroup.path().display().to_string();
        let ids = IdMaps::of_cgroup(&target.cgroup)
            .map_err(|source| NodeError::UserNs { cgroup: cgroup(), source })?;
        let (config, nobody) = outside(config, &ids);
        if !nobody.is_empty() {
            tracing::warn!(cgroup = cgroup(), ids = ?nobody, "ids that the pod's user namespace does not map match nobody");
        }
        Ok(compile(&config, &mirror))
    }

    /// A namespace has one capture and a cgroup one namespace: programs that are attached twice would run twice.
    fn refuse_conflicts(&self, target: &Target, living: &Living) -> Result<(), NodeError> {
        let own = target.netns.cookie();
        for (&cookie, &cgroup) in living {
            if (cookie == own) == (cgroup == target.cgroup.id()) {
                continue;
            }
            let Some(policy) = self.tables.policy(cookie)? else { continue };
            let Some(record) = self.store.read_record(cookie, policy.id)? else { continue };
            let cgroup = record.cgroup.display().to_string();
            return Err(if cookie == own {
                NodeError::NetnsTaken { netns: target.netns.name().to_owned(), cgroup }
            } else {
                NodeError::CgroupTaken { cgroup, inode: record.netns_inode }
            });
        }
        Ok(())
    }

    fn install(
        &mut self,
        target: &Target,
        record: &Record,
        compiled: &Compiled,
        new: bool,
    ) -> Result<(), NodeError> {
        self.store.create(&self.store.pod(record.cookie))?;
        self.store.write_record(record)?;
        self.tables.write(record.policy, &compiled.entries)?;
        self.link(target)?;
        if new {
            self.tables.reset_counters(record.slot)?;
            self.tables.reset_proxy(record.slot);
        }
        let policy = PodPolicy {
            id: record.policy,
            slot: record.slot,
            max_connections: self.tables.max_connections_per_pod(),
            ..compiled.policy
        };
        if !new {
            self.tables.switch_on(record.cookie, &policy)?;
            return self.register_unknown(target, &record.config, &policy);
        }
        let mut registered = BTreeSet::new();
        self.register_listeners(target, &record.config, &policy, &mut registered)?;
        self.tables.switch_on(record.cookie, &policy)?;
        // A listener that came up since the look above was not seen by the callback, which knew no policy yet.
        self.register_listeners(target, &record.config, &policy, &mut registered)
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
            self.tables.listeners(cookie).iter().map(|key| (key.port, key.family)).collect();
        self.register_listeners_but(target, config, policy, |listener| {
            known.contains(&(listener.port, listener.family))
        })
    }

    fn tidy_after(&mut self, cookie: u64, id: u32, old: Option<u32>) -> Result<(), NodeError> {
        self.store.drop_other_records(cookie, id)?;
        if let Some(old) = old {
            self.tables.purge_lists(|id| id != old)?;
        }
        Ok(())
    }

    /// The slot of the policy that is replaced, or a free one; and an id that is not in force. That is drawn at random,
    /// so that it does not meet entries that an agent wrote for a policy that it did not live to put in force.
    fn free(&self, before: Option<&PodPolicy>) -> Result<(u32, u32), NodeError> {
        use std::hash::{BuildHasher as _, RandomState};
        let used: Vec<(u32, u32)> = self.tables.policies()?.iter().map(|(_, p)| (p.slot, p.id)).collect();
        let is_free = |slot: &u32| used.iter().all(|(used, _)| used != slot);
        let slot = match before {
            Some(policy) => policy.slot,
            None => (0..layout::MAX_PODS).find(is_free).ok_or(NodeError::TooManyPods(used.len()))?,
        };
        let draw = || (RandomState::new().hash_one(used.len()) & 0xffff_ffff) as u32;
        let is_new = |id: &u32| *id != 0 && used.iter().all(|(_, used)| used != id);
        Ok((slot, std::iter::repeat_with(draw).find(is_new).unwrap_or(1)))
    }
}
