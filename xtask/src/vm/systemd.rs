//! deploy/systemd on a Debian system whose first process is systemd, with a real Envoy.
//!
//! The system is made of Debian's packages, unpacked into the cache. Each run adds what is tested and makes a disk of it.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{debian::PackageLists, run, workspace};

/// Parameters of the kernel. Without a login prompt, which waits for udev.
pub(super) const PARAMETERS: &str =
    "systemd.unit=multi-user.target systemd.show_status=0 systemd.getty_auto=0";
/// The driver of the disk.
pub(super) const MODULES: [&str; 1] = ["virtio_blk"];
/// Leaves the initramfs.
pub(super) const SCRIPT: &str = include_str!("systemd/switch.sh");

/// What the documented commands and the units need. `apt` finds what these need.
const PACKAGES: [&str; 10] = [
    "base-files",
    "coreutils",
    "curl",
    "dash",
    "dbus",
    "iproute2",
    "passwd",
    "python3",
    "systemd-sysv",
    "util-linux",
];
/// What a configured Debian has besides.
const FILES: [(&str, &str); 6] = [
    ("etc/passwd", include_str!("systemd/passwd")),
    ("etc/group", include_str!("systemd/group")),
    // With an empty one, systemd would enable all units.
    ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
    ("etc/hostname", "machine\n"),
    ("etc/hosts", "127.0.0.1 localhost machine\n"),
    ("etc/fstab", ""),
];
const FOLDERS: [&str; 7] = ["proc", "sys", "dev", "run", "tmp", "root", "var/log/journal"];

/// The unit that runs the steps, and what it runs.
const UNIT: &str = include_str!("systemd/steps.service");
const STEPS: &str = include_str!("systemd/steps.sh");

/// What must be in the cache: the system, and Envoy.
pub(super) fn missing() -> Result<Vec<PathBuf>> {
    Ok([folder()?, workspace::envoy()?].into_iter().filter(|path| !path.exists()).collect())
}

/// Makes a disk with the system, what is tested, and a unit that runs the steps.
pub(super) fn disk(programs: &Path, names: &[&str], disk: &Path) -> Result<()> {
    let system = folder()?;
    if !system.is_dir() {
        fetch(&system).with_context(|| format!("getting {}", PACKAGES.join(", ")))?;
    }
    let root = disk.with_extension("root");
    drop(fs::remove_dir_all(&root));
    run::output(Command::new("cp").args(["-a", "--reflink=auto"]).arg(&system).arg(&root))?;
    fill(&root, programs, names)?;
    drop(fs::remove_file(disk));
    let mut make = Command::new(run::which("mkfs.ext4").context("there is no mkfs.ext4: install e2fsprogs")?);
    // Without a journal and without zeroing: it is used once.
    make.args(["-q", "-F", "-O", "^has_journal", "-E", "root_owner=0:0"]);
    run::output(make.arg("-d").arg(&root).arg(disk).arg("768M"))?;
    fs::remove_dir_all(&root).with_context(|| format!("removing {}", root.display()))
}

fn folder() -> Result<PathBuf> {
    Ok(workspace::cache()?.join("systemd"))
}

fn fetch(folder: &Path) -> Result<()> {
    let unpacked = folder.with_extension("part");
    drop(fs::remove_dir_all(&unpacked));
    // Directories of Debian 12's packages that have been links to those below usr since.
    for name in ["bin", "sbin", "lib", "lib64"] {
        let target = unpacked.join("usr").join(name);
        fs::create_dir_all(&target).with_context(|| format!("making {}", target.display()))?;
        symlink(format!("usr/{name}"), unpacked.join(name)).context("linking to usr")?;
    }
    PackageLists::default().unpack_with_dependencies(&PACKAGES, &unpacked)?;
    for name in FOLDERS {
        fs::create_dir_all(unpacked.join(name)).with_context(|| format!("making {name}"))?;
    }
    for (name, contents) in FILES {
        write(&unpacked.join(name), contents)?;
    }
    let shell = unpacked.join("bin/sh");
    if !shell.exists() {
        symlink("dash", &shell).context("linking sh to dash")?;
    }
    fs::rename(&unpacked, folder).with_context(|| format!("keeping {}", folder.display()))
}

/// Adds what is tested.
fn fill(root: &Path, programs: &Path, names: &[&str]) -> Result<()> {
    let local = root.join("usr/local/bin");
    fs::create_dir_all(&local).with_context(|| format!("making {}", local.display()))?;
    for name in names {
        copy(&programs.join(name), &local.join(name))?;
    }
    copy(&workspace::envoy()?, &local.join("envoy"))?;
    let deploy = root.join("root/deploy/systemd");
    fs::create_dir_all(&deploy).with_context(|| format!("making {}", deploy.display()))?;
    let sources = workspace::root().join("deploy/systemd");
    for entry in fs::read_dir(&sources).with_context(|| format!("reading {}", sources.display()))? {
        let entry = entry.context("reading deploy/systemd")?;
        copy(&entry.path(), &deploy.join(entry.file_name()))?;
    }
    write(&root.join("root/steps"), STEPS)?;
    let unit = root.join("etc/systemd/system/steps.service");
    write(&unit, UNIT)?;
    let wants = root.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants).with_context(|| format!("making {}", wants.display()))?;
    symlink("../steps.service", wants.join("steps.service")).context("enabling the unit")
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display())).map(drop)
}

fn write(path: &Path, contents: &str) -> Result<()> {
    fs::write(path, contents).with_context(|| format!("writing {}", path.display()))
}
