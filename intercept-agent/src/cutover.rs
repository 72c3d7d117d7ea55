//! Enforces a shadowed policy in place of a pod's rules of iptables, and goes back.
//!
//! While both are active, each new connection is captured by one of them. The programs decide first and rewrite connect(), and
//! the rules return what goes over the loopback interface to the proxy; the one exception, connections of the proxy to its
//! own pod, is what guards are for. Connections from outside go on to be redirected by the rules, after which the programs
//! find them at the proxy's port. So the policy is enforced before the rules are taken out, and the rules are put in
//! before the policy goes back into shadow mode. Only rules of base chains are touched: tables and chains stay, and with them
//! the hooks by which NAT carries established connections on.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

mod all_back;
mod error;
mod guards;
mod iptables;
mod pod;
mod rules;
mod saved;

pub use all_back::{RulesReturn, all_back, remove_unreadable};
pub use error::CutoverError;
pub use rules::BaseRule;
pub use saved::{RulesState, SavedRules};

use self::{
    guards::guards,
    iptables::Tool,
    pod::{CutoverPod, PolicyMode},
    rules::{SavedTable, Transaction, missing},
    saved::SavedTool,
};
use crate::{
    cgroup::CgroupDir,
    ids::{CookieNumber, NetnsCookie},
    netns::Netns,
    shadow::ShadowReport,
};

/// For how long both captures stay active: a call of connect() may have been decided on by the old one, and its SYN leaves
/// shortly after.
const OVERLAP: Duration = Duration::from_secs(1);
/// The overlap is waited for in steps of this length. A step that takes twice as long is not counted: the machine was busy or
/// stopped, and a caller between decision and SYN has waited as well.
const OVERLAP_STEP: Duration = Duration::from_millis(100);
/// The overlap ends after this time, however busy the machine is.
const LONGEST_OVERLAP: Duration = Duration::from_secs(10);

/// Whether a pod is cut over although the shadow does not agree, or has compared little.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Caution {
    /// Only if at least this many flows were compared, and none differs.
    Compared(u64),
    /// It is.
    Forced,
}

/// Who keeps a pod, and changes its mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keeper {
    /// A person, by commands.
    Command,
    /// The daemon.
    Daemon,
}

impl Keeper {
    /// How a cut-over is forced.
    fn force(self) -> &'static str {
        match self {
            Self::Command => "--force",
            Self::Daemon => "the annotation `intercept/cutover: force` on the pod",
        }
    }
}

/// What was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CutoverOutcome {
    /// The programs capture, and the rules are out.
    CutOver,
    /// The rules capture, and the programs compare.
    Back,
    /// Nothing: it was so already.
    Unchanged,
}

/// A rule that was taken out or put in again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MovedRule {
    /// What the names of its programs begin with.
    pub tool: String,
    /// The rule.
    #[serde(flatten)]
    pub rule: BaseRule,
}

/// What was done, and to which rules. The names in JSON are stable.
#[derive(Clone, Debug, Serialize)]
pub struct CutoverReport {
    /// The pod.
    pub cgroup: PathBuf,
    /// Its netns cookie.
    #[serde(with = "CookieNumber")]
    pub netns_cookie: NetnsCookie,
    /// What was done.
    pub outcome: CutoverOutcome,
    /// The rules that capture the pod without the programs.
    pub rules: Vec<MovedRule>,
    /// After the way back, the lines of iptables-save that are not as before, as in a patch.
    pub differences: Vec<String>,
}

impl CutoverReport {
    fn of(pod: &CutoverPod, outcome: CutoverOutcome, saved: &SavedRules) -> Self {
        let of_tool = |tool: &SavedTool| -> Vec<MovedRule> {
            let name = tool.tool.name();
            tool.captures.iter().map(|rule| MovedRule { tool: name.to_owned(), rule: rule.clone() }).collect()
        };
        Self {
            cgroup: pod.cgroup().to_owned(),
            netns_cookie: pod.cookie(),
            outcome,
            rules: saved.tools.iter().flat_map(of_tool).collect(),
            differences: Vec::new(),
        }
    }
}

