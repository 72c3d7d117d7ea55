//! Pods of this node, as the Kubernetes API tells of them.
//!
//! The CNI plugin is quicker, but knows a pod's annotations alone, once, and only of pods that start after it was
//! installed. The API knows the containers, and tells of changes. It is not asked for more than this node's pods, and
//! nothing waits for it: without an answer, what is in force stays.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    pin::pin,
    time::Duration,
};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::{Container as ApiContainer, Pod};
use kube::{
    Api, Client,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event},
    },
};
use tokio::sync::mpsc::UnboundedSender;

use super::{
    desired::{CaptureArgs, Key},
    events::{self, PodEvent},
    placement::Placement,
    reconcile::Message,
    sidecar::{self, Container, INJECT, PodMetadata, PodVerdict, Selection},
    view::{Binding, ObjectClaim, ObjectId, ObjectPlace, ObjectUid, Stage},
};

/// How often a pod is looked for whose cgroup is not there yet.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// On a mirror pod, the hash of the static pod's manifest: the kubelet and the runtime know the pod by it.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// An MD5 sum in hexadecimal digits, as the kubelet makes it.
const HASH_LENGTH: usize = 32;

/// The way to the API is not known.
#[derive(Debug, thiserror::Error)]
#[error(
    "finding the Kubernetes API: --node-name needs a service account's token or a kubeconfig (KUBECONFIG)"
)]
pub struct KubernetesError(#[source] kube::Error);

/// This node's pods.
pub struct Kubernetes {
    client: Client,
    pods: Api<Pod>,
    node: String,
    watch: PodWatch,
}

/// Turns objects of the API into claims.
struct PodWatch {
    placement: Placement,
    selection: Selection,
    defaults: CaptureArgs,
    messages: UnboundedSender<Message>,
    /// Pods that are to be captured and whose cgroup is not there yet.
    unplaced: BTreeMap<ObjectUid, Unplaced>,
}

struct Unplaced {
    key: Key,
    claim: ObjectClaim,
}

impl Kubernetes {
    /// Find the API by a service account or a kubeconfig; asks nothing yet. `defaults` are options for every pod.
    pub async fn open(
        node: String,
        selection: Selection,
        defaults: CaptureArgs,
        placement: Placement,
        messages: UnboundedSender<Message>,
    ) -> Result<Self, KubernetesError> {
        let client = Client::try_default().await.map_err(KubernetesError)?;
        let watch = PodWatch { placement, selection, defaults, messages, unplaced: BTreeMap::new() };
        Ok(Self { pods: Api::all(client.clone()), client, node, watch })
    }

    /// Where to complain of pods that cannot be captured.
    pub fn events(&self) -> UnboundedSender<PodEvent> {
        events::publish(self.client.clone(), self.node.clone())
    }

    /// Tell of every pod, then of every change, for ever.
    pub async fn follow(self) {
        let Self { pods, node, mut watch, .. } = self;
        let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
        let mut events = pin!(watcher::watcher(pods, config).default_backoff());
        let mut retry = tokio::time::interval(RETRY_INTERVAL);
        let mut listed = HashSet::new();
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(Event::Init)) => listed.clear(),
                    Some(Ok(Event::InitApply(pod))) => listed.extend(watch.apply(&pod)),
                    Some(Ok(Event::InitDone)) => watch.synced(std::mem::take(&mut listed)),
                    Some(Ok(Event::Apply(pod))) => drop(watch.apply(&pod)),
                    Some(Ok(Event::Delete(pod))) => watch.delete(&pod),
                    Some(Err(error)) => tracing::warn!(
                        node, error = said(&error),
                        "watching the pods of this node: what is in force stays, and it is tried again"
                    ),
                    None => return,
                },
                _ = retry.tick(), if !watch.unplaced.is_empty() => watch.place_again(),
            }
            if watch.messages.is_closed() {
                return;
            }
        }
    }
}

