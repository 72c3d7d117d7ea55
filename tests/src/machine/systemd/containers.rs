//! Pods and containers of Podman and Docker, with the documented commands. Images are built from files of the machine.

pub(super) mod cgroupfs;
pub(super) mod compose;
pub(super) mod families;
mod pod;
pub(super) mod rootless;

use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use self::pod::RuntimePod;
use super::{SystemdCase, SystemdMachine, documented, section, shell};
use crate::{bpf::links, machine::difference, snapshot::tree};

pub(super) const CASES: [(&str, SystemdCase); 4] = [
    ("images are built", images),
    ("a pod of Podman is captured and released", podman_pod),
    ("containers of Podman that share a network are captured and released", podman_containers),
    ("containers of Docker are captured and released", docker),
];

/// Builds the images that the documentation names. An emulator takes minutes to pack Envoy into one, so Envoy is in the folder
/// of its configuration, which is mounted.
const IMAGES: &str = r#"
mkdir -p /etc/istio-proxy /run/envoy/lib64 /run/envoy/lib/x86_64-linux-gnu /run/app/bin /run/app/www
cp deploy/systemd/envoy.yaml /etc/istio-proxy/envoy.yaml
ln -f /usr/local/bin/envoy /etc/istio-proxy/envoy
cp -L /lib64/ld-linux-x86-64.so.2 /run/envoy/lib64/
for name in m rt dl pthread c; do cp -L /lib/x86_64-linux-gnu/lib$name.so.? /run/envoy/lib/x86_64-linux-gnu/; done
cat > /run/envoy.container << 'END'
FROM scratch
COPY . /
CMD ["/etc/envoy/envoy", "-c", "/etc/envoy/envoy.yaml", "--log-level", "warning", "--file-flush-interval-msec", "1000"]
END
cp /bin/busybox /run/app/bin/busybox
printf app > /run/app/www/index.html
cat > /run/app.container << 'END'
FROM scratch
COPY . /
ENV PATH=/bin
STOPSIGNAL SIGKILL
CMD ["busybox", "httpd", "-f", "-v", "-p", "8080", "-h", "/www"]
END
"#;
const ENVOY: &str = "envoyproxy/envoy:v1.31-latest";
const APP: &str = "example/app";
/// Prints the container that has a pod's network.
const INFRA: &str = "podman pod inspect app --format '{{.InfraContainerID}}'";
/// Prints the container that has the network that containers share.
const PROXY: &str = "echo app-proxy";

/// Removes what a suite that failed has left.
const CLEAN: &str = "rm -f /etc/docker/daemon.json /etc/containers/containers.conf.d/cgroupfs.conf
intercept-agent detach --all
! test -e /run/as-user || /run/as-user podman pod rm -fa
podman pod rm -fa
podman rm -fi app-main
podman rm -fa
! systemctl -q is-active docker || docker rm -f app-main app-proxy || true";

fn images(_: &mut SystemdMachine) -> Result<()> {
    shell(CLEAN)?;
    if shell(&format!("podman image exists {APP}")).is_ok() {
        return Ok(());
    }
    shell(IMAGES)?;
    for (image, name) in [(ENVOY, "envoy"), (APP, "app")] {
        shell(&format!("podman build -q -t {image} -f /run/{name}.container /run/{name}"))?;
    }
    Ok(())
}

/// Starts Docker, with the images.
fn start_docker(_: &mut SystemdMachine) -> Result<()> {
    // If Docker has to enable forwarding, it drops what is forwarded to other networks, such as those of Podman.
    shell("echo 1 > /proc/sys/net/ipv4/ip_forward; systemctl restart docker")?;
    if shell(&format!("docker image inspect {APP}")).is_ok() {
        return Ok(());
    }
    for image in [ENVOY, APP] {
        shell(&format!("podman save -q {image} | docker load -q"))?;
        // Podman's local images have a host name.
        shell(&format!("docker tag localhost/{image} {image}"))?;
    }
    Ok(())
}