/// Enforces the policy of a pod in shadow mode, and takes the rules out that capture it. Also finishes what was
/// interrupted.
pub fn cut_over(
    bpffs: &Path,
    cgroup: &CgroupDir,
    keeper: Keeper,
    caution: Caution,
) -> Result<CutoverReport, CutoverError> {
    let mut pod = CutoverPod::open(bpffs, cgroup, keeper)?;
    let before = pod.saved()?;
    if before.is_none() && pod.mode() == PolicyMode::Enforce {
        return Err(CutoverError::NotShadow { cgroup: pod.cgroup().to_owned() });
    }
    pod.refuse_tproxy()?;
    if pod.mode() == PolicyMode::Shadow {
        pod.refuse_disagreement(keeper, caution)?;
    }
    let current = read(&pod)?;
    let is_out = !current.iter().any(|found| found.has_captures());
    if let Some(saved) = &before
        && saved.state == RulesState::Out
        && pod.mode() == PolicyMode::Enforce
        && is_out
    {
        return Ok(CutoverReport::of(&pod, CutoverOutcome::Unchanged, saved));
    }
    let mut saved = merged(before, &current, pod.mode());
    if saved.tools.is_empty() {
        return Err(CutoverError::NoRules {
            netns: pod.netns().name().to_owned(),
            tools: current.iter().map(|found| found.tool.name()).collect::<Vec<_>>().join(", "),
        });
    }
    pod.save(&mut saved, if is_out { RulesState::Changing } else { RulesState::In })?;
    for found in &current {
        let mut guarded = Transaction::default();
        let tool = saved.tools.iter().find(|tool| tool.tool == found.tool);
        guarded.insert_first(&found.tables, tool.map_or(&[], |tool| &tool.guards));
        found.change(&pod, &guarded)?;
    }
    pod.switch(PolicyMode::Enforce)?;
    overlap(thread::sleep);
    pod.save(&mut saved, RulesState::Changing)?;
    for found in read(&pod)? {
        found.change(&pod, &found.removal(&saved))?;
    }
    if let Some(found) = read(&pod)?.iter().find(|found| found.has_captures()) {
        return Err(CutoverError::Returned { tool: found.tool.name().to_owned() });
    }
    pod.save(&mut saved, RulesState::Out)?;
    Ok(CutoverReport::of(&pod, CutoverOutcome::CutOver, &saved))
}

/// Puts the rules in again, and the policy back into shadow mode. Also finishes what was interrupted.
pub fn go_back(bpffs: &Path, cgroup: &CgroupDir, keeper: Keeper) -> Result<CutoverReport, CutoverError> {
    let mut pod = CutoverPod::open(bpffs, cgroup, keeper)?;
    let Some(mut saved) = pod.saved()? else {
        return match pod.mode() {
            PolicyMode::Shadow => {
                let none = SavedRules { state: RulesState::In, since: 0, tools: Vec::new() };
                Ok(CutoverReport::of(&pod, CutoverOutcome::Unchanged, &none))
            }
            PolicyMode::Enforce => Err(CutoverError::NothingSaved { cgroup: pod.cgroup().to_owned() }),
        };
    };
    let were_in = saved.state == RulesState::In;
    pod.save(&mut saved, if were_in { RulesState::In } else { RulesState::Changing })?;
    put_in(pod.netns(), &saved)?;
    pod.save(&mut saved, RulesState::In)?;
    pod.switch(PolicyMode::Shadow)?;
    overlap(thread::sleep);
    let mut report = CutoverReport::of(&pod, CutoverOutcome::Back, &saved);
    for tool in &saved.tools {
        let found = FoundRules::read(&pod, tool.tool.clone())?;
        let mut unguarded = Transaction::default();
        unguarded.delete(&present(&found.tables, &tool.guards));
        found.change(&pod, &unguarded)?;
        let now = FoundRules::read(&pod, tool.tool.clone())?.lines();
        report.differences.extend(differences(tool.tool.name(), &tool.tables, &now));
    }
    pod.forget()?;
    Ok(report)
}

/// Puts saved rules in again, behind their guards.
fn put_in(netns: &Netns, saved: &SavedRules) -> Result<(), CutoverError> {
    for SavedTool { tool, captures, guards, .. } in &saved.tools {
        let tables = tool.save(netns)?;
        let mut returned = Transaction::default();
        returned.insert_first(&tables, guards);
        returned.insert(&tables, captures, guards);
        tool.change(netns, &returned)?;
        if let Some(rule) = missing(&tool.save(netns)?, captures).first() {
            return Err(CutoverError::Lost { tool: tool.name().to_owned(), rule: rule.rule.clone() });
        }
    }
    Ok(())
}

/// Those of `rules` that are in the tables.
fn present(tables: &[SavedTable], rules: &[BaseRule]) -> Vec<BaseRule> {
    let missing = missing(tables, rules);
    rules.iter().filter(|rule| !missing.contains(rule)).cloned().collect()
}

/// Refuses to cut a pod over whose shadow says this.
pub fn refuse_disagreement(
    shadow: Option<&ShadowReport>,
    cgroup: &Path,
    keeper: Keeper,
    caution: Caution,
) -> Result<(), CutoverError> {
    let Caution::Compared(least) = caution else { return Ok(()) };
    let (compared, differed) = shadow.map_or((0, 0), |shadow| (shadow.compared, shadow.differed));
    let (cgroup, force) = (cgroup.to_owned(), keeper.force());
    match compared {
        _ if differed > 0 => Err(CutoverError::Differs { cgroup, differed, compared, force }),
        0 => Err(CutoverError::NothingCompared { cgroup, least, force }),
        _ if compared < least => Err(CutoverError::TooFewCompared { cgroup, compared, least, force }),
        _ => Ok(()),
    }
}

