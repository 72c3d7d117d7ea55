//! The distribution's packages.

use std::{env, process::Command};

use anyhow::{Context, Result, bail};

use super::Group;
use crate::{architecture::Architecture, run};

/// The emulator of this machine's own architecture, and its package.
const EMULATOR: (&str, &str) = match Architecture::HOST {
    Architecture::Amd64 => ("qemu-system-x86_64", "qemu-system-x86"),
    Architecture::Arm64 => ("qemu-system-aarch64", "qemu-system-arm"),
};

/// Which group needs which program or file, and the package of Debian and its descendants that has it.
const PROGRAMS: [(Group, &str, &str); 28] = [
    (Group::Test, "dig", "dnsutils"),
    (Group::Test, "dnsmasq", "dnsmasq-base"),
    (Group::Test, "ip", "iproute2"),
    (Group::Test, "ip6tables-restore", "iptables"),
    (Group::Test, "iptables-restore", "iptables"),
    (Group::Test, "nft", "nftables"),
    (Group::Test, "strace", "strace"),
    (Group::Envoy, "python3", "python3"),
    (Group::Vm, "busybox", "busybox-static"),
    (Group::Vm, "depmod", "kmod"),
    (Group::Vm, EMULATOR.0, EMULATOR.1),
    (Group::Vm, "xz", "xz-utils"),
    (Group::Amd64, "/usr/x86_64-linux-gnu/lib/libc.a", "libc6-dev-amd64-cross"),
    (Group::Amd64, "qemu-system-x86_64", "qemu-system-x86"),
    (Group::Amd64, "x86_64-linux-gnu-gcc", "gcc-x86-64-linux-gnu"),
    (Group::Arm64, "/usr/aarch64-linux-gnu/lib/libc.a", "libc6-dev-arm64-cross"),
    (Group::Arm64, "aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    (Group::Arm64, "qemu-system-aarch64", "qemu-system-arm"),
    (Group::Cri, "busybox", "busybox-static"),
    (Group::Cri, "ip", "iproute2"),
    (Group::Cri, "python3", "python3"),
    (Group::Kube, "dpkg-source", "dpkg-dev"),
    (Group::Kube, "openssl", "openssl"),
    (Group::Fuzz, "c++", "g++"),
    (Group::Bench, "h2load", "nghttp2-client"),
    (Group::Bench, "ip", "iproute2"),
    (Group::Bench, "iperf3", "iperf3"),
    (Group::Bench, "wrk", "wrk"),
];

/// The packages whose programs are not here, each once.
pub(super) fn missing(groups: &[Group]) -> Vec<&'static str> {
    let mut packages: Vec<_> = PROGRAMS
        .iter()
        .filter(|(group, program, _)| groups.contains(group) && run::which(program).is_none())
        .map(|(_, _, package)| *package)
        .collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// Installs the packages, as root; otherwise says what to run.
pub(super) fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let names = packages.join(" ");
    if run::which("apt-get").is_none() {
        bail!(
            "installing {names}: there is no apt-get here; install what corresponds to these packages of Debian"
        );
    }
    if !rustix::process::geteuid().is_root() {
        bail!("installing {names}: not root; run: sudo apt-get install --no-install-recommends {names}");
    }
    run::quietly("updating the lists of packages", &mut apt("update"))?;
    let mut command = apt("install");
    command.args(["--yes", "--no-install-recommends"]);
    // What else a person's machine has is not ours to take away.
    if env::var_os("CI").is_none() {
        command.arg("--no-remove");
    }
    run::quietly(&format!("installing {names}"), command.args(packages)).with_context(|| {
        format!(
            "installing packages; to decide by hand, run: apt-get install --no-install-recommends {names}"
        )
    })
}

/// `apt-get SUBCOMMAND`, which asks nothing and waits for another apt to finish.
pub(crate) fn apt(subcommand: &str) -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").arg(subcommand);
    apt.args(["-q", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3"]);
    apt
}