fn podman_pod(machine: &mut SystemdMachine) -> Result<()> {
    Commands::of("### Podman", &[])?.run(machine, &Runtime::PODMAN, INFRA)
}

fn podman_containers(machine: &mut SystemdMachine) -> Result<()> {
    Commands::of("### Docker", &[("docker", "podman")])?.run(machine, &Runtime::PODMAN, PROXY)
}

fn docker(machine: &mut SystemdMachine) -> Result<()> {
    start_docker(machine)?;
    Commands::of("### Docker", &[])?.run(machine, &Runtime::DOCKER, PROXY)
}

/// What runs containers, and what a client outside looks like to these.
struct Runtime {
    command: &'static str,
    /// Of each family that the containers have, the source of connections from outside.
    clients: &'static [&'static str],
}

impl Runtime {
    const PODMAN: Self = Self { command: "podman", clients: &["10.66.0.1"] };
    const DOCKER: Self = Self { command: "docker", clients: &["10.66.0.1"] };
}

/// The commands of a section.
struct Commands {
    /// Makes the network and the cgroup.
    create: String,
    attach: String,
    /// Starts what is not started yet.
    start: String,
    detach: String,
    remove: String,
}

impl Commands {
    /// With words that are replaced, one after the other.
    fn of(heading: &str, replaced: &[(&str, &str)]) -> Result<Self> {
        let replace = |block: &&str| {
            replaced.iter().fold((*block).to_owned(), |block, (from, to)| block.replace(from, to))
        };
        let blocks: Vec<_> = documented(heading)?.iter().map(replace).collect();
        let [create, attach, start, detach, remove] =
            blocks.try_into().ok().with_context(|| format!("{heading} does not have five blocks"))?;
        Ok(Self { create, attach, start, detach, remove })
    }

    /// Captures and releases. `owner` prints the container that has the network.
    fn run(&self, machine: &SystemdMachine, runtime: &'static Runtime, owner: &str) -> Result<()> {
        let pins_before = pins()?;
        let (mut pod, before) = self.create(runtime, owner)?;
        self.capture(&mut pod, machine)?;
        shell(&self.detach)?;
        let left = difference(&before, &pod.state()?);
        ensure!(left.is_empty(), "left in the pod: {left:#?}");
        pod.direct(machine)?;
        shell(&self.remove)?;
        let left = difference(&pins_before, &pins()?);
        ensure!(left.is_empty(), "left: {left:#?}");
        Ok(())
    }

    /// Makes the pod. Returns it with its state.
    fn create(&self, runtime: &'static Runtime, owner: &str) -> Result<(RuntimePod, Vec<String>)> {
        shell(&self.create)?;
        let pod = RuntimePod::of(runtime, owner)?;
        let before = pod.state()?;
        Ok((pod, before))
    }

    /// Attaches, starts the rest, and makes connections.
    fn capture(&self, pod: &mut RuntimePod, machine: &SystemdMachine) -> Result<()> {
        let before = pod.state()?;
        let said = shell(&self.attach)?;
        ensure!(said.contains("attached cgroup"), "{said}");
        ensure!(pod.state()? != before, "the attach has changed nothing");
        shell(&self.start)?;
        pod.flows(machine)
    }
}

/// The rows of a section's table: what is to be replaced by what.
fn replaced(heading: &str) -> Result<Vec<(&'static str, &'static str)>> {
    let rows = section(heading)?.lines().filter_map(|line| {
        let (from, to) = line.strip_prefix("| `")?.strip_suffix("` |")?.split_once("` | `")?;
        Some((from, to))
    });
    let rows: Vec<_> = rows.collect();
    ensure!(!rows.is_empty(), "{heading} has no rows of what is to be replaced");
    Ok(rows)
}

/// Pins and links of the agent.
fn pins() -> Result<Vec<String>> {
    let mut lines: Vec<_> = links()?.into_iter().map(|id| format!("link {id}")).collect();
    lines.extend(tree(Path::new("/sys/fs/bpf"))?.into_iter().map(|(path, _)| path.display().to_string()));
    Ok(lines)
}
