//! Pods of this node from the Kubernetes API.
//!
//! The CNI plugin is faster, but learns only a pod's annotations, once, and only of pods that start after its
//! installation. The API has the containers and reports changes. The watch covers only this node's pods and nothing
//! waits for it: without an answer, active captures stay.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use k8s_openapi::api::core::v1::{Container as ApiContainer, Pod};
use kube::{
    Api, Client,
    runtime::watcher::{self, Event},
};
use tokio::sync::mpsc::UnboundedSender;

use super::{
    desired::{CaptureArgs, Key},
    events::{self, PodEvent},
    mesh::CONTROL_PLANE,
    placement::Placement,
    reconcile::Message,
    sidecar::{self, Container, INJECT, PodMetadata, PodVerdict, Selection},
    source::{PodSource, SourceContext},
    view::{Binding, ObjectClaim, ObjectId, ObjectPlace, ObjectUid, Stage},
    workload::WorkloadRef,
};
use crate::ids::PodUid;

mod namespaces;
mod watch;

pub(super) use namespaces::InheritingPod;
use namespaces::Namespaces;
use watch::Watch;

/// Interval between searches for the missing cgroups of pods.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// The annotation of a mirror pod with the hash of the static pod's manifest, which kubelet and runtime use as the
/// pod's UID.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Length of the kubelet's hash, an MD5 sum in hexadecimal.
const HASH_LENGTH: usize = 32;

/// The address and credentials of the API are unknown.
#[derive(Debug, thiserror::Error)]
#[error(
    "finding the Kubernetes API: --node-name needs a service account's token or a kubeconfig (KUBECONFIG)"
)]
pub struct KubernetesError(#[source] kube::Error);

/// A watch on this node's pods.
pub struct Kubernetes {
    client: Client,
    pods: Api<Pod>,
    node: String,
    placement: Placement,
    selection: Selection,
    defaults: CaptureArgs,
}

/// Converts API objects to claims.
struct PodWatch {
    placement: Placement,
    selection: Selection,
    defaults: CaptureArgs,
    messages: UnboundedSender<Message>,
    /// Pods to be captured whose cgroup does not exist yet.
    unplaced: BTreeMap<ObjectUid, Unplaced>,
}

struct Unplaced {
    key: Key,
    claim: ObjectClaim,
}

impl Kubernetes {
    /// Finds the API through a service account or a kubeconfig, without a request. `defaults` are arguments for every
    /// pod.
    pub async fn open(
        node: String,
        selection: Selection,
        defaults: CaptureArgs,
        placement: Placement,
    ) -> Result<Self, KubernetesError> {
        let client = Client::try_default().await.map_err(KubernetesError)?;
        Ok(Self { pods: Api::all(client.clone()), client, node, placement, selection, defaults })
    }

    /// Returns a sender for events of pods that cannot be captured.
    pub fn events(&self) -> UnboundedSender<PodEvent> {
        events::publish(self.client.clone(), self.node.clone())
    }

    /// Reports every pod, and then every change, forever.
    async fn follow(self, messages: UnboundedSender<Message>) {
        let Self { client, pods, node, placement, selection, defaults, .. } = self;
        let mut watch = PodWatch { placement, selection, defaults, messages, unplaced: BTreeMap::new() };
        let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
        let mut pods = Watch::new(pods, config, "pods");
        let mut namespaces = Namespaces::new(client, watch.selection.mesh);
        let mut retry = tokio::time::interval(RETRY_INTERVAL);
        let mut listed = HashSet::new();
        loop {
            tokio::select! {
                // What a pod inherits must be known before its options are.
                event = pods.next(), if namespaces.are_known() => match event {
                    Some(Event::Init) => listed.clear(),
                    Some(Event::InitApply(pod)) => listed.extend(watch.apply(&namespaces.inherit(pod))),
                    Some(Event::InitDone) => {
                        namespaces.retain(&listed);
                        watch.synced(std::mem::take(&mut listed));
                    }
                    Some(Event::Apply(pod)) => drop(watch.apply(&namespaces.inherit(pod))),
                    Some(Event::Delete(pod)) => {
                        namespaces.forget(&pod);
                        watch.delete(&pod);
                    }
                    None => return,
                },
                changed = namespaces.changed() => {
                    for pod in changed {
                        watch.apply(&pod);
                    }
                }
                _ = retry.tick(), if !watch.unplaced.is_empty() => watch.place_again(),
            }
            if watch.messages.is_closed() {
                return;
            }
        }
    }
}

impl PodSource for Kubernetes {
    fn name(&self) -> &'static str {
        "kubernetes"
    }

    fn run(self: Box<Self>, context: SourceContext) -> BoxFuture<'static, ()> {
        self.follow(context.messages).boxed()
    }
}

