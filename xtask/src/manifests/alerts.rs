//! The alerts of the chart, read and tried by Prometheus' own tool.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{debian::PackageLists, helm, run, workspace};

/// Debian's package of `promtool`; it is unpacked, not installed.
const PACKAGE: &str = "prometheus";

/// Checks the rules, and runs the cases beside them: series of samples, and what is told of them when.
pub(super) fn check() -> Result<()> {
    let folder = promtool()?;
    let promtool = folder.join("usr/bin/promtool");
    let rules = helm::chart().join("files/alerts.yaml");
    run::output(Command::new(&promtool).args(["check", "rules"]).arg(&rules))?;
    let cases = workspace::root().join("deploy/alerts-test.yaml");
    run::output(Command::new(&promtool).args(["test", "rules"]).arg(&cases)).map(drop)
}

fn promtool() -> Result<PathBuf> {
    let folder = workspace::cache()?.join("prometheus");
    if !folder.is_dir() {
        PackageLists::default().fetch(&[PACKAGE], &folder, |_| Ok(()))?;
    }
    Ok(folder)
}
