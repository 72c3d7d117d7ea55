//! Pods as objects of the API, and as what the kubelet makes of them.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::KubeClient;
use crate::{
    actor::{Actor, Bind, Listen, Transport},
    daemon::proxy,
    testbed::{Cgroup, Ids, Pod, PodSpec},
};

/// The node that the daemon is of.
pub const NODE: &str = "node-1";
const NAMESPACE: &str = "shop";

/// Makes pods: the part of the kubelet.
pub struct KubePods<'a> {
    client: &'a KubeClient<'a>,
    root: Cgroup,
}

/// A pod that runs: an object, and a cgroup with processes in a namespace. Nothing is captured by itself.
#[derive(Debug)]
pub struct RunningPod {
    /// The object as it was made.
    pub object: Value,
    /// Plays the app and, on 15001, the proxy.
    pub actor: Actor,
    _world: Actor,
    /// Where it is; after the processes in it.
    pub sandbox: Pod,
}

/// What the injector writes into a pod with a sidecar that others capture.
const INJECTED: &str =
    r#"{"initContainers":["istio-validation"],"containers":["istio-proxy"],"revision":"default"}"#;

/// A pod to be made. It has a sidecar if it has a container of that name.
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
    /// A namespace for pods, and a cgroup for theirs.
    pub fn new(client: &'a KubeClient<'a>) -> Result<Self> {
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } });
        client.create(&namespace)?;
        let root = Cgroup::new("kubelet")?;
        fs::create_dir_all(root.path().join("kubepods/burstable"))?;
        Ok(Self { client, root })
    }

    /// What the daemon takes for the node's hierarchy.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Makes a pod and has it run, as the kubelet does once it has heard of it.
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
            json!({ "phase": "Running", "podIP": sandbox.address(false), "containerStatuses": states });
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
