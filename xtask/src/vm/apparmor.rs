//! The agent under AppArmor: confined by what a container runtime's default profile forbids it fails with an error that
//! names the profile, and unconfined it works.
//!
//! Debian's kernels have AppArmor built in; a parameter makes it the active security module.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::initramfs::Initramfs;
use crate::{debian::PackageLists, run, workspace};

/// Parameters of the kernel.
pub(super) const PARAMETERS: &str = "apparmor=1 security=apparmor";

/// The rules that containerd and docker give a container that asks for nothing else.
const PROFILE: &str = include_str!("apparmor/profile");
/// What is run: each step says what it expects.
const SCRIPT: &str = include_str!("apparmor/trial.sh");

/// Debian's packages of `apparmor_parser` and what it is linked to; they are unpacked, not installed.
const PACKAGES: [&str; 2] = ["apparmor", "libc6"];
/// What of them goes into the machine, and where it is there.
const FILES: [(&str, &str); 3] = [
    ("sbin/apparmor_parser", "bin/apparmor_parser"),
    ("lib/x86_64-linux-gnu/libc.so.6", "lib/libc.so.6"),
    ("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "lib64/ld-linux-x86-64.so.2"),
];

/// Adds the parser, the profile and the trial to a machine; returns the step that runs it.
pub(super) fn prepare(initramfs: &mut Initramfs) -> Result<&'static str> {
    let packages = packages()?;
    for (from, to) in FILES {
        let path = packages.join(from);
        let contents = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        initramfs.file(to, 0o755, &contents);
    }
    initramfs.file("etc/profile.apparmor", 0o644, PROFILE.as_bytes());
    initramfs.file("bin/apparmor-trial", 0o755, SCRIPT.as_bytes());
    Ok("step apparmor sh /bin/apparmor-trial")
}

fn packages() -> Result<PathBuf> {
    let folder = workspace::cache()?.join("apparmor");
    if !folder.is_dir() {
        PackageLists::default()
            .fetch(&PACKAGES, &folder, link_to_usr)
            .with_context(|| format!("getting {}", PACKAGES.join(", ")))?;
    }
    Ok(folder)
}

/// Releases since Debian 13 have it all below usr.
fn link_to_usr(unpacked: &Path) -> Result<()> {
    for folder in ["lib", "sbin"] {
        let link = unpacked.join(folder);
        if !link.exists() {
            run::output(Command::new("ln").arg("-s").arg(format!("usr/{folder}")).arg(&link))?;
        }
    }
    Ok(())
}
