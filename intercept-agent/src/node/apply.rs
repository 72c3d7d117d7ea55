//! Carrying out a plan: add, switch, remove.
//!
//! What is added affects no connection before the switch, and what the active policy needs is removed only after another
//! has replaced it. The record is written first and removed last, and lists every change of the namespace, so the same
//! functions clean up after a failure, a crash and a detach.

use std::{collections::BTreeSet, os::fd::AsFd as _, time::Instant};

use intercept_common::names;

use super::{Attached, Node, NodeError, Target, plan::PolicyChange};
use crate::{
    netns::Netns,
    netns_setup::{self, NetnsChanges, NetnsSetupError},
    sys,
};

impl Node {
    /// Carry out a plan. After a failure the state is what it was before.
    pub(super) fn apply(&mut self, target: &Target, plan: &PolicyChange) -> Result<Attached, NodeError> {
        let cookie = plan.record.cookie;
        let (mut made, mut registered) = (NetnsChanges::default(), BTreeSet::new());
        let switched = self
            .add(target, plan, &mut made, &mut registered)
            .and_then(|()| Ok(self.maps.activate(cookie, &plan.policy)?));
        if let Err(error) = switched {
            self.undo(target, plan, &made);
            return Err(error);
        }
        // Active from here on: a failure below does not fail the attach, and the next call repeats what is left.
        let (config, policy) = (&plan.record.config, &plan.policy);
        let registered = match plan.before {
            // A listener that came up since the look before was not seen by the callback, which knew no policy yet.
            None => self.register_listeners(target, config, policy, &mut registered),
            Some(_) => self.register_unknown(target, config, policy),
        };
        self.accelerate(target, config, policy);
        let removed = self.remove_leftovers(cookie, plan.policy.id, &target.netns);
        for error in [registered, removed].into_iter().filter_map(Result::err) {
            tracing::warn!(cookie, error = &error as &dyn std::error::Error, "finishing an attach");
        }
        Ok(if plan.before.is_some() { Attached::Replaced } else { Attached::New })
    }

    /// Everything before the switch. `made` is what was added to the namespace, also after a failure.
    fn add(
        &mut self,
        target: &Target,
        plan: &PolicyChange,
        made: &mut NetnsChanges,
        registered: &mut BTreeSet<u64>,
    ) -> Result<(), NodeError> {
        let record = &plan.record;
        let start = Instant::now();
        self.store.create(&self.store.pod(record.cookie))?;
        self.store.write_record(record)?;
        self.link(target)?;
        if plan.before.is_none() {
            self.maps.reset_slot(plan.policy.slot)?;
        }
        self.maps.write(plan.policy.id, &plan.entries)?;
        tracing::debug!(
            seconds = start.elapsed().as_secs_f64(),
            cookie = record.cookie,
            "wrote maps and made links"
        );
        netns_setup::add(&target.netns, &plan.additions, made).map_err(preparing(&target.netns))?;
        if *made != plan.additions {
            // Made by another process since the plan: not ours to remove.
            let netns_setup = record.netns_setup.without(&plan.additions.without(made));
            self.store.rewrite_record(&crate::store::Record { netns_setup, ..record.clone() })?;
        }
        match plan.before {
            None => self.register_listeners(target, &record.config, &plan.policy, registered),
            Some(_) => Ok(()),
        }
    }

    /// Undo [`Node::add`]. What cannot be undone affects no connection and is left to the next call.
    fn undo(&mut self, target: &Target, plan: &PolicyChange, made: &NetnsChanges) {
        let cookie = plan.record.cookie;
        let restored = netns_setup::remove(&target.netns, made).map_err(preparing(&target.netns));
        let undone = restored.and_then(|()| match plan.before {
            None => self.take_out(cookie, None),
            Some(before) => {
                self.maps.remove_lists(&[plan.policy.id])?;
                Ok(self.store.drop_other_records(cookie, before.id)?)
            }
        });
        if let Err(error) = undone {
            tracing::warn!(error = &error as &dyn std::error::Error, "undoing an attach that failed");
        }
    }

