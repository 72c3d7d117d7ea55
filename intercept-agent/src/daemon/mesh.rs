//! Meshes other than Istio: how their pods are recognized, and their options as flags.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{
    desired::CaptureArgs,
    mode::{self, ModeClaims},
    sidecar::{
        self, AnnotationError, Container, IgnoreReason, Ipv6, PodMetadata, PodVerdict, Selection, SidecarArgs,
    },
    takeover::Takeover,
    view::Certainty,
};

mod consul;
mod kuma;
mod linkerd;

pub(super) use linkerd::CONTROL_PLANE;

/// The mesh whose sidecars are captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mesh {
    /// [`super::sidecar`].
    #[default]
    Istio,
    /// Linkerd, as linkerd-cni captures pods.
    Linkerd,
    /// Kuma, as kuma-cni captures pods.
    Kuma,
    /// Consul, as consul-cni captures pods.
    Consul,
}

/// A group without processes. These meshes identify the proxy only by user.
const NO_GROUP: &str = "999999";

type Annotations = BTreeMap<String, String>;
type MeshVerdict = Result<PodVerdict, AnnotationError>;

/// What the API has of a pod besides its annotations.
#[derive(Clone, Copy, Default)]
struct Known<'a> {
    /// The proxy's container.
    proxy: Option<&'a Container>,
    /// Whether the pod belongs to the mesh's control plane.
    control_plane: bool,
}

/// Decides for a pod of the API.
pub(super) fn decide(
    pod: &PodMetadata,
    modes: ModeClaims<'_>,
    selection: &Selection,
    defaults: &CaptureArgs,
) -> MeshVerdict {
    let with_mode = |verdict| modes.apply(verdict, defaults);
    let (proxy, init) = match selection.mesh {
        Mesh::Linkerd => (linkerd::PROXY, linkerd::INIT),
        Mesh::Kuma => (kuma::PROXY, kuma::INIT),
        Mesh::Istio | Mesh::Consul => {
            return consul::capture(&pod.annotations, selection, defaults).and_then(with_mode);
        }
    };
    let Some(proxy) = pod.containers.iter().find(|container| container.name == proxy && !container.init)
    else {
        return Ok(PodVerdict::Ignore(IgnoreReason::NoSidecar));
    };
    let known = Known { proxy: Some(proxy), control_plane: pod.control_plane };
    pod.beside(init, modes, defaults, || {
        capture(&pod.annotations, known, selection, defaults).and_then(with_mode)
    })
}

/// Decides by annotations only.
pub(super) fn decide_by_annotations(
    annotations: &Annotations,
    selection: &Selection,
    defaults: &CaptureArgs,
) -> (MeshVerdict, Certainty) {
    if selection.mesh == Mesh::Consul {
        let verdict = consul::capture(annotations, selection, defaults);
        let is_captured = matches!(verdict, Ok(PodVerdict::Capture(_)));
        // Only the API has the label of the namespace.
        let may_change = is_captured && !annotations.contains_key(mode::NAME);
        return (verdict, if may_change { Certainty::Provisional } else { Certainty::Certain });
    }
    if !selection.mesh.has_injected(annotations) {
        return (Ok(PodVerdict::Ignore(IgnoreReason::NoSidecar)), Certainty::Certain);
    }
    (capture(annotations, Known::default(), selection, defaults), Certainty::Provisional)
}

fn capture(
    annotations: &Annotations,
    known: Known<'_>,
    selection: &Selection,
    defaults: &CaptureArgs,
) -> MeshVerdict {
    match selection.mesh {
        Mesh::Linkerd => linkerd::capture(annotations, known, selection, defaults),
        Mesh::Kuma => kuma::capture(annotations, known, defaults),
        Mesh::Istio | Mesh::Consul => consul::capture(annotations, selection, defaults),
    }
}

/// Whether a verdict for the mesh depends on an annotation.
pub(super) fn reads(annotation: &str) -> bool {
    linkerd::reads(annotation) || kuma::reads(annotation) || consul::reads(annotation)
}

impl Mesh {
    /// Returns the name, as in options.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Istio => "istio",
            Self::Linkerd => "linkerd",
            Self::Kuma => "kuma",
            Self::Consul => "consul",
        }
    }

    /// Whether the mesh's injector has changed a pod with these annotations. Others have no sidecar.
    pub fn has_injected(self, annotations: &Annotations) -> bool {
        match self {
            Self::Istio => annotations.contains_key(sidecar::STATUS),
            Self::Linkerd => annotations.contains_key(linkerd::INJECTED),
            Self::Kuma => annotations.get(kuma::INJECTED).is_some_and(|value| value == "true"),
            Self::Consul => annotations.contains_key(consul::CONFIG),
        }
    }

    /// Whether a pod inherits this annotation from its namespace.
    pub(super) fn inherits(self, annotation: &str) -> bool {
        self == Self::Linkerd && linkerd::inherits(annotation)
    }

    /// Whether pods inherit annotations from their namespace.
    pub(super) fn reads_namespaces(self) -> bool {
        self == Self::Linkerd
    }
}

/// Flags that annotations give, each checked.
#[derive(Default)]
struct Flags(Vec<String>);

impl Flags {
    /// Adds flags of the mesh's fixed rules.
    fn fixed(&mut self, flags: &[&str]) {
        self.0.extend(flags.iter().map(|flag| (*flag).to_owned()));
    }

    /// Adds a flag with a value that an annotation gives.
    fn value(&mut self, annotation: &str, flag: &str, value: &str) -> Result<(), AnnotationError> {
        AnnotationError::check(annotation, flag, value)?;
        self.0.extend([flag.to_owned(), value.to_owned()]);
        Ok(())
    }

    /// Adds the user of a proxy's container. Root's connections cannot be told apart.
    fn user(&mut self, proxy: Option<&Container>) {
        if let Some(uid) = proxy.and_then(|proxy| proxy.uid).filter(|uid| *uid != 0) {
            self.0.extend(["-u".to_owned(), uid.to_string()]);
        }
    }

    /// A captured pod, with the annotations that every mesh's pods may have.
    fn captured(mut self, annotations: &Annotations, ipv6: Ipv6, defaults: &CaptureArgs) -> MeshVerdict {
        self.0.extend(sidecar::switches(annotations)?);
        let given = CaptureArgs { arguments: self.0, environment: defaults.environment.clone() };
        Ok(PodVerdict::Capture(SidecarArgs { given, ipv6, takeover: Takeover::None, mode: None }))
    }
}

/// Refuses an annotation with an option that has no corresponding flag.
fn refuse_unsupported(annotations: &Annotations, unsupported: &[&str]) -> Result<(), AnnotationError> {
    let given = |name: &&&str| annotations.get(**name).is_some_and(|value| !value.trim().is_empty());
    match unsupported.iter().find(given) {
        Some(name) => Err(unsupported_option(name, "this agent does not support it")),
        None => Ok(()),
    }
}

fn unsupported_option(annotation: &str, what: &str) -> AnnotationError {
    let problem = format!("{what}: remove it, or let the mesh's own init container capture this pod");
    AnnotationError::new(annotation, problem)
}

/// Converts ranges of ports from `a-b`, as in annotations, to `a:b`, as for iptables.
fn with_colons(list: &str) -> String {
    let item = |item: &str| match item.split_once('-') {
        Some((first, last)) => format!("{}:{}", first.trim(), last.trim()),
        None => item.trim().to_owned(),
    };
    list.split(',').map(item).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests;
