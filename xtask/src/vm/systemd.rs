//! deploy/systemd, SSH and containers on a Debian system whose first process is systemd, with a real Envoy.
//!
//! The system is made of Debian's packages, unpacked into the cache. Each run adds what is tested and makes a disk of it.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{initramfs::STEP, kernel::Kernel};
use crate::{debian::PackageLists, run, workspace};

/// Parameters of the kernel. Without a login prompt, which waits for udev.
pub(super) const PARAMETERS: &str =
    "systemd.unit=multi-user.target systemd.show_status=0 systemd.getty_auto=0";
/// The driver of the disk.
pub(super) const MODULES: [&str; 1] = ["virtio_blk"];
/// Leaves the initramfs.
pub(super) const SCRIPT: &str = include_str!("systemd/switch.sh");

/// What the documented commands and the units need. `apt` finds what these need.
const PACKAGES: [&str; 27] = [
    "aardvark-dns",
    "apparmor",
    "base-files",
    "busybox-static",
    "catatonit",
    "coreutils",
    "crun",
    "curl",
    "dash",
    "dbus",
    "dbus-user-session",
    "docker-compose",
    "docker.io",
    "iproute2",
    "iptables",
    "kmod",
    "libpam-systemd",
    "netavark",
    "openssh-server",
    "passwd",
    "podman",
    "python3",
    "sed",
    "slirp4netns",
    "systemd-sysv",
    "uidmap",
    "util-linux",
];
/// Where the system in the cache says what it was made of.
const CONTENTS: &str = "etc/intercept-contents";
/// What nothing here reads.
const UNUSED: [&str; 4] = ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info"];
/// Links of a configured Debian. Docker's socket is in /var/run.
const LINKS: [(&str, &str); 7] = [
    ("var/run", "/run"),
    ("usr/sbin/iptables", "xtables-nft-multi"),
    ("usr/sbin/iptables-save", "xtables-nft-multi"),
    ("usr/sbin/iptables-restore", "xtables-nft-multi"),
    ("usr/sbin/ip6tables", "xtables-nft-multi"),
    ("usr/sbin/ip6tables-save", "xtables-nft-multi"),
    ("usr/sbin/ip6tables-restore", "xtables-nft-multi"),
];
/// What a configured Debian has besides.
const FILES: [(&str, &str); 13] = [
    ("etc/passwd", include_str!("systemd/passwd")),
    ("etc/group", include_str!("systemd/group")),
    // With an empty one, systemd would enable all units.
    ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
    ("etc/hostname", "machine\n"),
    ("etc/hosts", "127.0.0.1 localhost machine\n"),
    ("etc/fstab", ""),
    ("etc/subuid", "user:100000:65536\n"),
    ("etc/subgid", "user:100000:65536\n"),
    // What PAM's services include: everyone may log in.
    ("etc/pam.d/common-account", "account required pam_permit.so\n"),
    ("etc/pam.d/common-auth", "auth required pam_permit.so\n"),
    ("etc/pam.d/common-password", "password required pam_permit.so\n"),
    ("etc/pam.d/common-session", "session required pam_permit.so\n"),
    ("etc/pam.d/common-session-noninteractive", "session required pam_permit.so\n"),
];
const FOLDERS: [&str; 8] = ["proc", "sys", "dev", "run", "tmp", "root", "home", "var/log/journal"];

/// The unit that runs the steps.
const UNIT: &str = include_str!("systemd/steps.service");
/// The suites of the demo, each a step.
const SUITES: [&str; 4] = ["units", "ssh", "containers", "families"];
/// Suites that run only when they are named: they take as long as all others.
const NAMED: [&str; 3] = ["compose", "rootless", "cgroupfs"];

/// What must be in the cache: the system, and Envoy.
pub(super) fn missing() -> Result<Vec<PathBuf>> {
    Ok([folder()?, workspace::envoy()?].into_iter().filter(|path| !path.exists()).collect())
}

/// Makes a disk with the system, the kernel's modules, what is tested, and a unit that runs the steps.
pub(super) fn disk(
    kernel: &Kernel,
    (programs, names): (&Path, &[&str]),
    suites: &[String],
    disk: &Path,
) -> Result<()> {
    let steps = steps(suites)?;
    let system = folder()?;
    // It may be of a version that tested less.
    if fs::read_to_string(system.join(CONTENTS)).unwrap_or_default() != contents() {
        fetch(&system).with_context(|| format!("getting {}", PACKAGES.join(", ")))?;
    }
    let root = disk.with_extension("root");
    drop(fs::remove_dir_all(&root));
    run::output(Command::new("cp").args(["-a", "--reflink=auto"]).arg(&system).arg(&root))?;
    fill(&root, (programs, names), &steps)?;
    let modules = root.join("usr/lib/modules");
    fs::create_dir_all(&modules).with_context(|| format!("making {}", modules.display()))?;
    run::output(Command::new("cp").args(["-a", "--reflink=auto"]).arg(&kernel.modules).arg(&modules))?;
    drop(fs::remove_file(disk));
    let mut make = Command::new(run::which("mkfs.ext4").context("there is no mkfs.ext4: install e2fsprogs")?);
    // Without a journal and without zeroing: it is used once.
    make.args(["-q", "-F", "-O", "^has_journal", "-E", "root_owner=0:0"]);
    run::output(make.arg("-d").arg(&root).arg(disk).arg("3G"))?;
    fs::remove_dir_all(&root).with_context(|| format!("removing {}", root.display()))
}

fn folder() -> Result<PathBuf> {
    Ok(workspace::cache()?.join("systemd"))
}

/// The packages, links and files of the system.
fn contents() -> String {
    let files = FILES.iter().flat_map(|(name, contents)| [*name, *contents]);
    PACKAGES
        .iter()
        .copied()
        .chain(LINKS.iter().map(|(name, _)| *name))
        .chain(files)
        .collect::<Vec<_>>()
        .join("\n")
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
    for name in UNUSED {
        fs::remove_dir_all(unpacked.join(name)).with_context(|| format!("removing {name}"))?;
    }
    let shell = unpacked.join("bin/sh");
    if !shell.exists() {
        symlink("dash", &shell).context("linking sh to dash")?;
    }
    // It is an empty folder in the package.
    fs::remove_dir(unpacked.join("var/run")).context("removing var/run")?;
    for (name, target) in LINKS {
        symlink(target, unpacked.join(name)).with_context(|| format!("linking {name} to {target}"))?;
    }
    write(&unpacked.join(CONTENTS), &contents())?;
    drop(fs::remove_dir_all(folder));
    fs::rename(&unpacked, folder).with_context(|| format!("keeping {}", folder.display()))
}

/// The script that runs these suites, or those that need not be named.
fn steps(suites: &[String]) -> Result<String> {
    let known = |suite: &str| SUITES.iter().chain(&NAMED).any(|name| *name == suite);
    if let Some(unknown) = suites.iter().find(|suite| !known(suite)) {
        bail!("there is no suite {unknown}; there are {}", [&SUITES[..], &NAMED].concat().join(", "));
    }
    let selected = if suites.is_empty() { SUITES.map(str::to_owned).to_vec() } else { suites.to_vec() };
    let steps: String = selected.iter().map(|name| format!("step {name} demo --systemd {name}\n")).collect();
    Ok(format!("{STEP}step kernel uname -r\n{steps}echo \"xtask: done\"\n"))
}

/// Adds what is tested.
fn fill(root: &Path, (programs, names): (&Path, &[&str]), steps: &str) -> Result<()> {
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
    write(&root.join("root/steps"), steps)?;
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
