//! Both families in containers.

use std::fs;

use anyhow::{Context as _, Result};

use super::{Commands, INFRA, PROXY, Runtime, images, replaced, start_docker};
use crate::machine::systemd::{SystemdCase, SystemdMachine, documented, shell};

pub(in crate::machine::systemd) const CASES: [(&str, SystemdCase); 3] = [
    ("images are built", images),
    ("both families of a pod of Podman are captured and released", podman_v6),
    ("both families of containers of Docker are captured and released", docker_v6),
];

const IPV6: &str = "### IPv6";
const PODMAN_V6: Runtime = Runtime { command: "podman", clients: &["10.66.0.1", "[fd66::1]"] };
const DOCKER_V6: Runtime = Runtime { command: "docker", clients: &["10.66.0.1", "[fd66::1]"] };

/// The commands that make a network, of Podman and Docker.
fn networks() -> Result<[&'static str; 2]> {
    documented(IPV6)?.try_into().ok().context("two networks are not documented")
}

fn podman_v6(machine: &mut SystemdMachine) -> Result<()> {
    let [podman, _] = networks()?;
    shell(podman)?;
    Commands::of("### Podman", &replaced(IPV6)?)?.run(machine, &PODMAN_V6, INFRA)?;
    shell("podman network rm mesh").map(drop)
}

fn docker_v6(machine: &mut SystemdMachine) -> Result<()> {
    // What Docker needed for it before version 27.
    let configuration = r#"{ "experimental": true, "ip6tables": true }"#;
    fs::create_dir_all("/etc/docker").context("making a folder")?;
    fs::write("/etc/docker/daemon.json", configuration).context("writing Docker's configuration")?;
    start_docker(machine)?;
    let [_, docker] = networks()?;
    shell(docker)?;
    Commands::of("### Docker", &replaced(IPV6)?)?.run(machine, &DOCKER_V6, PROXY)?;
    shell("docker network rm mesh")?;
    fs::remove_file("/etc/docker/daemon.json").context("removing Docker's configuration")
}