    /// Remove what belongs to a pod's other policies: the replaced one, or one that a crashed agent did not activate.
    pub(super) fn remove_leftovers(
        &mut self,
        cookie: u64,
        active: u32,
        netns: &Netns,
    ) -> Result<(), NodeError> {
        let mut needed = NetnsChanges::default();
        let mut others = Vec::new();
        for (id, record) in self.store.records(cookie)? {
            match record {
                Ok(record) if id == active => needed = record.netns_setup,
                Ok(record) => others.push((id, record.netns_setup)),
                Err(error) if error.may_pass() => return Err(error.into()),
                // Its changes are not known, so nothing can be undone.
                Err(_) if id != active => others.push((id, NetnsChanges::default())),
                Err(_) => {}
            }
        }
        for (_, changes) in &others {
            netns_setup::remove(netns, &changes.without(&needed)).map_err(preparing(netns))?;
        }
        if !others.is_empty() {
            self.maps.remove_lists(&others.iter().map(|(id, _)| *id).collect::<Vec<_>>())?;
            // Last, so that the next call repeats all of this if it fails before.
            self.store.drop_other_records(cookie, active)?;
        }
        Ok(())
    }

    /// Deactivate a pod and remove everything of it, including the changes of its namespace if that is given. After a
    /// failure, call it again.
    pub(super) fn take_out(&mut self, cookie: u64, netns: Option<&Netns>) -> Result<(), NodeError> {
        let policy = self.maps.policy(cookie)?;
        if let Some(policy) = &policy
            && let Err(error) = self.stop_accelerating(cookie, policy.slot)
        {
            tracing::warn!(
                cookie,
                error = &error as &dyn std::error::Error,
                "joined connections stay joined"
            );
        }
        self.maps.deactivate(cookie)?;
        if let Some(netns) = netns {
            if let Some(policy) = &policy
                && let Ok(Some(record)) = self.store.read_record(cookie, policy.id)
            {
                self.restore_listeners(&record, policy, netns);
            }
            self.restore(cookie, netns)?;
        }
        for program in names::CGROUP_PROGRAMS.iter().chain([&names::SK_LOOKUP]) {
            // Detach now; if that fails, removing the pin still detaches it later.
            let link = sys::open_pin(&self.store.pod(cookie).join(program));
            let _goes_with_its_pin = link.and_then(|link| sys::link_detach(link.as_fd()));
        }
        // Every list was written after its record.
        let records = self.store.records(cookie)?;
        let ids: Vec<u32> = records.iter().map(|(id, _)| *id).chain(policy.map(|policy| policy.id)).collect();
        self.maps.remove_lists(&ids)?;
        self.maps.purge_connections(|netns| netns != cookie)?;
        let others = self.maps.policies()?;
        let slots = records.iter().filter_map(|(_, record)| record.as_ref().ok()).map(|record| record.slot);
        for slot in slots.chain(policy.map(|policy| policy.slot)) {
            // Another pod may have the slot of a policy that was not active any more.
            if others.iter().all(|(_, other)| other.slot != slot) {
                self.maps.reset_slot(slot)?;
            }
        }
        // Last, so that the next call repeats all of this if it fails before.
        Ok(self.store.remove(&self.store.pod(cookie))?)
    }

    /// Undo what all records of a pod say that was changed in its namespace.
    fn restore(&self, cookie: u64, netns: &Netns) -> Result<(), NodeError> {
        for (policy, record) in self.store.records(cookie)? {
            match record {
                Ok(record) => netns_setup::remove(netns, &record.netns_setup).map_err(preparing(netns))?,
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

fn preparing(netns: &Netns) -> impl FnOnce(NetnsSetupError) -> NodeError + use<> {
    let netns = netns.name().to_owned();
    move |source| NodeError::NetnsChanges { netns, source }
}
