//! `cutover`: enforces a shadowed policy in place of the pod's rules of iptables, and goes back.

use anyhow::{Context as _, Result};

use super::print_line;
use crate::{
    cgroup::CgroupDir,
    cli::CutoverArgs,
    cutover::{self, Caution, CutoverOutcome, CutoverReport, Keeper},
    escape::{self, OneLine},
};

pub(super) fn cutover(args: &CutoverArgs) -> Result<()> {
    super::check::require_privileges()?;
    let cgroup = CgroupDir::open(&args.cgroup_path)?;
    let path = || cgroup.path().display().to_string();
    let bpffs = &args.bpffs.bpffs;
    let report = if args.back {
        cutover::go_back(bpffs, &cgroup, Keeper::Command)
            .with_context(|| format!("going back to the rules of cgroup {}", path()))?
    } else {
        let caution = if args.force { Caution::Forced } else { Caution::Compared(1) };
        cutover::cut_over(bpffs, &cgroup, Keeper::Command, caution)
            .with_context(|| format!("cutting over cgroup {}", path()))?
    };
    if args.json {
        print_line!("{}", escape::pretty_json(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

fn print(report: &CutoverReport) {
    let cgroup = OneLine(report.cgroup.display());
    let done = match report.outcome {
        CutoverOutcome::CutOver => "is enforced, and these rules are out",
        CutoverOutcome::Back => "is in shadow mode, and these rules are in",
        CutoverOutcome::Unchanged => "is unchanged",
    };
    print_line!("{cgroup} (cookie {}) {done}", report.netns_cookie);
    for moved in &report.rules {
        let rule = &moved.rule;
        print_line!("  {} -t {} -A {} {}", moved.tool, rule.table, rule.chain, OneLine(&rule.rule));
    }
    for line in &report.differences {
        print_line!("  DIFFERS from before: {}", OneLine(line));
    }
}
