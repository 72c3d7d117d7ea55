//! Pods of this node, as the Kubernetes API tells of them.
//!
//! The CNI plugin is quicker, but knows a pod's annotations alone, once, and only of pods that start after it was
//! installed. The API knows the containers, and tells of changes. It is not asked for more than this node's pods, and
//! nothing waits for it: without an answer, what is in force stays.

use std::{
    collections::{BTreeMap, HashSet},
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
    complaints::{self, Complaint},
    placement::Placement,
    reconcile::{Message, Source},
    sidecar::{self, Container, Facts, INJECT, Verdict},
    wanted::{Given, Key, Options, Wanted},
};
use crate::store::Origin;

/// How often a pod is looked for whose cgroup is not there yet.
const AGAIN: Duration = Duration::from_millis(500);
/// Bears the UID that the kubelet and the runtime know a static pod by, which is not the API's.
const MIRROR: &str = "kubernetes.io/config.mirror";

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
    told: Told,
}

/// What was heard of pods, and whom to tell.
struct Told {
    placement: Placement,
    defaults: Given,
    messages: UnboundedSender<Message>,
    /// Pods whose cgroup is not there yet, by UID.
    waiting: BTreeMap<String, Waiting>,
}

struct Waiting {
    origin: Origin,
    given: Given,
    /// It should be there.
    running: bool,
    /// That it is not was said.
    said: bool,
}

impl Kubernetes {
    /// Find the API by a service account or a kubeconfig; asks nothing yet. `defaults` are options for every pod.
    pub async fn open(
        node: String,
        defaults: Given,
        placement: Placement,
        messages: UnboundedSender<Message>,
    ) -> Result<Self, KubernetesError> {
        let client = Client::try_default().await.map_err(KubernetesError)?;
        let told = Told { placement, defaults, messages, waiting: BTreeMap::new() };
        Ok(Self { pods: Api::all(client.clone()), client, node, told })
    }

    /// Where to complain of pods that cannot be captured.
    pub fn complaints(&self) -> UnboundedSender<Complaint> {
        complaints::publish(self.client.clone(), self.node.clone())
    }

