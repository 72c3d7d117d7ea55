//! Pods and containers of Podman and Docker, with the documented commands. Images are built from files of the machine.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::{
    OWN, SERVICE, SystemdCase, SystemdMachine, WORLD, connections, difference, documented, logged, shell,
    until,
};
use crate::{bpf::links, snapshot::tree};

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
ln /usr/local/bin/envoy /etc/istio-proxy/envoy
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

fn images(_: &mut SystemdMachine) -> Result<()> {
    shell(IMAGES)?;
    for (image, name) in [(ENVOY, "envoy"), (APP, "app")] {
        shell(&format!("podman build -q -t {image} -f /run/{name}.container /run/{name}"))?;
    }
    Ok(())
}

fn podman_pod(machine: &mut SystemdMachine) -> Result<()> {
    let commands = Commands::of("### Podman", "podman")?;
    commands.run(machine, "podman pod inspect app --format '{{.InfraContainerID}}'")
}

fn podman_containers(machine: &mut SystemdMachine) -> Result<()> {
    Commands::of("### Docker", "podman")?.run(machine, "echo app-proxy")
}

fn docker(machine: &mut SystemdMachine) -> Result<()> {
    shell("systemctl start docker")?;
    for image in [ENVOY, APP] {
        shell(&format!("podman save -q {image} | docker load -q"))?;
        // Podman's local images have a host name.
        shell(&format!("docker tag localhost/{image} {image}"))?;
    }
    Commands::of("### Docker", "docker")?.run(machine, "echo app-proxy")
}

/// The commands of a section.
struct Commands {
    runtime: &'static str,
    /// Makes the network and the cgroup.
    create: String,
    attach: String,
    /// Starts what is not started yet.
    start: String,
    detach: String,
    remove: String,
}

impl Commands {
    fn of(heading: &str, runtime: &'static str) -> Result<Self> {
        let blocks: Vec<_> =
            documented(heading)?.iter().map(|block| block.replace("docker", runtime)).collect();
        let [create, attach, start, detach, remove] =
            blocks.try_into().ok().with_context(|| format!("{heading} does not have five blocks"))?;
        Ok(Self { runtime, create, attach, start, detach, remove })
    }

    /// Captures and releases. `owner` prints the container that has the network.
    fn run(&self, machine: &SystemdMachine, owner: &str) -> Result<()> {
        let runtime = self.runtime;
        let pins_before = pins()?;
        shell(&self.create)?;
        let pid = shell(&format!("{runtime} inspect --format '{{{{.State.Pid}}}}' $({owner})"))?;
        let mut pod = RuntimePod { runtime, pid: pid.trim().to_owned(), address: String::new(), read: 0 };
        let before = pod.state()?;
        shell(&self.attach)?;
        ensure!(pod.state()? != before, "the attach has changed nothing");
        shell(&self.start)?;
        let address = format!("{runtime} inspect --format '{{{{.NetworkSettings.IPAddress}}}}' app-proxy");
        shell(&address)?.trim().clone_into(&mut pod.address);
        pod.flows(machine)?;
        shell(&self.detach)?;
        let left = difference(&before, &pod.state()?);
        ensure!(left.is_empty(), "left in the pod: {left:#?}");
        pod.direct(machine)?;
        shell(&self.remove)?;
        let left = difference(&pins_before, &pins()?);
        ensure!(left.is_empty(), "left: {left:#?}");
        Ok(())
    }
}

/// Pins and links of the agent.
fn pins() -> Result<Vec<String>> {
    let mut lines: Vec<_> = links()?.into_iter().map(|id| format!("link {id}")).collect();
    lines.extend(tree(Path::new("/sys/fs/bpf"))?.into_iter().map(|(path, _)| path.display().to_string()));
    Ok(lines)
}

/// The application and its proxy.
struct RuntimePod {
    runtime: &'static str,
    /// A process in its network.
    pid: String,
    address: String,
    /// Lines of Envoy's log that were compared.
    read: usize,
}

impl RuntimePod {
    /// Runs a command in the pod's network.
    fn inside(&self, command: &str) -> Result<String> {
        shell(&format!("nsenter --net=/proc/{}/ns/net {command}", self.pid))
    }

    /// What a capture may change in its network, and pins and links.
    fn state(&self) -> Result<Vec<String>> {
        let mut lines = pins()?;
        let routes = ["-4 route show table all", "-6 route show table all"];
        for what in ["addr", "link", "-4 rule", "-6 rule"].iter().chain(&routes) {
            let said = self.inside(&format!("ip {what}"))?;
            let lasting = said.lines().filter(|line| !line.contains("valid_lft"));
            // Duplicate address detection ends meanwhile.
            lines.extend(lasting.map(|line| format!("{what}: {}", line.replace(" tentative", "").trim())));
        }
        Ok(lines)
    }

    /// Makes a request from the application's container.
    fn call(&self, user: &str) -> Result<()> {
        // busybox's wget crashes in an emulator.
        let script = format!(
            "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | {} exec -i {user} app-main busybox nc -w 20 {} 80",
            self.runtime, SERVICE[0]
        );
        let said = shell(&script)?;
        ensure!(said.ends_with("\r\n\r\nworld"), "{script}: got {said:?}");
        Ok(())
    }

    /// Calls the application from outside, where its port is published.
    fn called(&self, machine: &SystemdMachine) -> Result<()> {
        let page = machine.world_gets(&format!("http://{}:8080/", OWN[0]))?;
        ensure!(page == "app", "the application answered {page:?}");
        Ok(())
    }

    /// Prints Envoy's log.
    fn log(&self) -> String {
        // Docker and Podman print what a container writes to stderr to theirs.
        format!("{} logs app-proxy 2>&1", self.runtime)
    }

    fn logged(&mut self, what: &str, line: String) -> Result<()> {
        self.read += logged(&self.log(), self.read, what, &[line])?;
        Ok(())
    }

    /// The last request that the application logged came from this address.
    fn served(&self, client: &str) -> Result<()> {
        until(&format!("a request of {client}"), || {
            let log = shell(&format!("{} logs app-main 2>&1", self.runtime))?;
            let last = log.lines().rfind(|line| line.contains("response:"));
            Ok(last.filter(|line| line.contains(&format!("{client}]:"))).map(drop))
        })
    }

    fn flows(&mut self, machine: &SystemdMachine) -> Result<()> {
        for port in [15001, 15006, 8080] {
            until(&format!("a listener on {port}"), || {
                let listening = self.inside("ss -Hltn")?;
                Ok(listening.contains(&format!(":{port} ")).then_some(()))
            })?;
        }
        let address = self.address.clone();
        let outbound = format!("outbound {address} to {}:80", SERVICE[0]);
        self.call("")?;
        self.logged("the application calls", outbound.clone())?;
        self.called(machine)?;
        self.logged("the world calls", format!("inbound {} to {address}:8080", WORLD[0]))?;
        self.served("127.0.0.6")?;
        // What Envoy logs next is of the application, not of the proxy's user.
        self.call("--user 1337")?;
        self.call("")?;
        self.logged("the proxy's user and the application call", outbound)
    }

    /// Nothing goes through the proxy.
    fn direct(&self, machine: &SystemdMachine) -> Result<()> {
        self.call("")?;
        self.called(machine)?;
        self.served(WORLD[0])?;
        let count = connections(&self.log())?.len();
        ensure!(count == self.read, "Envoy logged {count} connections, {} before", self.read);
        Ok(())
    }
}
