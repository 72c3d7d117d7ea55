//! Builds the agent and the programs that use it.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{architecture::Architecture, cross, run, workspace};

const AGENT: &str = "intercept-agent";

/// Cargo gives dependencies the features that all selected packages ask for. Commands that select the whole workspace, and
/// name what they want of it, share one build of the dependencies.
pub(crate) const SELECTION: &str = "--workspace";

/// The programs of the package `tests` that are not tests.
const PROGRAMS: &str = "tests/src/bin";

/// Builds the agent in release mode. Returns its path.
pub(crate) fn agent() -> Result<PathBuf> {
    run::shown(run::cargo("build").args(["--release", SELECTION, "--bin", AGENT]))?;
    Ok(workspace::target().join("release").join(AGENT))
}

/// Selects the agent and the programs of the package `tests`, which start each other.
pub(crate) fn programs() -> Result<Vec<String>> {
    let names = [AGENT.to_owned()].into_iter().chain(workspace::sources(Path::new(PROGRAMS))?);
    Ok(names.flat_map(|name| ["--bin".to_owned(), name]).collect())
}

/// Builds the agent and the programs of the package `tests`, and runs the one with this name.
pub(crate) fn and_run(name: &str, options: &[OsString]) -> Result<()> {
    run_with(name, options, |folder| Ok(folder.join(AGENT)))
}

/// The same with the agent as it is released, for what is measured: it starts faster without a dynamic linker.
pub(crate) fn and_measure(name: &str, options: &[OsString]) -> Result<()> {
    run_with(name, options, |_| static_agent(Architecture::HOST))
}

fn run_with(name: &str, options: &[OsString], agent: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<()> {
    exists(name)?;
    run::shown(&mut everything()?)?;
    let folder = workspace::target().join("release");
    let agent = agent(&folder)?;
    run::shown(with_parts(Command::new(folder.join(name)).args(options), &agent)?)
}

/// Builds static programs for the virtual machine, which has no libraries. Returns their folder.
pub(crate) fn linked_statically(name: &str, architecture: Architecture) -> Result<PathBuf> {
    exists(name)?;
    // A debug build: the programs run for seconds, and an optimised build takes minutes.
    statically(everything()?.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"), "static", architecture)
}

/// Builds the static agent for the image and the release. Returns its path.
pub(crate) fn static_agent(architecture: Architecture) -> Result<PathBuf> {
    let mut cargo = run::cargo("build");
    let folder = statically(cargo.args(["--release", "--package", AGENT]), "image", architecture)?;
    let agent = folder.join(AGENT);
    let contents = fs::read(&agent).with_context(|| format!("reading {}", agent.display()))?;
    ensure!(!needs_libraries(&contents), "{} is not linked statically", agent.display());
    Ok(agent)
}

/// In a separate target folder, so that the usual build stays up to date.
fn statically(cargo: &mut Command, folder: &str, architecture: Architecture) -> Result<PathBuf> {
    let target = workspace::target().join(folder);
    cross::statically(cargo, architecture)?;
    run::shown(
        cargo
            .arg("--target-dir")
            .arg(&target)
            .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
            .env("CARGO_PROFILE_RELEASE_STRIP", "true"),
    )?;
    Ok(target.join(architecture.target()).join("release"))
}

/// Whether a 64-bit ELF file names an interpreter, as files that need libraries do.
pub(crate) fn needs_libraries(elf: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let number = |at: usize, bytes: usize| {
        let mut value = [0; 8];
        let field = elf.get(at..at + bytes).unwrap_or_default();
        value[..field.len()].copy_from_slice(field);
        usize::try_from(u64::from_le_bytes(value)).unwrap_or(usize::MAX)
    };
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    (0..count).any(|index| number(table.saturating_add(index * size), 4) == PT_INTERP as usize)
}

fn everything() -> Result<Command> {
    let mut cargo = run::cargo("build");
    cargo.args(["--release", SELECTION]).args(programs()?);
    Ok(cargo)
}

/// Sets the variables with the paths of what set-up and the build have made.
pub(crate) fn with_parts<'a>(program: &'a mut Command, agent: &Path) -> Result<&'a mut Command> {
    program.env("INTERCEPT_AGENT", agent);
    let envoy = workspace::envoy()?;
    if envoy.is_file() {
        program.env("INTERCEPT_ENVOY", envoy);
    }
    Ok(program)
}

fn exists(name: &str) -> Result<()> {
    let programs = workspace::sources(Path::new(PROGRAMS))?;
    ensure!(
        programs.iter().any(|program| program == name),
        "building {name}: there is no {PROGRAMS}/{name}.rs"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_needs_libraries() {
        assert!(needs_libraries(&fs::read("/proc/self/exe").expect("readable")));
        assert!(!needs_libraries(b"#!/bin/sh\n"));
    }
}
