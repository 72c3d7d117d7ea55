//! Requests to the container runtime, as a kubelet makes them.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use prost::Message;
use tokio::runtime::Runtime;
use tonic::{
    Request,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use super::messages as m;
use crate::testbed::Ids;

/// Time limit of a request.
const PATIENCE: Duration = Duration::from_secs(30);
const ENDED: i32 = 2;

/// A connection to the runtime.
#[derive(Debug)]
pub struct CriClient {
    runtime: Runtime,
    channel: Channel,
}

/// The specification of a pod.
#[derive(Clone, Debug)]
pub struct PodConfig(m::PodSandboxConfig);

/// A running pod.
#[derive(Clone, Debug)]
pub struct PodSandbox {
    id: String,
    config: PodConfig,
}

impl PodConfig {
    /// A pod of this name in an existing cgroup, whose containers log to a folder.
    pub fn new(name: &str, cgroup: &str, logs: &Path, annotations: &[(&str, &str)]) -> Self {
        Self(m::PodSandboxConfig {
            metadata: Some(m::PodSandboxMetadata {
                name: name.to_owned(),
                uid: uid(name),
                namespace: "shop".to_owned(),
            }),
            log_directory: logs.display().to_string(),
            annotations: annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            linux: Some(m::LinuxPodSandboxConfig {
                cgroup_parent: cgroup.to_owned(),
                security_context: None,
            }),
        })
    }

    /// Lets it use namespaces of the node.
    pub(super) fn share(&mut self, namespaces: m::NamespaceOption) {
        if let Some(linux) = &mut self.0.linux {
            linux.security_context = Some(m::LinuxSandboxSecurityContext { namespaces: Some(namespaces) });
        }
    }

    fn logs(&self) -> PathBuf {
        PathBuf::from(&self.0.log_directory)
    }
}

/// Returns the UID of the pod of this name.
pub fn uid(name: &str) -> String {
    format!("3e5d2a1c-0c1f-4d53-9f57-{name}")
}

impl CriClient {
    /// Connects to the socket of a running runtime.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?.timeout(PATIENCE);
        let channel = runtime.block_on(endpoint.connect()).context("connecting to containerd")?;
        Ok(Self { runtime, channel })
    }

    fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let mut grpc = Grpc::new(self.channel.clone());
        self.runtime.block_on(async {
            grpc.ready().await.context("waiting for containerd")?;
            let path = PathAndQuery::from_static(method);
            let answer = grpc.unary(Request::new(request), path, ProstCodec::<Q, A>::default()).await;
            // The error text is containerd's.
            Ok(answer.map_err(|status| anyhow::anyhow!("{method}: {}", status.message()))?.into_inner())
        })
    }

    /// Waits until the runtime has an image.
    pub fn wait_for_image(&self, image: &str) -> Result<()> {
        wait(&format!("the image {image}"), || {
            let image = Some(m::ImageSpec { image: image.to_owned() });
            let answer: m::ImageStatusResponse =
                self.call("/runtime.v1.ImageService/ImageStatus", m::ImageStatusRequest { image })?;
            Ok(answer.image.is_some_and(|image| !image.id.is_empty()))
        })
    }

    /// RunPodSandbox.
    pub fn run(&self, config: &PodConfig) -> Result<PodSandbox> {
        let request = m::RunPodSandboxRequest { config: Some(config.0.clone()) };
        let answer: m::PodSandboxId = self.call("/runtime.v1.RuntimeService/RunPodSandbox", request)?;
        Ok(PodSandbox { id: answer.id, config: config.clone() })
    }

    /// StopPodSandbox.
    pub fn stop(&self, sandbox: &PodSandbox) -> Result<()> {
        let request = m::PodSandboxId { id: sandbox.id.clone() };
        self.call::<_, m::Nothing>("/runtime.v1.RuntimeService/StopPodSandbox", request).map(drop)
    }

    /// RemovePodSandbox.
    pub fn remove(&self, sandbox: &PodSandbox) -> Result<()> {
        let request = m::PodSandboxId { id: sandbox.id.clone() };
        self.call::<_, m::Nothing>("/runtime.v1.RuntimeService/RemovePodSandbox", request).map(drop)
    }

    /// Returns the address of the pod.
    pub fn address(&self, sandbox: &PodSandbox) -> Result<String> {
        let request = m::PodSandboxId { id: sandbox.id.clone() };
        let answer: m::PodSandboxStatusResponse =
            self.call("/runtime.v1.RuntimeService/PodSandboxStatus", request)?;
        let network = answer.status.and_then(|status| status.network);
        Ok(network.context("the pod has no network")?.ip)
    }

    /// Creates and starts a container that has this machine's programs. Returns its id.
    pub fn start(
        &self,
        sandbox: &PodSandbox,
        name: &str,
        image: &str,
        ids: Ids,
        command: &[&str],
    ) -> Result<String> {
        let mounts = ["/usr", "/lib", "/lib64"].map(|path| m::Mount {
            container_path: path.to_owned(),
            host_path: path.to_owned(),
            readonly: true,
            propagation: 0,
        });
        let id = |id: u32| Some(m::Int64Value { value: id.into() });
        let security = m::LinuxContainerSecurityContext {
            run_as_user: id(ids.uid),
            run_as_group: id(ids.gid),
            ..Default::default()
        };
        let config = m::ContainerConfig {
            metadata: Some(m::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(m::ImageSpec { image: image.to_owned() }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            mounts: mounts.to_vec(),
            log_path: format!("{name}.log"),
            linux: Some(m::LinuxContainerConfig { security_context: Some(security) }),
            ..Default::default()
        };
        self.start_container(sandbox, config)
    }

    /// Creates and starts a container. Returns its id.
    pub(super) fn start_container(&self, sandbox: &PodSandbox, config: m::ContainerConfig) -> Result<String> {
        let request = m::CreateContainerRequest {
            sandbox: sandbox.id.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox.config.0.clone()),
        };
        let made: m::ContainerId = self.call("/runtime.v1.RuntimeService/CreateContainer", request)?;
        self.call::<_, m::Nothing>("/runtime.v1.RuntimeService/StartContainer", made.clone())?;
        Ok(made.id)
    }

    /// Runs a container to its end. Returns its exit code and output.
    pub fn finish(
        &self,
        sandbox: &PodSandbox,
        name: &str,
        image: &str,
        ids: Ids,
        command: &[&str],
    ) -> Result<(i32, String)> {
        let id = self.start(sandbox, name, image, ids, command)?;
        let code = self.wait_for_end(&id).with_context(|| format!("running the container {name}"))?;
        Ok((code, log(sandbox, name)?))
    }

    /// Waits until a container has ended. Returns its exit code.
    pub(super) fn wait_for_end(&self, id: &str) -> Result<i32> {
        let mut code = 0;
        wait("its end", || {
            let request = m::ContainerId { id: id.to_owned() };
            let answer: m::ContainerStatusResponse =
                self.call("/runtime.v1.RuntimeService/ContainerStatus", request)?;
            let status = answer.status.context("it has no state")?;
            code = status.exit_code;
            Ok(status.state == ENDED)
        })?;
        Ok(code)
    }

    /// StopContainer. It is killed after this many seconds.
    pub(super) fn stop_container(&self, id: &str, timeout: i64) -> Result<()> {
        let request = m::StopContainerRequest { id: id.to_owned(), timeout };
        self.call::<_, m::Nothing>("/runtime.v1.RuntimeService/StopContainer", request).map(drop)
    }

    /// Kills a container, which has no time to end.
    pub fn kill(&self, id: &str) -> Result<()> {
        self.stop_container(id, 0)
    }

    /// RemoveContainer.
    pub fn remove_container(&self, id: &str) -> Result<()> {
        let request = m::ContainerId { id: id.to_owned() };
        self.call::<_, m::Nothing>("/runtime.v1.RuntimeService/RemoveContainer", request).map(drop)
    }

    /// Runs a program in a container to its end. Returns its exit code and output.
    pub(super) fn exec(&self, id: &str, command: &[String]) -> Result<(i32, String)> {
        let request = m::ExecSyncRequest { id: id.to_owned(), command: command.to_vec(), timeout: 0 };
        let done: m::ExecSyncResponse = self.call("/runtime.v1.RuntimeService/ExecSync", request)?;
        let said = [done.stdout, done.stderr].concat();
        Ok((done.exit_code, String::from_utf8_lossy(&said).into_owned()))
    }
}

/// The output of a container.
pub fn log(sandbox: &PodSandbox, name: &str) -> Result<String> {
    let path = sandbox.config.logs().join(format!("{name}.log"));
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    // "TIME stdout F LINE"
    Ok(text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).map(|line| format!("{line}\n")).collect())
}

/// Waits until a condition holds.
pub fn wait(what: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !so()? {
        ensure!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
