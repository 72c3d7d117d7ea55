//! Runs the pod of the DaemonSet in deploy/ on a runtime, as a kubelet does.
//!
//! Resource limits are left out. There is no API: connections to it are refused.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{Container, EnvVar, HTTPGetAction, PodSpec, Volume},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::{
    client::{CriClient, PodConfig, PodSandbox, log, uid, wait},
    messages as m,
    node::CriNode,
};

/// Paths that are masked in every container whose procMount is not Unmasked.
const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

const NODE_NAME: &str = "node-1";
/// The address of the API, where nothing listens.
const API: [(&str, &str); 2] =
    [("KUBERNETES_SERVICE_HOST", "127.0.0.1"), ("KUBERNETES_SERVICE_PORT", "6443")];
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// A certificate without a key.
const CA: &str = include_str!("ca.crt");

/// The pod, whose one container may run.
#[derive(Debug)]
pub struct DaemonPod<'a> {
    node: &'a CriNode,
    client: &'a CriClient,
    name: String,
    spec: PodSpec,
    sandbox: PodSandbox,
    attempt: u32,
    /// The container, and the name of its log.
    running: Option<(String, String)>,
}

impl<'a> DaemonPod<'a> {
    /// Runs the pod of a DaemonSet in a file: its init containers to their ends, then its container.
    pub fn start(node: &'a CriNode, client: &'a CriClient, manifest: &Path, name: &str) -> Result<Self> {
        let spec = read(manifest)?;
        ensure!(spec.containers.len() == 1, "{} has several containers", manifest.display());
        let cgroup = node.make_pod_cgroup(&uid(name))?;
        let mut config = PodConfig::new(name, &cgroup, &node.logs().join(name), &[]);
        config.share(namespaces(&spec));
        let sandbox = client.run(&config)?;
        let mut pod = Self { node, client, name: name.to_owned(), spec, sandbox, attempt: 0, running: None };
        for container in pod.spec.init_containers.clone().unwrap_or_default() {
            let id = pod.start_container(&container)?;
            let code = client.wait_for_end(&id)?;
            ensure!(code == 0, "{}: {code}: {}", container.name, log(&pod.sandbox, &container.name)?);
        }
        pod.restart()?;
        Ok(pod)
    }

    /// Starts its container and waits until it is ready.
    pub fn restart(&mut self) -> Result<()> {
        ensure!(self.running.is_none(), "it runs");
        let container = self.container().clone();
        let id = self.start_container(&container)?;
        self.running = Some((id, log_name(&container, self.attempt)));
        let probe = container.readiness_probe.as_ref().and_then(|probe| probe.http_get.as_ref());
        let probe = probe.context("it has no probe of readiness")?;
        wait("the daemon is ready", || Ok(self.probe(probe).is_ok_and(|status| status == 200)))
            .with_context(|| self.log())
    }

    /// Kills the container, as when memory is short. The kubelet then creates another.
    pub fn kill(&mut self) -> Result<()> {
        self.end(0)
    }

    /// Runs the preStop hook, then ends the container and the pod.
    pub fn delete(mut self) -> Result<()> {
        let lifecycle = self.container().lifecycle.clone();
        if let Some(handler) = lifecycle.and_then(|lifecycle| lifecycle.pre_stop) {
            let (id, _) = self.running.as_ref().context("it does not run")?;
            let command = handler.exec.and_then(|exec| exec.command).context("no command")?;
            let (code, said) = self.client.exec(id, &command)?;
            ensure!(code == 0, "{command:?}: {code}: {said}\n{}", self.log());
        }
        self.end(self.spec.termination_grace_period_seconds.context("no time to end")?)?;
        self.client.stop(&self.sandbox)?;
        self.client.remove(&self.sandbox)?;
        self.node.remove_pod_cgroup(&uid(&self.name))
    }

    /// The log of the running container.
    pub fn log(&self) -> String {
        let name = self.running.as_ref().map_or("", |(_, name)| name);
        log(&self.sandbox, name).unwrap_or_else(|error| format!("{error:#}"))
    }

    fn end(&mut self, grace: i64) -> Result<()> {
        let (id, _) = self.running.take().context("it does not run")?;
        self.client.stop_container(&id, grace)?;
        self.attempt += 1;
        self.client.remove_container(&id)
    }

    fn container(&self) -> &Container {
        &self.spec.containers[0]
    }

