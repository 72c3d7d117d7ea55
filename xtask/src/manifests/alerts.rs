//! The alerts of the chart, read and tried by Prometheus' own tool.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::{debian::PackageLists, helm, run, setup, workspace};

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
        let unpacked = folder.with_extension("part");
        drop(fs::remove_dir_all(&unpacked));
        fs::create_dir_all(&unpacked).with_context(|| format!("making {}", unpacked.display()))?;
        let lists = PackageLists::default();
        // Without lists of packages, or with old ones, it finds none.
        if lists.unpack(&[PACKAGE], &unpacked).is_err() {
            run::quietly("updating the lists of packages", &mut setup::apt("update"))?;
            lists.unpack(&[PACKAGE], &unpacked)?;
        }
        fs::rename(&unpacked, &folder).with_context(|| format!("keeping {}", folder.display()))?;
    }
    Ok(folder)
}
