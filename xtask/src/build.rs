//! Builds the agent and the programs that use it.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use crate::{run, workspace};

const AGENT: &str = "intercept-agent";

/// The programs of the package `tests` that are not tests.
const PROGRAMS: &str = "tests/src/bin";

/// Builds the agent, optimised; returns where it is.
pub(crate) fn agent() -> Result<PathBuf> {
    run::shown(run::cargo("build").args(["--release", "--package", AGENT]))?;
    Ok(workspace::target().join("release").join(AGENT))
}

/// Builds the agent and the programs of the package `tests`, and runs the one with this name.
pub(crate) fn and_run(name: &str, options: &[OsString]) -> Result<()> {
    exists(name)?;
    run::shown(&mut everything())?;
    let folder = workspace::target().join("release");
    let mut program = Command::new(folder.join(name));
    run::shown(with_parts(program.args(options), &folder.join(AGENT))?)
}

/// Builds them for the virtual machine, where there are no libraries; returns the folder they are in.
pub(crate) fn linked_statically(name: &str) -> Result<PathBuf> {
    // Named, so that the flag is not used for build scripts and macros, which cannot be static.
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    exists(name)?;
    let target = workspace::target().join("static");
    run::shown(
        everything()
            .args(["--target", TARGET, "--target-dir"])
            .arg(&target)
            .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
            // What runs there is seconds long, and building it minutes.
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
            .env("CARGO_PROFILE_RELEASE_STRIP", "true"),
    )?;
    Ok(target.join(TARGET).join("release"))
}

/// All of them, because the programs of `tests` start one another.
fn everything() -> Command {
    let mut cargo = run::cargo("build");
    cargo.args(["--release", "--package", AGENT, "--package", "tests", "--bins"]);
    cargo
}

/// Tells a program where the parts are that set-up and the build have made.
pub(crate) fn with_parts<'a>(program: &'a mut Command, agent: &Path) -> Result<&'a mut Command> {
    program.env("INTERCEPT_AGENT", agent);
    let envoy = workspace::envoy()?;
    if envoy.is_file() {
        program.env("INTERCEPT_ENVOY", envoy);
    }
    Ok(program)
}

fn exists(name: &str) -> Result<()> {
    let source = workspace::root().join(PROGRAMS).join(name);
    if !source.with_extension("rs").is_file() && !source.join("main.rs").is_file() {
        bail!("building {name}: there is no {PROGRAMS}/{name}.rs");
    }
    Ok(())
}
