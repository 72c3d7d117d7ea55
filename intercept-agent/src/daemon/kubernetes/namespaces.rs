//! What pods inherit from their namespace: annotations of the mesh, and the label with their mode.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    future,
};

use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api, Client,
    runtime::watcher::{self, Event},
};

use super::watch::Watch;
use crate::daemon::{mesh::Mesh, mode, view::ObjectUid};

/// The namespaces from which pods inherit something, and the pods that may.
pub(super) struct Namespaces {
    mesh: Mesh,
    watch: Option<Watch<Namespace>>,
    known: HashMap<String, Heritage>,
    listing: HashMap<String, Heritage>,
    listed: bool,
    /// The node's pods as the API has them.
    pods: HashMap<ObjectUid, Pod>,
}

/// What the pods of a namespace inherit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Heritage {
    annotations: BTreeMap<String, String>,
    /// The value of the label [`mode::NAME`].
    mode: Option<String>,
}

/// A pod of the API with what it inherits.
pub struct InheritingPod {
    /// The pod, with the annotations of its namespace that it does not have itself.
    pub pod: Pod,
    /// The mode that the label of its namespace asks for.
    pub mode: Option<String>,
}

impl Namespaces {
    /// Watches the namespaces from which a pod may inherit something: all if the mesh reads their annotations, else those
    /// with a label.
    pub(super) fn new(client: Client, mesh: Mesh) -> Self {
        let all = watcher::Config::default();
        let config = if mesh.reads_namespaces() { all } else { all.labels(mode::NAME) };
        Self {
            mesh,
            listed: false,
            watch: Some(Watch::new(Api::all(client), config, "namespaces")),
            known: HashMap::new(),
            listing: HashMap::new(),
            pods: HashMap::new(),
        }
    }

    /// Whether [`Self::inherit`] can tell what a pod inherits.
    pub(super) fn are_known(&self) -> bool {
        self.listed
    }

    /// Returns a pod with what it inherits from its namespace.
    pub(super) fn inherit(&mut self, pod: Pod) -> InheritingPod {
        let merged = self.merged(&pod);
        if let Some(uid) = uid(&pod) {
            self.pods.insert(uid, pod);
        }
        merged
    }

    fn merged(&self, pod: &Pod) -> InheritingPod {
        let mut merged = InheritingPod { pod: pod.clone(), mode: None };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        if let Some(Heritage { annotations, mode }) = self.known.get(namespace) {
            let own = merged.pod.metadata.annotations.get_or_insert_default();
            for (name, value) in annotations {
                own.entry(name.clone()).or_insert_with(|| value.clone());
            }
            merged.mode.clone_from(mode);
        }
        merged
    }

    /// Forgets a deleted pod.
    pub(super) fn forget(&mut self, pod: &Pod) {
        if let Some(uid) = uid(pod) {
            self.pods.remove(&uid);
        }
    }

    /// Forgets all pods but these.
    pub(super) fn retain(&mut self, listed: &HashSet<ObjectUid>) {
        self.pods.retain(|uid, _| listed.contains(uid));
    }

    /// Waits for changes or the first list. Returns the pods that inherit something else now. Can be cancelled.
    pub(super) async fn changed(&mut self) -> Vec<InheritingPod> {
        loop {
            let Some(watch) = &mut self.watch else { return future::pending().await };
            let Some(event) = watch.next().await else { return future::pending().await };
            let was_known = self.listed;
            let changed = self.handle(event);
            // The caller reads pods from the first list on, though it may be empty.
            if !changed.is_empty() || self.listed != was_known {
                let of =
                    |pod: &&Pod| pod.metadata.namespace.as_ref().is_some_and(|name| changed.contains(name));
                return self.pods.values().filter(of).map(|pod| self.merged(pod)).collect();
            }
        }
    }

    /// Returns the names of the namespaces that have changed.
    fn handle(&mut self, event: Event<Namespace>) -> HashSet<String> {
        let mut changed = HashSet::new();
        match event {
            Event::Init => self.listing.clear(),
            Event::InitApply(namespace) => {
                let (name, heritage) = self.read(&namespace);
                self.listing.insert(name, heritage);
            }
            Event::InitDone => {
                let before = std::mem::replace(&mut self.known, std::mem::take(&mut self.listing));
                let names: HashSet<&String> = before.keys().chain(self.known.keys()).collect();
                let differs = |name: &&&String| before.get(**name) != self.known.get(**name);
                changed = names.iter().filter(differs).map(|name| (*name).clone()).collect();
                self.listed = true;
            }
            Event::Apply(namespace) => {
                let (name, heritage) = self.read(&namespace);
                if self.known.get(&name) != Some(&heritage) {
                    self.known.insert(name.clone(), heritage);
                    changed.insert(name);
                }
            }
            // Or its label has been removed.
            Event::Delete(namespace) => {
                let name = namespace.metadata.name.unwrap_or_default();
                if self.known.remove(&name).is_some() {
                    changed.insert(name);
                }
            }
        }
        changed
    }

