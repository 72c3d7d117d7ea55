//! Puts the rules of iptables of pods in again before the programs leave the node, without a daemon.

use std::path::{Path, PathBuf};

use super::{CutoverError, CutoverReport, Keeper, SavedRules, Transaction, go_back, present, put_in};
use crate::{
    cgroup::CgroupDir,
    ids::NetnsCookie,
    netns::Netns,
    node::{Node, NodeError},
    record::Record,
    store::Store,
};

/// What became of the rules of one pod.
pub struct RulesReturn {
    /// Cookie of its namespace.
    pub cookie: NetnsCookie,
    /// Its cgroup.
    pub cgroup: PathBuf,
    /// What was done; `None` if the pod is gone, and its rules with it.
    pub result: Result<Option<CutoverReport>, CutoverError>,
}

/// Puts the rules of every pod in again that is cut over, or about to be. Its policy is in shadow mode then, and it can be
/// detached.
pub fn all_back(bpffs: &Path) -> Result<Vec<RulesReturn>, CutoverError> {
    let Some(node) = Node::find(bpffs)? else { return Ok(Vec::new()) };
    let records = node.pods()?.readable.into_iter().map(|(record, _)| record);
    // What cannot be read is reported below.
    let is_cut_over = |record: &Record| !matches!(node.store().saved_rules(record.cookie), Ok(None));
    let out: Vec<Record> = records.filter(is_cut_over).collect();
    // Each is opened with the node's lock.
    drop(node);
    let back = out.into_iter().map(|record| RulesReturn {
        cookie: record.cookie,
        result: back(bpffs, &record),
        cgroup: record.cgroup,
    });
    Ok(back.collect())
}

fn back(bpffs: &Path, record: &Record) -> Result<Option<CutoverReport>, CutoverError> {
    let Some(node) = Node::find(bpffs)? else { return Ok(None) };
    if node.cgroup_of(record.cookie)?.is_none() || record.netns().map_err(NodeError::from)?.is_none() {
        // It is detached without a look at them.
        node.store().forget_rules(record.cookie)?;
        return Ok(None);
    }
    drop(node);
    let cgroup = CgroupDir::open(&record.cgroup).map_err(NodeError::from)?;
    go_back(bpffs, &cgroup, Keeper::Daemon).map(Some)
}

/// Removes state that cannot be opened, as [`Node::remove_unreadable`] does, after the rules of its pods were put in again. If that
/// fails, nothing is removed. The policies cannot go into shadow mode before, so a connection of that moment may lose its original
/// destination.
pub fn remove_unreadable(bpffs: &Path) -> Result<bool, CutoverError> {
    let mut returned = Vec::new();
    for layout in Store::find_any(bpffs)?.map(|store| store.layouts()).transpose()?.unwrap_or_default() {
        for cookie in layout.pods()? {
            if let Some((netns, saved)) = unreadable_rules(&layout, cookie)? {
                put_in(&netns, &saved)?;
                tracing::info!(netns = netns.name(), "its rules of iptables are in again");
                returned.push((netns, saved));
            }
        }
    }
    let removed = Node::remove_unreadable(bpffs)?;
    for (netns, saved) in &returned {
        // Without the programs they do nothing.
        if let Err(error) = remove_guards(netns, saved) {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(netns = netns.name(), error, "rules that the cut-over had added stay");
        }
    }
    Ok(removed)
}

/// The namespace and the saved rules of a pod, if it lives and is cut over.
fn unreadable_rules(layout: &Store, cookie: NetnsCookie) -> Result<Option<(Netns, SavedRules)>, NodeError> {
    for (_, record) in layout.records(cookie)? {
        if let Ok(record) = record
            && let Some(netns) = record.netns()?
        {
            return Ok(layout.saved_rules(cookie)?.map(|saved| (netns, saved)));
        }
    }
    Ok(None)
}

fn remove_guards(netns: &Netns, saved: &SavedRules) -> Result<(), CutoverError> {
    for tool in &saved.tools {
        let mut unguarded = Transaction::default();
        unguarded.delete(&present(&tool.tool.save(netns)?, &tool.guards));
        tool.tool.change(netns, &unguarded)?;
    }
    Ok(())
}
