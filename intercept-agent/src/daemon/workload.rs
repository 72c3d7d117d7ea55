//! Workloads of Kubernetes: the objects whose controllers make pods, as far as a pod's own metadata tells.

use std::{cmp::Ordering, fmt};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// The label with the suffix that a Deployment gives the names of its ReplicaSets.
const TEMPLATE_HASH: &str = "pod-template-hash";
/// The same of a Rollout of Argo.
const ROLLOUTS_TEMPLATE_HASH: &str = "rollouts-pod-template-hash";
/// The label with the name of OpenShift's DeploymentConfig, which owns the pod's ReplicationController.
const DEPLOYMENT_CONFIG: &str = "deploymentconfig";
/// Digits of the time that a CronJob appends to the names of its Jobs: minutes since 1970, and seconds before Kubernetes 1.21.
const TIME_DIGITS: std::ops::RangeInclusive<usize> = 8..=10;

/// A workload: a Deployment, StatefulSet, DaemonSet, CronJob or other owner of pods, or a pod without one.
#[derive(Clone, Debug)]
pub struct WorkloadRef {
    namespace: String,
    kind: String,
    name: String,
}

/// Why a text is no reference to a workload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkloadError {
    /// It has not three parts.
    #[error("give NAMESPACE/KIND/NAME, such as shop/Deployment/cart")]
    Parts,
    /// A part has characters that it cannot have.
    #[error("{0:?} is no {1}")]
    Part(String, &'static str),
}

impl WorkloadRef {
    /// Parses `NAMESPACE/KIND/NAME`.
    pub fn parse(text: &str) -> Result<Self, WorkloadError> {
        let parts: Vec<&str> = text.trim().split('/').collect();
        let [namespace, kind, name] = parts[..] else { return Err(WorkloadError::Parts) };
        let wrong = |part: &str, what| Err(WorkloadError::Part(part.to_owned(), what));
        if !is_name(namespace, 63, |c| c == b'-') {
            return wrong(namespace, "namespace");
        }
        if !kind.starts_with(|c: char| c.is_ascii_alphabetic())
            || !kind.bytes().all(|c| c.is_ascii_alphanumeric())
        {
            return wrong(kind, "kind, such as Deployment");
        }
        if !is_name(name, 253, |c| matches!(c, b'-' | b'.')) {
            return wrong(name, "name of an object");
        }
        Ok(Self { namespace: namespace.to_owned(), kind: kind.to_owned(), name: name.to_owned() })
    }

    /// The workload of a pod. `None` if the object has no name.
    ///
    /// The names of owners tell those of their owners, as in Istio: a ReplicaSet whose name ends with the pod's template
    /// hash is that of a Deployment (or Rollout), and a Job whose name ends with a time is that of a CronJob.
    pub fn of_pod(pod: &ObjectMeta) -> Option<Self> {
        let namespace = pod.namespace.clone().unwrap_or_default();
        let of = |kind: &str, name: &str| {
            Some(Self { namespace: namespace.clone(), kind: kind.to_owned(), name: name.to_owned() })
        };
        let owners = pod.owner_references.iter().flatten();
        // The node is that of a static pod.
        let is_workload = |kind: &str| kind != "Node";
        let controller =
            owners.filter(|owner| owner.controller == Some(true)).find(|owner| is_workload(&owner.kind));
        let Some(owner) = controller else { return of("Pod", pod.name.as_ref()?) };
        let label = |name: &str| {
            let value = pod.labels.as_ref()?.get(name)?;
            (!value.is_empty()).then_some(value.as_str())
        };
        let without_hash = |hash| owner.name.strip_suffix(label(hash)?)?.strip_suffix('-');
        match owner.kind.as_str() {
            "ReplicaSet" if let Some(name) = without_hash(TEMPLATE_HASH) => of("Deployment", name),
            "ReplicaSet" if let Some(name) = without_hash(ROLLOUTS_TEMPLATE_HASH) => of("Rollout", name),
            "ReplicationController" if let Some(name) = label(DEPLOYMENT_CONFIG) => {
                of("DeploymentConfig", name)
            }
            "Job" if let Some(name) = without_time(&owner.name) => of("CronJob", name),
            kind => of(kind, &owner.name),
        }
    }