/// What went wrong, once: the texts of these errors have their sources and all fields of the API's answer in them.
fn said(error: &watcher::Error) -> String {
    let (what, cause) = match error {
        watcher::Error::InitialListFailed(cause) => ("listing", cause),
        watcher::Error::WatchStartFailed(cause) => ("starting to watch", cause),
        watcher::Error::WatchFailed(cause) => ("watching", cause),
        watcher::Error::WatchError(status) => return format!("the API ends the watch: {}", status.message),
        error @ watcher::Error::NoResourceVersion => return error.to_string(),
    };
    if let kube::Error::Api(status) = cause {
        return format!("{what}: the API refuses: {}", status.message);
    }
    // The innermost is the system's or the other side's.
    let sources = std::iter::successors(Some(cause as &dyn std::error::Error), |error| error.source());
    format!("{what}: {}", sources.last().map(ToString::to_string).unwrap_or_default())
}

impl PodWatch {
    fn send(&self, message: Message) {
        // The loop is gone when the daemon ends.
        drop(self.messages.send(message));
    }

    /// Say what is to become of a pod; its object.
    fn apply(&mut self, pod: &Pod) -> Option<ObjectUid> {
        let (key, mut claim) = claim(pod, &self.selection, &self.defaults)?;
        let uid = claim.id.uid.clone();
        self.unplaced.remove(&uid);
        let begins = matches!(claim.stage, Stage::Pending | Stage::Running);
        if begins && matches!(claim.verdict, Ok(PodVerdict::Capture(_))) {
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
        match self.placement.of_pod(uid) {
            Ok(cgroup) => ObjectPlace::Cgroup(cgroup),
            Err(error) if stage == Stage::Running => ObjectPlace::Missing(error.to_string()),
            Err(_) => ObjectPlace::Pending,
        }
    }

    /// Look for the cgroups of pods again.
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

/// What an object says, and of which pod. Where it is, is not looked for.
pub(super) fn claim(pod: &Pod, selection: &Selection, defaults: &CaptureArgs) -> Option<(Key, ObjectClaim)> {
    let (key, id) = identify(pod)?;
    let verdict = sidecar::decide(&metadata(pod), selection, defaults);
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

/// The pod that an object speaks for, and the object.
///
/// A mirror pod is made by the kubelet: its node owns it. Whoever may create pods can write the same into theirs, but
/// no hash is ever the UID of an object of the API, and the rest is for [`super::view`] to tell apart.
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
        Some(hash) => (Key::Pod(hash.clone()), Binding::Mirror),
        None => (Key::Pod(uid.clone()), Binding::Own),
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
    // A native sidecar is written as an init container, and goes on like the others.
    let inits = inits.map(|c| container(c, c.restart_policy.as_deref() != Some("Always"), pods_own));
    let others = spec.into_iter().flat_map(|spec| &spec.containers).map(|c| container(c, false, pods_own));
    PodMetadata {
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        annotations: pod.metadata.annotations.clone().unwrap_or_default(),
        inject_label: pod.metadata.labels.as_ref().and_then(|labels| labels.get(INJECT)).cloned(),
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or_default(),
        containers: inits.chain(others).collect(),
    }
}

fn container(container: &ApiContainer, init: bool, pods_own: (Option<i64>, Option<i64>)) -> Container {
    let security = container.security_context.as_ref();
    let environment = container.env.iter().flatten();
    Container {
        name: container.name.clone(),
        init,
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
        assert_eq!(seen(HASH, &json!([])), own, "its node does not own it");
        assert_eq!(seen(HASH, &other), own, "another owns it");
        // The UID of another pod, and what is no hash.
        for mirror in ["5f0c8a52-52f6-4c0e-9d0e-2f4f7f2a1f10", "", "0123", &HASH.to_uppercase()] {
            assert_eq!(seen(mirror, &node), own, "{mirror}");
        }
    }
}
