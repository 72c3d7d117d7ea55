//! Adding, switching and removing what was planned.
//!
//! Nothing that is added has any effect on a connection before the switch, and nothing that the policy in force needs
//! is removed before another has taken its place. The record is written first: whatever becomes of the agent, it says
//! what of the namespace is to be undone. So failure, crash and detach are undone by the same few functions.

use std::{collections::BTreeSet, os::fd::AsFd as _, time::Instant};

use intercept_common::names;

use super::{Attached, Node, NodeError, Target, plan::Apply};
use crate::{
    kernel,
    netns::Netns,
    plumbing::{self, Plumbing},
};

impl Node {
    /// Carry out a plan. After a failure the state is what it was before.
    pub(super) fn apply(&mut self, target: &Target, plan: &Apply) -> Result<Attached, NodeError> {
        let cookie = plan.record.cookie;
        let start = Instant::now();
        let (mut made, mut registered) = (Plumbing::default(), BTreeSet::new());
        let switched = self
            .add(target, plan, &mut made, &mut registered)
            .and_then(|()| Ok(self.tables.switch_on(cookie, &plan.policy)?));
        tracing::debug!(seconds = start.elapsed().as_secs_f64(), cookie, "wrote maps and made links");
        if let Err(error) = switched {
            self.undo(target, plan, &made);
            return Err(error);
        }
        // In force from here on: a failure below is not one of the attach, and the next call makes up for it.
        let (config, policy) = (&plan.record.config, &plan.policy);
        let looked = match plan.before {
            // A listener that came up since the look before was not seen by the callback, which knew no policy yet.
            None => self.register_listeners(target, config, policy, &mut registered),
            Some(_) => self.register_unknown(target, config, policy),
        };
        let finished = looked
            .and_then(|()| self.remove_leftovers(cookie, plan.policy.id, &target.netns));
        if let Err(error) = finished {
            tracing::warn!(error = &error as &dyn std::error::Error, "tidying after attach");
        }
        Ok(if plan.before.is_some() { Attached::Replaced } else { Attached::New })
    }

    /// Everything before the switch. `made` is what was added to the namespace, also after a failure.
    fn add(
        &mut self,
        target: &Target,
        plan: &Apply,
        made: &mut Plumbing,
        registered: &mut BTreeSet<u64>,
    ) -> Result<(), NodeError> {
        let record = &plan.record;
        self.store.create(&self.store.pod(record.cookie))?;
        self.store.write_record(record)?;
        self.link(target)?;
        if plan.before.is_none() {
            self.tables.reset_slot(plan.policy.slot)?;
        }
        self.tables.write(plan.policy.id, &plan.entries)?;
        *made = plumbing::add(&target.netns, &plan.additions)
            .map_err(|source| NodeError::Plumbing { netns: target.netns.name().to_owned(), source })?;
        if *made != plan.additions {
            // Somebody else was faster: what they made is theirs.
            let plumbing = record.plumbing.without(&plan.additions.without(made));
            self.store.rewrite_record(&crate::store::Record { plumbing, ..record.clone() })?;
        }
        match plan.before {
            None => self.register_listeners(target, &record.config, &plan.policy, registered),
            Some(_) => Ok(()),
        }
    }

    /// Take back what [`Node::add`] did. What cannot be taken back has no effect and is left to the next call.
    fn undo(&mut self, target: &Target, plan: &Apply, made: &Plumbing) {
        let cookie = plan.record.cookie;
        plumbing::remove(&target.netns, made);
        let undone = match plan.before {
            None => self
                .take_out(cookie, None)
                .and_then(|()| Ok(self.tables.reset_slot(plan.policy.slot)?)),
            Some(before) => self
                .tables
                .remove_lists(&[plan.policy.id])
                .map_err(NodeError::from)
                .and_then(|()| Ok(self.store.drop_other_records(cookie, before.id)?)),
        };
        if let Err(error) = undone {
            tracing::warn!(error = &error as &dyn std::error::Error, "undoing an attach that failed");
        }
    }

    /// Remove what a pod has besides the policy in force: of the one that it replaced, or of one that an agent died
    /// over.
    pub(super) fn remove_leftovers(
        &mut self,
        cookie: u64,
        in_force: u32,
        netns: &Netns,
    ) -> Result<(), NodeError> {
        let mut needed = Plumbing::default();
        let mut others = Vec::new();
        for (id, record) in self.store.records(cookie)? {
            match record {
                Ok(record) if id == in_force => needed = record.plumbing,
                Ok(record) => others.push((id, record.plumbing)),
                Err(error) if error.may_pass() => return Err(error.into()),
                // It says nothing that could be undone.
                Err(_) if id != in_force => others.push((id, Plumbing::default())),
                Err(_) => {}
            }
        }
        for (_, changes) in &others {
            plumbing::remove(netns, &changes.without(&needed));
        }
        if !others.is_empty() {
            self.tables.remove_lists(&others.iter().map(|(id, _)| *id).collect::<Vec<_>>())?;
            // Last: as long as it is there, the next call does all this again.
            self.store.drop_other_records(cookie, in_force)?;
        }
        Ok(())
    }

    /// Take a pod out of force and leave nothing of it; what was changed in its namespace is undone if that is given.
    /// After a failure the next call goes on where this one ended.
    pub(super) fn take_out(&mut self, cookie: u64, netns: Option<&Netns>) -> Result<(), NodeError> {
        let policy = self.tables.policy(cookie)?;
        self.tables.switch_off(cookie)?;
        if let Some(netns) = netns {
            self.restore(cookie, netns)?;
        }
        for program in names::CGROUP_PROGRAMS.iter().chain([&names::SK_LOOKUP]) {
            // So that nothing is attached any more when this returns. Whoever fails here leaves it to the removal.
            let link = kernel::open_pin(&self.store.pod(cookie).join(program));
            let _goes_with_its_pin = link.and_then(|link| kernel::link_detach(link.as_fd()));
        }
        // Whatever was written for it, a record was before.
        let written = self.store.records(cookie)?.into_iter().map(|(id, _)| id);
        let ids: Vec<u32> = written.chain(policy.map(|policy| policy.id)).collect();
        self.tables.remove_lists(&ids)?;
        self.tables.purge_connections(|netns| netns != cookie)?;
        if let Some(policy) = policy {
            self.tables.reset_slot(policy.slot)?;
        }
        // Last: as long as it is there, the next call does all this again.
        Ok(self.store.remove(&self.store.pod(cookie))?)
    }

    /// Undo what all records of a pod say that was changed in its namespace.
    fn restore(&self, cookie: u64, netns: &Netns) -> Result<(), NodeError> {
        for (policy, record) in self.store.records(cookie)? {
            match record {
                Ok(record) => plumbing::remove(netns, &record.plumbing),
                Err(error) if error.may_pass() => return Err(error.into()),
                Err(error) => tracing::warn!(
                    cookie,
                    policy,
                    error = &error as &dyn std::error::Error,
                    "what was changed in the namespace is not known, and stays"
                ),
            }
        }
        Ok(())
    }
}