    /// A number from 0 to 99 that the workload keeps for ever, on all nodes: a hash of its text.
    ///
    /// It must never change, or workloads would be cut over and back by an upgrade of the agent.
    pub fn percentile(&self) -> u8 {
        let hash = fmix64(fnv1a64(self.to_string().as_bytes()));
        // The high bits, which depend on all others.
        let percentile = (u128::from(hash) * 100) >> 64;
        u8::try_from(percentile).expect("less than 100")
    }
}

/// FNV-1a of 64 bits.
fn fnv1a64(bytes: &[u8]) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    bytes.iter().fold(OFFSET, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(PRIME))
}

/// The last step of MurmurHash3. The bits of FNV alone depend too little on the last letters, in which workloads often differ.
fn fmix64(mut hash: u64) -> u64 {
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

fn is_name(text: &str, most: usize, also: impl Fn(u8) -> bool) -> bool {
    let is_word = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let ends = [text.bytes().next(), text.bytes().next_back()];
    text.len() <= most
        && ends.into_iter().all(|c| c.is_some_and(is_word))
        && text.bytes().all(|c| is_word(c) || also(c))
}

/// The name without `-` and a time, if it ends so.
fn without_time(name: &str) -> Option<&str> {
    let (name, time) = name.rsplit_once('-')?;
    let is_time = TIME_DIGITS.contains(&time.len()) && time.bytes().all(|c| c.is_ascii_digit());
    (is_time && !name.is_empty()).then_some(name)
}

impl fmt::Display for WorkloadRef {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { namespace, kind, name } = self;
        write!(out, "{namespace}/{kind}/{name}")
    }
}

/// The case of the kind does not matter, as for kubectl.
impl Ord for WorkloadRef {
    fn cmp(&self, other: &Self) -> Ordering {
        let kind = |of: &Self| of.kind.to_ascii_lowercase();
        let names = (&self.namespace, &self.name).cmp(&(&other.namespace, &other.name));
        names.then_with(|| kind(self).cmp(&kind(other)))
    }
}

impl PartialOrd for WorkloadRef {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for WorkloadRef {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for WorkloadRef {}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of_pod(owners: &Value, labels: &Value) -> String {
        let metadata = json!({
            "namespace": "shop", "name": "cart-0", "uid": "u", "labels": labels, "ownerReferences": owners,
        });
        let metadata: ObjectMeta = serde_json::from_value(metadata).expect("metadata");
        WorkloadRef::of_pod(&metadata).expect("a workload").to_string()
    }

    #[test]
    fn the_owner_of_a_pod_tells_its_workload() {
        let hash = json!({ TEMPLATE_HASH: "5d4f8c7b9" });
        let rollout = json!({ ROLLOUTS_TEMPLATE_HASH: "5d4f8c7b9" });
        for (kind, name, labels, expected) in [
            ("ReplicaSet", "cart-5d4f8c7b9", &hash, "Deployment/cart"),
            ("ReplicaSet", "cart-5d4f8c7b9", &rollout, "Rollout/cart"),
            ("ReplicaSet", "cart-5d4f8c7b9", &json!({}), "ReplicaSet/cart-5d4f8c7b9"),
            ("ReplicaSet", "cart-5d4f8c7b9", &json!({ TEMPLATE_HASH: "" }), "ReplicaSet/cart-5d4f8c7b9"),
            ("ReplicaSet", "cart5d4f8c7b9", &hash, "ReplicaSet/cart5d4f8c7b9"),
            ("StatefulSet", "cart", &hash, "StatefulSet/cart"),
            ("DaemonSet", "cart", &json!({}), "DaemonSet/cart"),
            ("Job", "bill-29406720", &json!({}), "CronJob/bill"),
            ("Job", "bill-1764403200", &json!({}), "CronJob/bill"),
            ("Job", "bill-2026", &json!({}), "Job/bill-2026"),
            ("Job", "bill-2940672x", &json!({}), "Job/bill-2940672x"),
            ("Job", "bill", &json!({}), "Job/bill"),
            (
                "ReplicationController",
                "cart-1",
                &json!({ DEPLOYMENT_CONFIG: "cart" }),
                "DeploymentConfig/cart",
            ),
            ("ReplicationController", "cart-1", &json!({}), "ReplicationController/cart-1"),
            ("CloneSet", "cart", &json!({}), "CloneSet/cart"),
            // A static pod.
            ("Node", "node-1", &json!({}), "Pod/cart-0"),
        ] {
            let owner =
                json!({ "apiVersion": "v1", "kind": kind, "name": name, "uid": "o", "controller": true });
            assert_eq!(of_pod(&json!([owner]), labels), format!("shop/{expected}"), "{kind} {name}");
        }
        assert_eq!(of_pod(&json!([]), &json!({})), "shop/Pod/cart-0");
        // An owner that does not control the pod.
        let other = json!([{ "apiVersion": "v1", "kind": "ConfigMap", "name": "c", "uid": "o" }]);
        assert_eq!(of_pod(&other, &json!({})), "shop/Pod/cart-0");
        let nameless = ObjectMeta { namespace: Some("shop".into()), ..ObjectMeta::default() };
        assert!(WorkloadRef::of_pod(&nameless).is_none());
    }

