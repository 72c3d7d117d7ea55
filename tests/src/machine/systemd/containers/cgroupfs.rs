//! Containers whose cgroups are made without systemd.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use super::{Commands, PROXY, Runtime, images, replaced, start_docker};
use crate::machine::systemd::{SystemdCase, SystemdMachine, shell};

pub(in crate::machine::systemd) const CASES: [(&str, SystemdCase); 3] = [
    ("images are built", images),
    ("containers of Podman with cgroupfs are captured and released", podman),
    ("containers of Docker with cgroupfs are captured and released", docker),
];

const HEADING: &str = "### cgroupfs";

fn podman(machine: &mut SystemdMachine) -> Result<()> {
    fs::create_dir_all("/etc/containers/containers.conf.d").context("making a folder")?;
    let path = "/etc/containers/containers.conf.d/cgroupfs.conf";
    fs::write(path, "[engine]\ncgroup_manager = \"cgroupfs\"\n").context("writing Podman's configuration")?;
    let manager = shell("podman info --format '{{.Host.CgroupManager}}'")?;
    ensure!(manager.trim() == "cgroupfs", "Podman's cgroup manager is {manager}");
    let words = [&replaced(HEADING)?[..], &[("docker", "podman")]].concat();
    Commands::of("### Docker", &words)?.run(machine, &Runtime::PODMAN, PROXY)?;
    fs::remove_file(path).context("removing Podman's configuration")
}

fn docker(machine: &mut SystemdMachine) -> Result<()> {
    fs::create_dir_all("/etc/docker").context("making a folder")?;
    let path = "/etc/docker/daemon.json";
    fs::write(path, r#"{ "exec-opts": ["native.cgroupdriver=cgroupfs"] }"#)
        .context("writing Docker's configuration")?;
    start_docker(machine)?;
    let driver = shell("docker info --format '{{.CgroupDriver}}'")?;
    ensure!(driver.trim() == "cgroupfs", "Docker's driver is {driver}");
    Commands::of("### Docker", &replaced(HEADING)?)?.run(machine, &Runtime::DOCKER, PROXY)?;
    fs::remove_file(path).context("removing Docker's configuration")
}
