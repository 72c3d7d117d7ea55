//! Services of Compose, with the documented file and commands.

use std::fs;

use anyhow::{Context as _, Result};

use super::{APP, Commands, ENVOY, PROXY, Runtime, images, start_docker};
use crate::machine::systemd::{SystemdCase, SystemdMachine, blocks, section, shell};

pub(in crate::machine::systemd) const CASES: [(&str, SystemdCase); 3] = [
    ("images are built", images),
    ("services of Compose are captured and released with Podman", podman),
    ("services of Compose are captured and released with Docker", docker),
];

const HEADING: &str = "### Compose";
/// Debian 12 has the Compose that is a program of its own. In an emulator a start takes longer than a minute.
const PROGRAM: (&str, &str) = ("docker compose", "COMPOSE_HTTP_TIMEOUT=600 docker-compose");

fn write_file() -> Result<()> {
    let files = blocks(section(HEADING)?, "yaml").context("a block has no end")?;
    let [file] = files.try_into().ok().context("one file is not documented")?;
    fs::write("/root/compose.yaml", file).context("writing compose.yaml")
}

fn docker(machine: &mut SystemdMachine) -> Result<()> {
    write_file()?;
    start_docker(machine)?;
    Commands::of(HEADING, &[PROGRAM])?.run(machine, &Runtime::DOCKER, PROXY)?;
    shell("systemctl stop docker.service docker.socket").map(drop)
}

fn podman(machine: &mut SystemdMachine) -> Result<()> {
    write_file()?;
    shell("systemctl start podman.socket")?;
    // What Compose names is of Docker's registry.
    shell(&format!(
        "podman tag localhost/{ENVOY} docker.io/{ENVOY}; podman tag localhost/{APP} docker.io/{APP}:latest"
    ))?;
    let words = [
        PROGRAM,
        ("docker inspect", "podman inspect"),
        ("docker-compose", "DOCKER_HOST=unix:///run/podman/podman.sock docker-compose"),
    ];
    Commands::of(HEADING, &words)?.run(machine, &Runtime::PODMAN, PROXY)
}