/// The rules of one implementation of iptables, as they are now.
struct FoundRules {
    tool: Tool,
    tables: Vec<SavedTable>,
    /// Those of base chains that capture the pod.
    captures: Vec<BaseRule>,
    guards: Vec<BaseRule>,
}

fn read(pod: &CutoverPod) -> Result<Vec<FoundRules>, CutoverError> {
    let tools = Tool::all(pod.netns())?;
    tools.into_iter().map(|tool| FoundRules::read(pod, tool)).collect()
}

impl FoundRules {
    fn read(pod: &CutoverPod, tool: Tool) -> Result<Self, CutoverError> {
        let tables = tool.save(pod.netns())?;
        if tables.iter().any(|table| table.has_target("TPROXY")) {
            return Err(CutoverError::Tproxy { netns: pod.netns().name().to_owned() });
        }
        let config = pod.config();
        let ports = [config.proxy_port, config.inbound_port, config.dns_port];
        let guards = guards(&tool, &tables, config.dns_port);
        let bare = tables.iter().map(|table| table.without(&guards));
        let captures = bare.flat_map(|table| table.captures(&ports)).collect();
        Ok(Self { tool, tables, captures, guards })
    }

    fn has_captures(&self) -> bool {
        !self.captures.is_empty()
    }

    /// The tables without guards, as iptables-save prints them.
    fn lines(&self) -> Vec<String> {
        self.tables.iter().flat_map(|table| table.without(&self.guards).lines()).collect()
    }

    /// What takes the captures out, and with them those guards that only both captures together need.
    fn removal(&self, saved: &SavedRules) -> Transaction {
        let mut removed = Transaction::default();
        removed.delete(&self.captures);
        if let Some(tool) = saved.tools.iter().find(|tool| tool.tool == self.tool) {
            let overlap: Vec<BaseRule> =
                tool.guards.iter().filter(|rule| rule.table == "nat").cloned().collect();
            removed.delete(&present(&self.tables, &overlap));
        }
        removed
    }

    fn change(&self, pod: &CutoverPod, changes: &Transaction) -> Result<(), CutoverError> {
        self.tool.change(pod.netns(), changes)
    }
}

/// What is to be saved: what was saved before, with what was found since. While the rules are in and the policy only compares,
/// only what is found.
fn merged(before: Option<SavedRules>, current: &[FoundRules], mode: PolicyMode) -> SavedRules {
    let mut saved = before
        .filter(|saved| saved.state != RulesState::In || mode == PolicyMode::Enforce)
        .unwrap_or(SavedRules { state: RulesState::In, since: 0, tools: Vec::new() });
    for found in current.iter().filter(|found| found.has_captures()) {
        if !saved.tools.iter().any(|tool| tool.tool == found.tool) {
            saved.tools.push(SavedTool {
                tool: found.tool.clone(),
                captures: found.captures.clone(),
                guards: found.guards.clone(),
                tables: found.lines(),
            });
        }
    }
    saved
}

fn differences(tool: &str, before: &[String], after: &[String]) -> Vec<String> {
    if before == after {
        return Vec::new();
    }
    let gone = before.iter().filter(|line| !after.contains(line)).map(|line| format!("{tool}: - {line}"));
    let new = after.iter().filter(|line| !before.contains(line)).map(|line| format!("{tool}: + {line}"));
    let found: Vec<String> = gone.chain(new).collect();
    if found.is_empty() { vec![format!("{tool}: the order of the rules")] } else { found }
}

/// Waits while both captures are active.
fn overlap(sleep: impl Fn(Duration)) {
    let start = Instant::now();
    let mut left = OVERLAP;
    while !left.is_zero() && start.elapsed() < LONGEST_OVERLAP {
        let step = Instant::now();
        sleep(OVERLAP_STEP);
        if step.elapsed() < 2 * OVERLAP_STEP {
            left = left.saturating_sub(OVERLAP_STEP);
        }
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn the_overlap_does_not_count_the_time_in_which_the_machine_stands_still() {
        let steps = Cell::new(0);
        let start = Instant::now();
        overlap(|step| {
            steps.set(steps.get() + 1);
            // It stands still in the third step.
            thread::sleep(if steps.get() == 3 { OVERLAP } else { step });
        });
        assert!(steps.get() > 10, "{} steps", steps.get());
        assert!(start.elapsed() >= 2 * OVERLAP, "{:?}", start.elapsed());
    }
}