    fn probe(&self, probe: &HTTPGetAction) -> Result<u16> {
        let port = match &probe.port {
            IntOrString::Int(port) => *port,
            IntOrString::String(name) => {
                let mut ports = self.container().ports.iter().flatten();
                let port = ports.find(|port| port.name.as_ref() == Some(name));
                port.with_context(|| format!("no port {name}"))?.container_port
            }
        };
        let host = probe.host.as_deref().context("no host")?;
        let address = format!("{host}:{port}");
        let mut stream = self.node.sandbox().netns.run(|| TcpStream::connect(address))??;
        let path = probe.path.as_deref().unwrap_or("/");
        write!(stream, "GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.split(' ').nth(1).context("no status")?.parse()?)
    }

    fn start_container(&self, container: &Container) -> Result<String> {
        let image = container.image.as_deref().context("no image")?;
        self.client.wait_for_image(image)?;
        let mut mounts = Vec::new();
        for mount in container.volume_mounts.iter().flatten() {
            let volumes = self.spec.volumes.iter().flatten();
            let volume = volumes.into_iter().find(|volume| volume.name == mount.name);
            let host = self.host_path(volume.with_context(|| format!("no volume {}", mount.name))?)?;
            mounts.push(m::Mount {
                container_path: mount.mount_path.clone(),
                host_path: host.display().to_string(),
                readonly: mount.read_only.unwrap_or_default(),
                propagation: match mount.mount_propagation.as_deref() {
                    None | Some("None") => 0,
                    Some("HostToContainer") => 1,
                    Some("Bidirectional") => 2,
                    Some(other) => bail!("mountPropagation {other}"),
                },
            });
        }
        let mut envs = Vec::new();
        for variable in container.env.iter().flatten() {
            envs.push(m::KeyValue { key: variable.name.clone(), value: value(variable)? });
        }
        if self.spec.automount_service_account_token != Some(false) {
            mounts.push(self.account()?);
        }
        envs.extend(API.map(|(key, value)| m::KeyValue { key: key.to_owned(), value: value.to_owned() }));
        let config = m::ContainerConfig {
            metadata: Some(m::ContainerMetadata { name: container.name.clone(), attempt: self.attempt }),
            image: Some(m::ImageSpec { image: image.to_owned() }),
            command: container.command.clone().unwrap_or_default(),
            args: container.args.clone().unwrap_or_default(),
            envs,
            mounts,
            log_path: format!("{}.log", log_name(container, self.attempt)),
            linux: Some(m::LinuxContainerConfig { security_context: Some(self.security(container)?) }),
        };
        self.client.start_container(&self.sandbox, config)
    }

    fn security(&self, container: &Container) -> Result<m::LinuxContainerSecurityContext> {
        let security = container.security_context.clone().unwrap_or_default();
        ensure!(security.privileged != Some(true), "{} is privileged", container.name);
        let capabilities = security.capabilities.unwrap_or_default();
        Ok(m::LinuxContainerSecurityContext {
            capabilities: Some(m::Capability {
                add: capabilities.add.unwrap_or_default(),
                drop: capabilities.drop.unwrap_or_default(),
            }),
            namespaces: Some(namespaces(&self.spec)),
            run_as_user: security.run_as_user.map(|value| m::Int64Value { value }),
            run_as_group: security.run_as_group.map(|value| m::Int64Value { value }),
            readonly_root: security.read_only_root_filesystem.unwrap_or_default(),
            no_new_privileges: security.allow_privilege_escalation == Some(false),
            masked_paths: MASKED.map(str::to_owned).to_vec(),
            readonly_paths: READONLY.map(str::to_owned).to_vec(),
            seccomp: Some(m::SecurityProfile { profile_type: self.seccomp(container)? }),
        })
    }

    /// The container's own profile, else the pod's; without one everything is allowed.
    fn seccomp(&self, container: &Container) -> Result<i32> {
        let own = container.security_context.as_ref().and_then(|security| security.seccomp_profile.as_ref());
        let pods = self.spec.security_context.as_ref().and_then(|security| security.seccomp_profile.as_ref());
        match own.or(pods).map(|profile| profile.type_.as_str()) {
            Some("RuntimeDefault") => Ok(m::RUNTIME_DEFAULT),
            None | Some("Unconfined") => Ok(m::UNCONFINED),
            Some(other) => bail!("seccompProfile {other}"),
        }
    }

    fn host_path(&self, volume: &Volume) -> Result<PathBuf> {
        let source =
            volume.host_path.as_ref().with_context(|| format!("volume {} is no path", volume.name))?;
        let path = self.node.host_path(Path::new(&source.path));
        let mut test = match source.type_.as_deref() {
            Some("Directory") => self.node.command("test")?,
            Some("DirectoryOrCreate") => self.node.command("mkdir")?,
            other => bail!("volume {} is of type {other:?}", volume.name),
        };
        test.arg(if source.type_.as_deref() == Some("Directory") { "-d" } else { "-p" }).arg(&path);
        crate::agent::succeed(test).with_context(|| format!("volume {}", volume.name))?;
        Ok(path)
    }

    /// The folder of its service account.
    fn account(&self) -> Result<m::Mount> {
        let folder = self.node.logs().join("account");
        fs::create_dir_all(&folder)?;
        for (name, text) in [("token", "nobody's"), ("namespace", "intercept-system"), ("ca.crt", CA)] {
            fs::write(folder.join(name), text)?;
        }
        Ok(m::Mount {
            container_path: ACCOUNT.to_owned(),
            host_path: folder.display().to_string(),
            readonly: true,
            propagation: 0,
        })
    }
}

fn read(manifest: &Path) -> Result<PodSpec> {
    let text = fs::read_to_string(manifest).with_context(|| format!("reading {}", manifest.display()))?;
    let document = text.split("\n---\n").find(|document| document.contains("\nkind: DaemonSet\n"));
    let document = document.with_context(|| format!("{} has no DaemonSet", manifest.display()))?;
    let set: DaemonSet = serde_saphyr::from_str(document).context("reading the DaemonSet")?;
    set.spec.and_then(|spec| spec.template.spec).context("the DaemonSet has no pod")
}

fn namespaces(spec: &PodSpec) -> m::NamespaceOption {
    let mode = |host: Option<bool>, otherwise| if host == Some(true) { m::NODE } else { otherwise };
    m::NamespaceOption {
        network: mode(spec.host_network, m::POD),
        pid: mode(spec.host_pid, m::CONTAINER),
        ipc: mode(spec.host_ipc, m::POD),
    }
}

fn value(variable: &EnvVar) -> Result<String> {
    if let Some(value) = &variable.value {
        return Ok(value.clone());
    }
    let field = variable.value_from.as_ref().and_then(|from| from.field_ref.as_ref());
    match field.map(|field| field.field_path.as_str()) {
        Some("spec.nodeName") => Ok(NODE_NAME.to_owned()),
        other => bail!("variable {} comes from {other:?}", variable.name),
    }
}

fn log_name(container: &Container, attempt: u32) -> String {
    if attempt == 0 { container.name.clone() } else { format!("{}-{attempt}", container.name) }
}