    /// A namespace's name and what pods inherit.
    fn read(&self, namespace: &Namespace) -> (String, Heritage) {
        let all = namespace.metadata.annotations.iter().flatten();
        let inherited = all.filter(|(name, _)| self.mesh.inherits(name));
        let annotations = inherited.map(|(name, value)| (name.clone(), value.clone())).collect();
        let mode = namespace.metadata.labels.as_ref().and_then(|labels| labels.get(mode::NAME)).cloned();
        (namespace.metadata.name.clone().unwrap_or_default(), Heritage { annotations, mode })
    }
}

fn uid(pod: &Pod) -> Option<ObjectUid> {
    pod.metadata.uid.clone().map(ObjectUid)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SKIP: &str = "config.linkerd.io/skip-outbound-ports";

    fn namespace(name: &str, annotations: &serde_json::Value) -> Namespace {
        let object = json!({ "metadata": { "name": name, "annotations": annotations } });
        serde_json::from_value(object).expect("a namespace")
    }

    fn pod(uid: &str, namespace: &str, annotations: &serde_json::Value) -> Pod {
        let metadata = json!({ "uid": uid, "namespace": namespace, "annotations": annotations });
        serde_json::from_value(json!({ "metadata": metadata })).expect("a pod")
    }

    fn skipped(pod: &Pod) -> Option<&str> {
        pod.metadata.annotations.as_ref()?.get(SKIP).map(String::as_str)
    }

    fn without_watch() -> Namespaces {
        Namespaces {
            mesh: Mesh::Linkerd,
            watch: None,
            known: HashMap::new(),
            listing: HashMap::new(),
            listed: false,
            pods: HashMap::new(),
        }
    }

    #[test]
    fn a_pod_inherits_what_it_does_not_say_itself() {
        let mut namespaces = without_watch();
        let listed = [
            Event::Init,
            Event::InitApply(namespace("shop", &json!({ SKIP: "3306", "other": "1" }))),
            Event::InitApply(namespace("plain", &json!({}))),
        ];
        for event in listed {
            assert!(namespaces.handle(event).is_empty());
            assert!(!namespaces.are_known());
        }
        assert_eq!(namespaces.handle(Event::InitDone).len(), 2);
        assert!(namespaces.are_known());
        let merged = |namespaces: &Namespaces, name, own| {
            let merged = namespaces.merged(&pod("u", name, &own)).pod;
            (
                skipped(&merged).map(str::to_owned),
                merged.metadata.annotations.is_some_and(|all| all.contains_key("other")),
            )
        };
        assert_eq!(merged(&namespaces, "shop", json!({})), (Some("3306".into()), false));
        assert_eq!(merged(&namespaces, "shop", json!({ SKIP: "25" })), (Some("25".into()), false));
        assert_eq!(merged(&namespaces, "plain", json!({})), (None, false));

        // Only a changed annotation that is inherited is a change.
        let apply = |annotations| Event::Apply(namespace("shop", &annotations));
        assert!(namespaces.handle(apply(json!({ SKIP: "3306", "other": "2" }))).is_empty());
        assert_eq!(namespaces.handle(apply(json!({ SKIP: "3307" }))), HashSet::from(["shop".to_owned()]));
        assert_eq!(merged(&namespaces, "shop", json!({})).0, Some("3307".into()));
        assert_eq!(namespaces.handle(apply(json!({}))).len(), 1);
        assert_eq!(merged(&namespaces, "shop", json!({})).0, None);
        // A namespace that is missed in a list has nothing to inherit any more.
        namespaces.handle(apply(json!({ SKIP: "1" })));
        namespaces.handle(Event::Init);
        assert_eq!(namespaces.handle(Event::InitDone).len(), 2);
    }

    #[test]
    fn a_label_that_is_changed_or_removed_is_a_change() {
        let mut namespaces = without_watch();
        let labelled = |mode: &str| {
            let metadata = json!({ "name": "shop", "labels": { mode::NAME: mode, "other": "1" } });
            serde_json::from_value(json!({ "metadata": metadata })).expect("a namespace")
        };
        let mode_of = |namespaces: &Namespaces| namespaces.merged(&pod("u", "shop", &json!({}))).mode;
        let shop = HashSet::from(["shop".to_owned()]);
        namespaces.handle(Event::Init);
        namespaces.handle(Event::InitApply(labelled("shadow")));
        assert_eq!(namespaces.handle(Event::InitDone), shop);
        assert_eq!(mode_of(&namespaces).as_deref(), Some("shadow"));
        assert_eq!(namespaces.handle(Event::Apply(labelled("enforce"))), shop);
        assert_eq!(mode_of(&namespaces).as_deref(), Some("enforce"));
        assert!(namespaces.handle(Event::Apply(labelled("enforce"))).is_empty());
        // Without the label, the watch does not select it any more.
        assert_eq!(namespaces.handle(Event::Delete(labelled("enforce"))), shop);
        assert_eq!(mode_of(&namespaces), None);
        assert!(namespaces.handle(Event::Delete(labelled("enforce"))).is_empty());
    }
}