    /// Fixed for ever: with another hash, an upgrade of the agent would move workloads.
    #[test]
    fn the_percentile_of_a_workload_never_changes() {
        assert_eq!(fnv1a64(b"foobar"), 0x8594_4171_f739_67e8, "as in the specification of FNV");
        assert_eq!(fmix64(1), 0xb456_bcfc_34c2_cb2c, "as in MurmurHash3");
        for (workload, expected) in [
            ("shop/Deployment/cart", 24),
            ("shop/Deployment/cart2", 50),
            ("shop/StatefulSet/cart", 82),
            ("shop/Pod/cart", 91),
            ("default/Deployment/cart", 29),
            ("bank/CronJob/bill", 52),
        ] {
            assert_eq!(WorkloadRef::parse(workload).expect("one").percentile(), expected, "{workload}");
        }
    }

    #[test]
    fn percentiles_are_spread_evenly() {
        let mut found = [0_usize; 100];
        for number in 0..10_000 {
            let text = format!("shop/Deployment/service-{number}");
            found[usize::from(WorkloadRef::parse(&text).expect("one").percentile())] += 1;
        }
        // Three standard deviations around 100.
        assert!(found.iter().all(|count| (65..=135).contains(count)), "{found:?}");
    }

    #[test]
    fn a_reference_has_a_namespace_a_kind_and_a_name() {
        let parse = WorkloadRef::parse;
        assert_eq!(
            parse(" shop/deployment/cart ").expect("one"),
            parse("shop/Deployment/cart").expect("one")
        );
        assert_ne!(parse("shop/Pod/cart").expect("one"), parse("shop/Deployment/cart").expect("one"));
        for (text, problem) in [
            ("", "give NAMESPACE/KIND/NAME, such as shop/Deployment/cart"),
            ("cart", "give NAMESPACE/KIND/NAME, such as shop/Deployment/cart"),
            ("shop/cart", "give NAMESPACE/KIND/NAME, such as shop/Deployment/cart"),
            ("shop/apps/Deployment/cart", "give NAMESPACE/KIND/NAME, such as shop/Deployment/cart"),
            ("Shop/Deployment/cart", "\"Shop\" is no namespace"),
            ("/Deployment/cart", "\"\" is no namespace"),
            ("shop/1/cart", "\"1\" is no kind, such as Deployment"),
            ("shop//cart", "\"\" is no kind, such as Deployment"),
            ("shop/Deployment/", "\"\" is no name of an object"),
            ("shop/Deployment/cart*", "\"cart*\" is no name of an object"),
            ("shop/Deployment/-cart", "\"-cart\" is no name of an object"),
        ] {
            assert_eq!(parse(text).expect_err(text).to_string(), problem);
        }
    }
}