impl PodWatch {
    fn send(&self, message: Message) {
        // The loop has ended if the daemon is shutting down.
        drop(self.messages.send(message));
    }

    /// Sends the claim for a pod. Returns the object's UID.
    fn apply(&mut self, pod: &InheritingPod) -> Option<ObjectUid> {
        let (key, mut claim) = claim(pod, &self.selection, &self.defaults)?;
        let uid = claim.id.uid.clone();
        self.unplaced.remove(&uid);
        let begins = matches!(claim.stage, Stage::Pending | Stage::Running);
        if begins && matches!(claim.verdict, Ok(PodVerdict::Capture(_) | PodVerdict::CaptureIfKept(_))) {
            claim.place = self.place(&key, claim.stage);
            if !matches!(claim.place, ObjectPlace::Cgroup(_)) {
                self.unplaced.insert(uid.clone(), Unplaced { key: key.clone(), claim: claim.clone() });
            }
        }
        self.send(Message::Object(key, Box::new(claim)));
        Some(uid)
    }

    fn place(&self, key: &Key, stage: Stage) -> ObjectPlace {
        let Key::Pod(uid) = key else { return ObjectPlace::Pending };
        match self.placement.of_pod(&uid.0) {
            Ok(cgroup) => ObjectPlace::Cgroup(cgroup),
            Err(error) if stage == Stage::Running => ObjectPlace::Missing(error.to_string()),
            Err(_) => ObjectPlace::Pending,
        }
    }

    /// Searches again for missing cgroups.
    fn place_again(&mut self) {
        for (uid, mut unplaced) in std::mem::take(&mut self.unplaced) {
            unplaced.claim.place = self.place(&unplaced.key, unplaced.claim.stage);
            if matches!(unplaced.claim.place, ObjectPlace::Cgroup(_)) {
                self.send(Message::Object(unplaced.key, Box::new(unplaced.claim)));
            } else {
                self.unplaced.insert(uid, unplaced);
            }
        }
    }

    fn delete(&mut self, pod: &Pod) {
        if let Some((key, id)) = identify(pod) {
            self.unplaced.remove(&id.uid);
            self.send(Message::ObjectDeleted(key, id));
        }
    }

    fn synced(&mut self, listed: HashSet<ObjectUid>) {
        self.unplaced.retain(|uid, _| listed.contains(uid));
        self.send(Message::ObjectsListed(listed));
    }
}

/// Returns the claim of an object and the key of its pod, without the pod's place.
pub(super) fn claim(
    inheriting: &InheritingPod,
    selection: &Selection,
    defaults: &CaptureArgs,
) -> Option<(Key, ObjectClaim)> {
    let InheritingPod { pod, mode } = inheriting;
    let (key, id) = identify(pod)?;
    let metadata = PodMetadata { namespace_mode: mode.clone(), ..metadata(pod) };
    let verdict = sidecar::decide(&metadata, selection, defaults);
    let created = pod.metadata.creation_timestamp.as_ref().map_or(i64::MAX, |time| time.0.as_second());
    Some((
        key,
        ObjectClaim {
            id,
            created,
            stage: stage(pod),
            verdict,
            place: ObjectPlace::Pending,
            first_address: first_address(pod),
        },
    ))
}

fn first_address(pod: &Pod) -> Option<IpAddr> {
    let status = pod.status.as_ref()?;
    let first = status.pod_ips.as_ref().and_then(|all| all.first()).map(|first| &first.ip);
    first.or(status.pod_ip.as_ref())?.parse().ok()
}

/// Returns the key of the pod that an object describes, and the object's id.
///
/// The kubelet creates mirror pods, and its node owns them. Any user who may create pods can imitate that, but a hash
/// never equals the UID of an API object, and [`super::view`] rejects the rest.
fn identify(pod: &Pod) -> Option<(Key, ObjectId)> {
    let metadata = &pod.metadata;
    let uid = metadata.uid.clone()?;
    let owned_by_node = metadata
        .owner_references
        .iter()
        .flatten()
        .any(|owner| (owner.kind.as_str(), owner.api_version.as_str()) == ("Node", "v1"));
    let hash = metadata.annotations.as_ref().and_then(|annotations| annotations.get(MIRROR));
    let hash = hash.filter(|hash| owned_by_node && is_hash(hash));
    let (key, binding) = match hash {
        Some(hash) => (Key::Pod(PodUid(hash.clone())), Binding::Mirror),
        None => (Key::Pod(PodUid(uid.clone())), Binding::Own),
    };
    let namespace = metadata.namespace.clone().unwrap_or_default();
    let name = metadata.name.clone().unwrap_or_default();
    Some((key, ObjectId { uid: ObjectUid(uid), namespace, name, binding }))
}

