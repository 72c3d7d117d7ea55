//! Pods as objects of the API, with the processes that the kubelet would start.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use intercept_common::Family;
use serde_json::{Value, json};

use super::KubeClient;
use crate::{
    actor::{Actor, Bind, Listen, Transport},
    daemon::proxy,
    testbed::{Cgroup, Ids, Pod, PodSpec},
};

/// The name of the daemon's node.
pub const NODE: &str = "node-1";
const NAMESPACE: &str = "shop";

/// Creates pods, in the role of the kubelet.
pub struct KubePods<'a> {
    client: &'a KubeClient<'a>,
    root: Cgroup,
}

/// A running pod: an object, and a cgroup with processes in a namespace.
#[derive(Debug)]
pub struct RunningPod {
    /// The object as it was created.
    pub object: Value,
    /// Plays the app and, on 15001, the proxy.
    pub actor: Actor,
    _world: Actor,
    /// Its namespaces and cgroup. Dropped after its processes.
    pub sandbox: Pod,
}

/// The annotation of a pod whose traffic istio-cni captures.
const INJECTED: &str =
    r#"{"initContainers":["istio-validation"],"containers":["istio-proxy"],"revision":"default"}"#;

/// The specification of a pod. It has a sidecar if a container has that name.
pub fn object(name: &str, containers: &[&str], annotations: &Value) -> Value {
    let mut annotations = annotations.clone();
    if containers.contains(&"istio-proxy") {
        annotations["sidecar.istio.io/status"] = json!(INJECTED);
    }
    let containers: Vec<_> = containers
        .iter()
        .map(|container| {
            let args = if *container == "istio-proxy" { json!(["proxy", "sidecar"]) } else { json!([]) };
            json!({ "name": container, "image": "none", "args": args })
        })
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": NAMESPACE, "annotations": annotations },
        "spec": { "nodeName": NODE, "containers": containers },
    })
}

impl<'a> KubePods<'a> {
    /// Creates a namespace and a cgroup for pods.
    pub fn new(client: &'a KubeClient<'a>) -> Result<Self> {
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } });
        client.create(&namespace)?;
        let root = Cgroup::new("kubelet")?;
        fs::create_dir_all(root.path().join("kubepods/burstable"))?;
        Ok(Self { client, root })
    }

    /// The folder that the daemon uses as the node's hierarchy.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Creates a pod and starts it, as the kubelet does.
    pub fn run(&self, object: &Value) -> Result<RunningPod> {
        let made = self.client.create(object)?;
        let uid = made["metadata"]["uid"].as_str().context("an object without UID")?;
        let name = made["metadata"]["name"].as_str().context("an object without name")?;
        let sandbox = Pod::new(PodSpec::new(name))?;
        let actor = proxy(&sandbox);
        let world = Actor::start(sandbox.neighbour())?;
        for port in [80, 81] {
            let bind = Bind::new(Ids::APP, ([0, 0, 0, 0], port).into());
            world.listen(Listen { name: "the world".into(), transport: Transport::Tcp, bind })?;
        }
        let cgroup = self.root.path().join(format!("kubepods/burstable/pod{uid}"));
        fs::create_dir(&cgroup).with_context(|| format!("making {}", cgroup.display()))?;
        for pid in sandbox.cgroup.processes()? {
            fs::write(cgroup.join("cgroup.procs"), pid.to_string())?;
        }
        let containers = object["spec"]["containers"].as_array().into_iter().flatten();
        let states: Vec<_> = containers
            .map(|container| {
                json!({ "name": container["name"], "image": "none", "imageID": "none", "containerID": "test://0",
                        "ready": true, "started": true, "restartCount": 0,
                        "state": { "running": { "startedAt": made["metadata"]["creationTimestamp"] } } })
            })
            .collect();
        let status =
            json!({ "phase": "Running", "podIP": sandbox.address(Family::V4), "containerStatuses": states });
        self.client.patch_status(object, &status)?;
        Ok(RunningPod { object: made, actor, _world: world, sandbox })
    }
}

impl RunningPod {
    /// The pod's UID.
    pub fn uid(&self) -> &str {
        self.object["metadata"]["uid"].as_str().unwrap_or_default()
    }
}
