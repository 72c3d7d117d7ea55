//! Attaches a pod: removes what a crashed agent left, makes a plan, and carries it out: add, switch, remove.
//!
//! What is added affects no connection before the switch, and what the active policy needs is removed only after
//! another has replaced it. The record is written first and removed last, and lists every change of the namespace, so
//! the same functions clean up after a failure, a crash and a detach.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use super::{
    Living, LivingPod, Node, NodeError, Observation, Rewrite, Target,
    collect::changing,
    links::LinksBefore,
    plan::{AttachPlan, PlanInput, PolicyChange, plan},
    shadow::is_shadow,
};
use crate::{
    compile::{compile, outside},
    ids::NetnsCookie,
    netns_setup::{self, NetnsChanges},
    options::Config,
    record::Record,
    routes::RouteSocket,
};

/// More descriptors than an attach opens, or undoing one. They are asked for before anything is changed, because an attach that
/// runs out of them could not be undone.
const DESCRIPTORS: u8 = 48;

/// What `attach` did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attached {
    /// The same policy was already active.
    Unchanged,
    /// The pod was not attached before.
    New,
    /// The policy replaced another one.
    Replaced,
}

impl Attached {
    /// The word in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unchanged => "unchanged",
            Self::New => "attached",
            Self::Replaced => "replaced",
        }
    }
}

impl Node {
    /// Attaches a pod, or replaces its policy. `config` has the ids as the pod sees them. `observed` was taken
    /// shortly before; after the call it has the routes as the attach changes them.
    pub fn attach(
        &mut self,
        target: &Target,
        config: &Config,
        observed: &mut Observation,
        rewrite: Rewrite,
    ) -> Result<Attached, NodeError> {
        self.lock
            .require_descriptors(DESCRIPTORS)
            .map_err(|source| NodeError::Descriptors { count: DESCRIPTORS, source })?;
        self.refuse_unsupported(config)?;
        if config.shadow {
            self.refuse_uncaptured(target.netns.cookie())?;
        }
        let has_cleanup = self.has_cleanup(target.netns.cookie())?;
        let living = self.living()?;
        // Half of the steps run inside the namespace, which is entered once.
        let done = target.netns.run(|| {
            let record = self.settle(target)?;
            if has_cleanup {
                // The cleanup has changed what was observed.
                *observed = Observation::of(target, config, None)?;
            }
            self.plan_and_apply(target, config, observed, rewrite, (record, &*living))
        })??;
        drop(living);
        if let Some(living) = &mut self.living
            && done != Attached::Unchanged
            && let Ok(pod) = LivingPod::of(target)
        {
            // The next attach need not read it.
            Arc::make_mut(living).insert(target.netns.cookie(), pod);
        }
        Ok(done)
    }

    /// Whether a pod has state that is removed before it is attached: state besides its active policy, because an agent
    /// crashed or could not finish, or all of its state, because its cgroup has been removed and made again.
    fn has_cleanup(&self, cookie: NetnsCookie) -> Result<bool, NodeError> {
        let active = self.maps.policy(cookie)?.map(|policy| policy.id);
        let records = self.store.policies_of(cookie)?;
        let is_gone = !records.is_empty() && self.place_of(cookie)?.is_none();
        Ok(is_gone || records.into_iter().any(|id| Some(id) != active))
    }