fn is_hash(text: &str) -> bool {
    text.len() == HASH_LENGTH && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

fn stage(pod: &Pod) -> Stage {
    if pod.metadata.deletion_timestamp.is_some() {
        return Stage::Terminating;
    }
    match phase(pod) {
        "Succeeded" | "Failed" => Stage::Finished,
        "Running" => Stage::Running,
        _ => Stage::Pending,
    }
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

fn metadata(pod: &Pod) -> PodMetadata {
    let spec = pod.spec.as_ref();
    let security = spec.and_then(|spec| spec.security_context.as_ref());
    let pods_own = (security.and_then(|s| s.run_as_user), security.and_then(|s| s.run_as_group));
    let inits = spec.and_then(|spec| spec.init_containers.as_ref()).into_iter().flatten();
    // A native sidecar is declared as an init container, but keeps running.
    let inits = inits
        .map(|c| Container { init: c.restart_policy.as_deref() != Some("Always"), ..container(c, pods_own) });
    let others = spec.into_iter().flat_map(|spec| &spec.containers).map(|c| container(c, pods_own));
    PodMetadata {
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        annotations: pod.metadata.annotations.clone().unwrap_or_default(),
        namespace_mode: None,
        workload: WorkloadRef::of_pod(&pod.metadata),
        inject_label: pod.metadata.labels.as_ref().and_then(|labels| labels.get(INJECT)).cloned(),
        control_plane: pod.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(CONTROL_PLANE)),
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or_default(),
        containers: inits.chain(others).collect(),
    }
}

fn container(container: &ApiContainer, pods_own: (Option<i64>, Option<i64>)) -> Container {
    let security = container.security_context.as_ref();
    let environment = container.env.iter().flatten();
    Container {
        name: container.name.clone(),
        init: false,
        uid: security.and_then(|s| s.run_as_user).or(pods_own.0),
        gid: security.and_then(|s| s.run_as_group).or(pods_own.1),
        environment: environment.filter_map(|v| Some((v.name.clone(), v.value.clone()?))).collect(),
        args: container.args.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(spec: &serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "uid": "u", "annotations": { "a": "b" }, "labels": { INJECT: "true" } },
            "spec": spec,
            "status": { "phase": "Running" },
        }))
        .expect("a pod")
    }

    #[test]
    fn native_sidecars_are_no_init_containers() {
        let metadata = metadata(&pod(&json!({
            "securityContext": { "runAsUser": 7, "runAsGroup": 8 },
            "initContainers": [
                { "name": "setup" },
                { "name": "istio-proxy", "restartPolicy": "Always", "args": ["proxy", "sidecar"],
                  "securityContext": { "runAsUser": 1444 },
                  "env": [{ "name": "A", "value": "1" }, { "name": "B", "valueFrom": {} }] },
            ],
            "containers": [{ "name": "app" }],
        })));
        let containers = metadata.containers;
        let seen: Vec<_> = containers.iter().map(|c| (c.name.as_str(), c.init, c.uid, c.gid)).collect();
        assert_eq!(
            seen,
            [
                ("setup", true, Some(7), Some(8)),
                ("istio-proxy", false, Some(1444), Some(8)),
                ("app", false, Some(7), Some(8))
            ]
        );
        assert_eq!(containers[1].environment, BTreeMap::from([("A".to_owned(), "1".to_owned())]));
        assert_eq!(metadata.inject_label.as_deref(), Some("true"));
        assert!(!metadata.host_network);
    }

    #[test]
    fn a_mirror_pod_speaks_for_a_static_pod_and_for_no_other() {
        const HASH: &str = "0123456789abcdef0123456789abcdef";
        let node =
            json!([{ "apiVersion": "v1", "kind": "Node", "name": "n", "uid": "n-1", "controller": true }]);
        let other = json!([{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "r-1" }]);
        let seen = |mirror: &str, owners: &serde_json::Value| {
            let pod = serde_json::from_value(json!({ "metadata": {
                "uid": "u", "namespace": "evil", "name": "p", "annotations": { MIRROR: mirror }, "ownerReferences": owners,
            } }));
            let (key, id) = identify(&pod.expect("a pod")).expect("an identity");
            assert_eq!(id.uid, ObjectUid("u".into()));
            (key.to_string(), id.binding)
        };
        assert_eq!(seen(HASH, &node), (format!("pod/{HASH}"), Binding::Mirror));
        let own = ("pod/u".to_owned(), Binding::Own);
        assert_eq!(seen(HASH, &json!([])), own, "it is not owned by its node");
        assert_eq!(seen(HASH, &other), own, "another owns it");
        // The UID of another pod, and values that are not a hash.
        for mirror in ["5f0c8a52-52f6-4c0e-9d0e-2f4f7f2a1f10", "", "0123", &HASH.to_uppercase()] {
            assert_eq!(seen(mirror, &node), own, "{mirror}");
        }
    }
}
