//! A pod of a user, of rootless Podman: its cgroup is below the user's, and its network is of the user's namespace.

use std::{fs, os::unix::fs::PermissionsExt as _};

use anyhow::{Context as _, Result};

use super::{APP, Commands, ENVOY, Runtime, images};
use crate::machine::systemd::{SystemdCase, SystemdMachine, shell, until};

pub(in crate::machine::systemd) const CASES: [(&str, SystemdCase); 3] = [
    ("images are built", images),
    ("a user has Podman", login),
    ("a pod of a user is captured and released", pod),
];

/// Runs a command as the user, in a scope of the user's systemd, as from a login.
const AS_USER: &str = "/run/as-user";
const SCRIPT: &str = "#!/bin/sh
cd /home/user
exec setpriv --reuid=1000 --regid=1000 --clear-groups env HOME=/home/user USER=user XDG_RUNTIME_DIR=/run/user/1000 \\
    DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/1000/bus systemd-run --user --scope --quiet \"$@\"
";
/// slirp4netns keeps the source of connections from outside.
const ROOTLESS: Runtime = Runtime { command: AS_USER_PODMAN, clients: &["10.66.0.1"] };
const AS_USER_PODMAN: &str = "/run/as-user podman";
const INFRA: &str = "/run/as-user podman pod inspect app --format '{{.InfraContainerID}}'";

fn login(_: &mut SystemdMachine) -> Result<()> {
    fs::write(AS_USER, SCRIPT).context("writing a script")?;
    fs::set_permissions(AS_USER, fs::Permissions::from_mode(0o755)).context("making it executable")?;
    // udev, which this machine does not have, would give the device to all users.
    shell("modprobe tun; chmod 666 /dev/net/tun; install -d -o user -g user /home/user")?;
    shell("systemctl start user@1000.service")?;
    until("the user's bus", || Ok(fs::exists("/run/user/1000/bus")?.then_some(())))?;
    for image in [ENVOY, APP] {
        shell(&format!("podman save -q {image} | {AS_USER_PODMAN} load -q"))?;
    }
    Ok(())
}

fn pod(machine: &mut SystemdMachine) -> Result<()> {
    let words = [("podman ", "/run/as-user podman ")];
    Commands::of("### Rootless Podman", &words)?.run(machine, &ROOTLESS, INFRA)
}
