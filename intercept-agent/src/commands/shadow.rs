//! `status --shadow`: how often shadow mode agreed with what happened, and each kind of difference.

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use super::print_line;
use crate::{
    cgroup::CgroupDir,
    cli::StatusArgs,
    escape::{self, OneLine},
    node::Node,
    shadow::ShadowReport,
};

/// A pod in shadow mode. The names in JSON are stable.
#[derive(Serialize)]
struct ShadowedPod {
    cgroup: PathBuf,
    name: String,
    #[serde(flatten)]
    report: ShadowReport,
}

pub(super) fn status(args: &StatusArgs) -> Result<()> {
    let only = args.cgroup_path.as_ref().map(CgroupDir::open).transpose()?.map(|cgroup| cgroup.id());
    let mut pods = Vec::new();
    if let Some(node) = Node::find(&args.bpffs.bpffs)? {
        for (record, _) in node.pods()?.readable {
            if only.is_none_or(|id| id == record.cgroup_id)
                && let Some(report) = ShadowReport::read(node.maps().shadow(), record.cookie)?
            {
                pods.push(ShadowedPod { cgroup: record.cgroup.clone(), name: record.name(), report });
            }
        }
    }
    if args.json {
        print_line!("{}", escape::pretty_json(&pods)?);
    } else if pods.is_empty() {
        print_line!("nothing is in shadow mode");
    } else {
        pods.iter().for_each(print);
    }
    Ok(())
}

fn print(pod: &ShadowedPod) {
    let ShadowReport { since, compared, differed, uncompared, reasons, differences, .. } = &pod.report;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs());
    let unknown =
        if *uncompared > 0 { format!(", {uncompared} could not be compared") } else { String::new() };
    print_line!(
        "{}: {compared} flows compared in {} s, {differed} differ{unknown}",
        OneLine(pod.cgroup.display()),
        now.saturating_sub(*since)
    );
    for reason in reasons {
        print_line!(
            "  {:>12} agreed {:>8} differed  {} {}",
            reason.agreed,
            reason.differed,
            reason.direction,
            reason.reason
        );
    }
    for difference in differences {
        print_line!("  DIFFERS {} times: {difference}", difference.count);
        if difference.count > 1 {
            print_line!("          last: {}", difference.last);
        }
    }
}