    fn plan_and_apply(
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
        let shared = self.changes_of_others(target.netns.cookie())?;
        let namespace = netns_setup::plan(config, &interfaces, &observed.found, &made, &shared);
        let expected = namespace.expected(observed.snapshot.clone());
        let (outside_config, unmapped) = outside(config, &observed.ids);
        let mut compiled = compile(&outside_config, &expected);
        observed.containers.write(&mut compiled.policy);
        compiled.policy.flags |= target.flags();
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
            links_intact: self.links_intact(target.netns.cookie(), target, config)?,
            namespace,
            max_connections: self.maps.max_connections_per_pod()?,
            compiled,
            now: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
        };
        let done = match plan(input, rewrite, random)? {
            AttachPlan::Unchanged(policy) => {
                // A proxy may have started to listen while another capture had its socket.
                if !config.shadow {
                    self.register_unknown(target, config, &policy)?;
                    self.register_applications(target, &policy)?;
                }
                self.accelerate(target, config, &policy);
                Attached::Unchanged
            }
            AttachPlan::PolicyChange(plan) => {
                self.begin_shadow(target.netns.cookie(), config, record.as_ref())?;
                self.apply(target, &plan, &observed.socket)?
            }
        };
        observed.snapshot = expected;
        Ok(done)
    }

    /// The record of the pod's active policy, if it can be read. Removes what an agent that crashed left beside it.
    fn settle(&mut self, target: &Target) -> Result<Option<Record>, NodeError> {
        let cookie = target.netns.cookie();
        let Some(policy) = self.maps.policy(cookie)? else {
            if self.store.pod(cookie).exists() {
                self.remove_pod(cookie, Some(&target.netns))?;
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

    /// Carries out a plan. A failure leaves the state as it was before.
    fn apply(
        &mut self,
        target: &Target,
        plan: &PolicyChange,
        socket: &RouteSocket,
    ) -> Result<Attached, NodeError> {
        let cookie = plan.record.cookie;
        let (mut made, mut registered) = (NetnsChanges::default(), BTreeSet::new());
        let switched = self
            .add(target, plan, socket, (&mut made, &mut registered))
            .and_then(|()| Ok(self.maps.activate(cookie, &target.expiring(plan.policy))?));
        if let Err(error) = switched {
            self.undo(target, plan, &made);
            return Err(error);
        }
        // Active from here on: a failure below does not fail the attach, and the next call repeats what is left.
        let (config, policy) = (&plan.record.config, &plan.policy);
        let registered = match plan.before {
            _ if config.shadow => Ok(()),
            // The callback, which had no policy yet, missed listeners that opened since the first search.
            None => self.register_listeners(target, config, policy, &mut registered),
            Some(_) => self.register_unknown(target, config, policy),
        };
        let registered = registered.and_then(|()| self.register_applications(target, policy));
        self.accelerate(target, config, policy);
        let ended = if config.shadow { Ok(()) } else { self.end_shadow(cookie) };
        let removed = match plan.before {
            // Nothing is left of an earlier policy: `settle` has seen to that.
            None => Ok(()),
            Some(_) => self.remove_leftovers(cookie, plan.policy.id, &target.netns),
        };
        let removed = removed.and_then(|()| self.remove_other_links(target));
        for error in [registered, ended, removed].into_iter().filter_map(Result::err) {
            tracing::warn!(
                cookie = cookie.0,
                error = &error as &dyn std::error::Error,
                "finishing an attach"
            );
        }
        Ok(if plan.before.is_some() { Attached::Replaced } else { Attached::New })
    }

    /// Everything before the switch. `made` is what was added to the namespace, also after a failure.
    fn add(
        &mut self,
        target: &Target,
        plan: &PolicyChange,
        socket: &RouteSocket,
        (made, registered): (&mut NetnsChanges, &mut BTreeSet<u64>),
    ) -> Result<(), NodeError> {
        let record = &plan.record;
        let start = Instant::now();
        self.store.create(&self.store.pod(record.cookie))?;
        self.store.write_record(record)?;
        netns_setup::add_addresses(&target.netns, socket, &plan.additions, made)
            .map_err(changing(&target.netns))?;
        let links = if plan.before.is_none() { LinksBefore::None } else { LinksBefore::Possible };
        self.link(target, &record.config, links)?;
        if plan.before.is_none() {
            self.maps.reset_slot(plan.policy.slot)?;
        }
        self.maps.write(plan.policy.id, &plan.entries)?;
        tracing::debug!(
            seconds = start.elapsed().as_secs_f64(),
            cookie = record.cookie.0,
            "wrote maps and made links"
        );
        netns_setup::add_others(&target.netns, socket, &plan.additions, made)
            .map_err(changing(&target.netns))?;
        if *made != plan.additions.changes {
            // Made by another process since the plan: not ours to remove.
            let netns_setup = record.netns_setup.without(&plan.additions.changes.without(made));
            self.store.rewrite_record(&Record { netns_setup, ..record.clone() })?;
        }
        match plan.before {
            // The proxy's sockets are left alone.
            _ if record.config.shadow => Ok(()),
            None => {
                self.register_listeners(target, &record.config, &plan.policy, registered)?;
                self.register_applications(target, &plan.policy)
            }
            Some(before) if is_shadow(&before) => self.register_unknown(target, &record.config, &plan.policy),
            Some(_) => Ok(()),
        }
    }

    /// Undoes [`Node::add`]. What cannot be undone affects no connection, and the next call removes it.
    fn undo(&mut self, target: &Target, plan: &PolicyChange, made: &NetnsChanges) {
        let cookie = plan.record.cookie;
        let restored = netns_setup::remove(&target.netns, made).map_err(changing(&target.netns));
        let undone = restored.and_then(|()| match plan.before {
            None => self.remove_pod(cookie, None),
            Some(before) => {
                self.maps.remove_lists(&[(plan.policy.id, plan.policy.flags)])?;
                Ok(self.store.drop_other_records(cookie, before.id)?)
            }
        });
        if let Err(error) = undone {
            tracing::warn!(error = &error as &dyn std::error::Error, "undoing an attach that failed");
        }
    }
}

/// A random number: the hash of a constant with fresh keys.
fn random() -> u32 {
    use std::hash::{BuildHasher as _, RandomState};
    (RandomState::new().hash_one(0) & 0xffff_ffff) as u32
}
