//! Annotations that pods inherit from their namespace.

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
use crate::daemon::{mesh::Mesh, view::ObjectUid};

/// The namespaces, if the mesh reads their annotations, and the pods that may inherit them.
pub(super) struct Namespaces {
    mesh: Mesh,
    /// `None` if the mesh does not read annotations of namespaces.
    watch: Option<Watch<Namespace>>,
    known: HashMap<String, BTreeMap<String, String>>,
    listing: HashMap<String, BTreeMap<String, String>>,
    listed: bool,
    /// The node's pods as the API has them.
    pods: HashMap<ObjectUid, Pod>,
}

impl Namespaces {
    /// Watches all namespaces if the mesh needs them.
    pub(super) fn new(client: Client, mesh: Mesh) -> Self {
        let watch = mesh
            .reads_namespaces()
            .then(|| Watch::new(Api::all(client), watcher::Config::default(), "namespaces"));
        Self {
            mesh,
            listed: watch.is_none(),
            watch,
            known: HashMap::new(),
            listing: HashMap::new(),
            pods: HashMap::new(),
        }
    }

    /// Whether [`Self::inherit`] can tell what a pod inherits.
    pub(super) fn are_known(&self) -> bool {
        self.listed
    }

    /// Returns a pod with the annotations of its namespace that it does not have itself.
    pub(super) fn inherit(&mut self, pod: Pod) -> Pod {
        if self.watch.is_none() {
            return pod;
        }
        let merged = self.merged(&pod);
        if let Some(uid) = uid(&pod) {
            self.pods.insert(uid, pod);
        }
        merged
    }

    fn merged(&self, pod: &Pod) -> Pod {
        let mut merged = pod.clone();
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        if let Some(inherited) = self.known.get(namespace) {
            let own = merged.metadata.annotations.get_or_insert_default();
            for (name, value) in inherited {
                own.entry(name.clone()).or_insert_with(|| value.clone());
            }
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

    /// Waits for changes. Returns the pods whose inherited annotations have changed. Never returns if the mesh does not
    /// read annotations of namespaces. Can be cancelled.
    pub(super) async fn changed(&mut self) -> Vec<Pod> {
        loop {
            let Some(watch) = &mut self.watch else { return future::pending().await };
            let Some(event) = watch.next().await else { return future::pending().await };
            let changed = self.handle(event);
            if !changed.is_empty() {
                let of =
                    |pod: &&Pod| pod.metadata.namespace.as_ref().is_some_and(|name| changed.contains(name));
                return self.pods.values().filter(of).map(|pod| self.merged(pod)).collect();
            }
        }
    }

    /// Returns the names of the namespaces whose annotations have changed.
    fn handle(&mut self, event: Event<Namespace>) -> HashSet<String> {
        let mut changed = HashSet::new();
        match event {
            Event::Init => self.listing.clear(),
            Event::InitApply(namespace) => {
                let (name, annotations) = self.read(&namespace);
                self.listing.insert(name, annotations);
            }
            Event::InitDone => {
                let before = std::mem::replace(&mut self.known, std::mem::take(&mut self.listing));
                let names: HashSet<&String> = before.keys().chain(self.known.keys()).collect();
                let differs = |name: &&&String| before.get(**name) != self.known.get(**name);
                changed = names.iter().filter(differs).map(|name| (*name).clone()).collect();
                self.listed = true;
            }
            Event::Apply(namespace) => {
                let (name, annotations) = self.read(&namespace);
                if self.known.get(&name) != Some(&annotations) {
                    self.known.insert(name.clone(), annotations);
                    changed.insert(name);
                }
            }
            // Its pods end before it does.
            Event::Delete(namespace) => {
                self.known.remove(namespace.metadata.name.as_deref().unwrap_or_default());
            }
        }
        changed
    }

    /// A namespace's name and the annotations that pods inherit.
    fn read(&self, namespace: &Namespace) -> (String, BTreeMap<String, String>) {
        let all = namespace.metadata.annotations.iter().flatten();
        let inherited = all.filter(|(name, _)| self.mesh.inherits(name));
        let inherited = inherited.map(|(name, value)| (name.clone(), value.clone())).collect();
        (namespace.metadata.name.clone().unwrap_or_default(), inherited)
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
            let merged = namespaces.merged(&pod("u", name, &own));
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
}