    /// Tell of every pod, then of every change, for ever.
    pub async fn follow(self) {
        let Self { pods, node, mut told, .. } = self;
        let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
        let mut events = pin!(watcher::watcher(pods, config).default_backoff());
        let mut again = tokio::time::interval(AGAIN);
        let mut listed = HashSet::new();
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(Event::Init)) => listed.clear(),
                    Some(Ok(Event::InitApply(pod))) => listed.extend(told.apply(&pod)),
                    Some(Ok(Event::InitDone)) => told.synced(std::mem::take(&mut listed)),
                    Some(Ok(Event::Apply(pod))) => drop(told.apply(&pod)),
                    Some(Ok(Event::Delete(pod))) => told.delete(&pod),
                    Some(Err(error)) => tracing::warn!(
                        node, error = said(&error),
                        "watching the pods of this node: what is in force stays, and it is tried again"
                    ),
                    None => return,
                },
                _ = again.tick(), if !told.waiting.is_empty() => told.look(),
            }
            if told.messages.is_closed() {
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

impl Told {
    fn say(&self, message: Message) {
        // The loop is gone when the daemon ends.
        drop(self.messages.send(message));
    }

    /// Say what is to become of a pod; its key.
    fn apply(&mut self, pod: &Pod) -> Option<Key> {
        let uid = uid(pod)?;
        let key = Key::Pod(uid.clone());
        if pod.metadata.deletion_timestamp.is_some() {
            // What is in force for it stays until it is gone; nothing new begins.
            self.waiting.remove(&uid);
            return Some(key);
        }
        let origin = Origin::Pod {
            uid: uid.clone(),
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            sandbox: None,
        };
        let name = origin.name().unwrap_or_default();
        self.waiting.remove(&uid);
        match sidecar::decide(&facts(pod), &self.defaults) {
            Ok(Verdict::Capture(given)) => {
                let running = phase(pod) == "Running";
                self.waiting.insert(uid, Waiting { origin, given, running, said: false });
                self.look();
            }
            Ok(Verdict::LeaveAlone(why)) => self.say(Message::LeftAlone { key: key.clone(), name, why }),
            Err(error) => {
                self.say(Message::Refused { key: key.clone(), name, problem: error.to_string() });
            }
        }
        Some(key)
    }

    /// Look for the cgroups of the pods that wait for theirs.
    fn look(&mut self) {
        let Self { placement, messages, waiting, .. } = self;
        waiting.retain(|uid, pod| match placement.of_pod(uid) {
            Ok(cgroup) => {
                let options = Options::Given(pod.given.clone());
                let wanted = Wanted { origin: pod.origin.clone(), cgroup, netns: None, options };
                drop(messages.send(Message::Want(Box::new(wanted))));
                false
            }
            Err(error) => {
                if pod.running && !std::mem::replace(&mut pod.said, true) {
                    let name = pod.origin.name().unwrap_or_default();
                    let key = Key::Pod(uid.clone());
                    drop(messages.send(Message::Refused { key, name, problem: error.to_string() }));
                }
                true
            }
        });
    }

    fn delete(&mut self, pod: &Pod) {
        if let Some(uid) = uid(pod) {
            self.waiting.remove(&uid);
            self.say(Message::Deleted(Key::Pod(uid)));
        }
    }

    fn synced(&mut self, keys: HashSet<Key>) {
        self.waiting.retain(|uid, _| keys.contains(&Key::Pod(uid.clone())));
        self.say(Message::Synced(Source::Kubernetes, keys));
    }
}

fn uid(pod: &Pod) -> Option<String> {
    let mirrored = pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(MIRROR));
    mirrored.or(pod.metadata.uid.as_ref()).cloned()
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

fn facts(pod: &Pod) -> Facts {
    let spec = pod.spec.as_ref();
    let security = spec.and_then(|spec| spec.security_context.as_ref());
    let pods_own = (security.and_then(|s| s.run_as_user), security.and_then(|s| s.run_as_group));
    let inits = spec.and_then(|spec| spec.init_containers.as_ref()).into_iter().flatten();
    // A native sidecar is written as an init container, and goes on like the others.
    let inits = inits.map(|c| container(c, c.restart_policy.as_deref() != Some("Always"), pods_own));
    let others = spec.into_iter().flat_map(|spec| &spec.containers).map(|c| container(c, false, pods_own));
    Facts {
        annotations: pod.metadata.annotations.clone().unwrap_or_default(),
        inject_label: pod.metadata.labels.as_ref().and_then(|labels| labels.get(INJECT)).cloned(),
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or_default(),
        finished: matches!(phase(pod), "Succeeded" | "Failed"),
        containers: Some(inits.chain(others).collect()),
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
        let facts = facts(&pod(&json!({
            "securityContext": { "runAsUser": 7, "runAsGroup": 8 },
            "initContainers": [
                { "name": "setup" },
                { "name": "istio-proxy", "restartPolicy": "Always", "args": ["proxy", "sidecar"],
                  "securityContext": { "runAsUser": 1444 },
                  "env": [{ "name": "A", "value": "1" }, { "name": "B", "valueFrom": {} }] },
            ],
            "containers": [{ "name": "app" }],
        })));
        let containers = facts.containers.expect("known");
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
        assert_eq!(facts.inject_label.as_deref(), Some("true"));
        assert!(!facts.host_network && !facts.finished);
    }

    #[test]
    fn a_static_pod_is_known_as_the_kubelet_knows_it() {
        let mut pod = pod(&json!({ "hostNetwork": true, "containers": [] }));
        assert_eq!(uid(&pod).as_deref(), Some("u"));
        assert!(facts(&pod).host_network);
        pod.metadata.annotations = Some(BTreeMap::from([(MIRROR.to_owned(), "hash".to_owned())]));
        assert_eq!(uid(&pod).as_deref(), Some("hash"));
    }
}
