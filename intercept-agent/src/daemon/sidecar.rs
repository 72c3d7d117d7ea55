//! Whether a pod has a sidecar, and the options in its annotations, as istio-cni reads them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::Deserialize;

use super::{
    desired::CaptureArgs,
    mesh::{self, Mesh},
    mode::{self, EnforcedWorkloads, ModeClaims, ModeDecision},
    takeover::{self, Takeover},
    view::Certainty,
    workload::WorkloadRef,
};
use crate::options::parse_bool;

/// Name of the proxy's container.
const PROXY: &str = "istio-proxy";
/// Name of the init container that captures the pod itself.
const INIT: &str = "istio-init";
/// Name of the init container that validates a capture. Only the sidecar template has it.
const VALIDATION: &str = "istio-validation";
/// The annotation that the injector adds to every pod, with any template.
pub(crate) const STATUS: &str = "sidecar.istio.io/status";
/// The annotation that only the sidecar template adds, always if an agent captures the pods.
const MODE: &str = "sidecar.istio.io/interceptionMode";
/// The annotation with the proxy's options in YAML, including environment variables.
const PROXY_CONFIG: &str = "proxy.istio.io/config";
/// Annotation and label that enable or disable injection.
pub const INJECT: &str = "sidecar.istio.io/inject";
/// Ports that the proxy itself serves, which are never captured inbound.
const OWN_PORTS: [&str; 3] = ["15020", "15021", "15090"];

/// Annotation, flag, and istio-cni's default.
const ANNOTATIONS: [(&str, &str, &str); 9] = [
    (MODE, "-m", "REDIRECT"),
    ("traffic.sidecar.istio.io/includeOutboundIPRanges", "-i", "*"),
    ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "-x", ""),
    ("traffic.sidecar.istio.io/includeInboundPorts", "-b", "*"),
    ("traffic.sidecar.istio.io/includeOutboundPorts", "-q", ""),
    ("traffic.sidecar.istio.io/excludeOutboundPorts", "-o", "15020"),
    ("traffic.sidecar.istio.io/excludeInterfaces", "-c", ""),
    ("traffic.sidecar.istio.io/kubevirtInterfaces", "-k", ""),
    // The newer name of the previous one, which takes precedence.
    ("istio.io/reroute-virtual-interfaces", "-k", ""),
];
const EXCLUDE_INBOUND: &str = "traffic.sidecar.istio.io/excludeInboundPorts";

/// Whether connections pass while the proxy does not listen. An annotation of this project.
pub const OPEN: &str = "intercept/open-without-proxy";

/// Whether connections with other proxies of the node are joined. An annotation of this project.
pub const ACCELERATE: &str = "intercept/accelerate";
/// The annotations of this project, which are true or false, and their flags.
const SWITCHES: [(&str, &str); 2] = [(OPEN, "--open-without-proxy"), (ACCELERATE, "--accelerate")];

/// Containers whose outbound traffic is left alone. An annotation of this project.
pub const EXEMPT: &str = "intercept/exempt-containers";

/// Which pods of the node are considered, and the settings for all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Pods of these namespaces are ignored.
    pub exclude_namespaces: BTreeSet<String>,
    /// Whether IPv6 is captured.
    pub ipv6: Ipv6,
    /// The mesh whose sidecars are captured.
    pub mesh: Mesh,
    /// Which workloads are enforced although shadow mode is the default.
    pub enforced: EnforcedWorkloads,
}

/// Whether a pod's IPv6 is captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ipv6 {
    /// As Istio does: if the proxy has `ISTIO_DUAL_STACK`, or the pod's first address is IPv6. Otherwise Istio's proxy
    /// does not listen on IPv6.
    #[default]
    AsIstio,
    /// Always. Connections are refused if the proxy does not listen on IPv6.
    Always,
}

/// The relevant fields of a pod of the API.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodMetadata {
    /// Namespace.
    pub namespace: String,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// The label [`mode::NAME`] of its namespace.
    pub namespace_mode: Option<String>,
    /// Its workload.
    pub workload: Option<WorkloadRef>,
    /// Value of the label `sidecar.istio.io/inject`.
    pub inject_label: Option<String>,
    /// Whether a label says that the pod belongs to Linkerd's control plane.
    pub control_plane: bool,
    /// Whether the pod uses the node's network.
    pub host_network: bool,
    /// Containers.
    pub containers: Vec<Container>,
}

/// The relevant fields of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    /// Name.
    pub name: String,
    /// Whether it is an init container that terminates before the others start. False for native sidecars.
    pub init: bool,
    /// User id from its security context, or from the pod's.
    pub uid: Option<i64>,
    /// As `uid`.
    pub gid: Option<i64>,
    /// Environment variables with literal values.
    pub environment: BTreeMap<String, String>,
    /// Arguments.
    pub args: Vec<String>,
}

impl Container {
    /// Whether an environment variable is true.
    fn is_set(&self, variable: &str) -> bool {
        self.environment.get(variable).and_then(|value| parse_bool(value)) == Some(true)
    }
}

/// Whether a pod is captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodVerdict {
    /// It is captured with these arguments.
    Capture(SidecarArgs),
    /// As above if something is applied for it; else its own init container captures it.
    CaptureIfKept(SidecarArgs),
    /// It is not captured.
    Ignore(IgnoreReason),
}

/// The arguments of a pod that is captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SidecarArgs {
    /// Arguments as for `attach`.
    pub given: CaptureArgs,
    /// Whether IPv6 is captured if the pod's first address is IPv4.
    pub ipv6: Ipv6,
    /// Whether it is cut over from rules of its own.
    pub takeover: Takeover,
    /// Its mode, and why; `None` until that is decided.
    pub mode: Option<ModeDecision>,
}

impl SidecarArgs {
    /// Returns the arguments for a pod with this first address. A pod without an address has no IPv6 traffic to exclude
    /// yet.
    pub fn for_address(&self, first: Option<IpAddr>) -> CaptureArgs {
        let mut given = self.given.clone();
        if self.ipv6 == Ipv6::AsIstio && first.is_some_and(|address| address.is_ipv4()) {
            given.arguments.push("--without-ipv6".to_owned());
        }
        given
    }
}

/// Why a pod is not captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IgnoreReason {
    /// The pod uses the node's network.
    HostNetwork,
    /// All its containers have terminated.
    Finished,
    /// Its namespace is excluded.
    NamespaceExcluded,
    /// It has no container `istio-proxy`.
    NoSidecar,
    /// It has a container `istio-proxy` that was not injected.
    NotInjected,
    /// It has no other container.
    OnlyProxy,
    /// Its label or annotation `sidecar.istio.io/inject` is false.
    InjectDisabled,
    /// It has a container `istio-init`.
    CapturesItself,
    /// Its proxy has the environment variable `DISABLE_ENVOY`: gRPC without a proxy.
    ProxyDisabled,
    /// Its proxy is not a sidecar.
    Gateway,
    /// Its interception mode is `NONE`.
    ModeNone,
    /// The runtime passes no annotations, and the API has not reported the pod.
    AnnotationsUnknown,
    /// It was injected, but not recognizably with the sidecar template, and the API has not reported the pod.
    TemplateUnknown,
}

impl IgnoreReason {
    /// Returns the word in metrics and `status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HostNetwork => "host_network",
            Self::Finished => "finished",
            Self::NamespaceExcluded => "namespace_excluded",
            Self::NoSidecar => "no_sidecar",
            Self::NotInjected => "not_injected",
            Self::OnlyProxy => "only_proxy",
            Self::InjectDisabled => "inject_disabled",
            Self::CapturesItself => "captures_itself",
            Self::ProxyDisabled => "proxy_disabled",
            Self::Gateway => "gateway",
            Self::ModeNone => "mode_none",
            Self::AnnotationsUnknown => "annotations_unknown",
            Self::TemplateUnknown => "template_unknown",
        }
    }
}

/// An annotation with an invalid value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place} {name}: {problem}")]
pub struct AnnotationError {
    /// What has the name.
    place: &'static str,
    name: String,
    problem: String,
}

impl AnnotationError {
    pub(super) fn new(annotation: &str, problem: String) -> Self {
        Self { place: "annotation", name: annotation.to_owned(), problem }
    }

    /// As [`Self::new`], for a label of the pod's namespace.
    pub(super) fn of_namespace(label: &str, problem: String) -> Self {
        Self { place: "label of the namespace", name: label.to_owned(), problem }
    }

    /// Checks a value. The error of the option would name a flag that the author of the annotation does not know.
    pub(super) fn check(annotation: &str, flag: &str, value: &str) -> Result<(), Self> {
        let given = CaptureArgs {
            arguments: vec![flag.to_owned(), value.trim().to_owned()],
            ..CaptureArgs::default()
        };
        given.check().map(drop).map_err(|error| Self::new(annotation, error.to_string()))
    }
}

/// Whether a verdict depends on an annotation. The plugin does not pass on others.
pub fn reads(annotation: &str) -> bool {
    [STATUS, PROXY_CONFIG, INJECT, EXCLUDE_INBOUND, OPEN, ACCELERATE, EXEMPT, mode::NAME, takeover::NAME]
        .contains(&annotation)
        || ANNOTATIONS.iter().any(|(name, ..)| *name == annotation)
        || mesh::reads(annotation)
}

/// Decides for a pod of the API. `defaults` are arguments for every pod of the node: they override Istio's defaults,
/// and annotations override them.
pub fn decide(
    pod: &PodMetadata,
    selection: &Selection,
    defaults: &CaptureArgs,
) -> Result<PodVerdict, AnnotationError> {
    let elsewhere = if pod.host_network {
        Some(IgnoreReason::HostNetwork)
    } else if selection.exclude_namespaces.contains(&pod.namespace) {
        Some(IgnoreReason::NamespaceExcluded)
    } else {
        None
    };
    if let Some(why) = elsewhere {
        return Ok(PodVerdict::Ignore(why));
    }
    let modes = pod.modes(&selection.enforced);
    if selection.mesh != Mesh::Istio {
        return mesh::decide(pod, modes, selection, defaults);
    }
    if let Some(why) = reason_without_sidecar(pod) {
        return Ok(PodVerdict::Ignore(why));
    }
    let proxy = proxy(&pod.containers);
    pod.beside(INIT, modes, defaults, || match proxy.and_then(|proxy| reason_not_to_capture(pod, proxy)) {
        Some(why) => Ok(PodVerdict::Ignore(why)),
        None => modes.apply(capture(&pod.annotations, proxy, selection, defaults)?, defaults),
    })
}

fn proxy(containers: &[Container]) -> Option<&Container> {
    containers.iter().find(|container| container.name == PROXY && !container.init)
}

fn reason_without_sidecar(pod: &PodMetadata) -> Option<IgnoreReason> {
    if proxy(&pod.containers).is_none() {
        return Some(IgnoreReason::NoSidecar);
    }
    if !pod.annotations.contains_key(STATUS) {
        return Some(IgnoreReason::NotInjected);
    }
    let is_alone = pod.containers.iter().filter(|container| !container.init).count() < 2;
    is_alone.then_some(IgnoreReason::OnlyProxy)
}

fn reason_not_to_capture(pod: &PodMetadata, proxy: &Container) -> Option<IgnoreReason> {
    let inject = pod.inject_label.as_ref().or_else(|| pod.annotations.get(INJECT));
    if inject.and_then(|value| parse_bool(value)) == Some(false) {
        return Some(IgnoreReason::InjectDisabled);
    }
    if proxy.is_set("DISABLE_ENVOY") {
        return Some(IgnoreReason::ProxyDisabled);
    }
    // `proxy router` is a gateway.
    if let [proxy, kind, ..] = proxy.args.as_slice()
        && proxy == "proxy"
        && !kind.starts_with('-')
        && kind != "sidecar"
    {
        return Some(IgnoreReason::Gateway);
    }
    has_mode_none(&pod.annotations).then_some(IgnoreReason::ModeNone)
}

fn has_mode_none(annotations: &BTreeMap<String, String>) -> bool {
    annotations.get(MODE).is_some_and(|mode| mode.trim() == "NONE")
}

/// Decides by the plugin's input, and says how certain that is. What only the API has (containers, the proxy's users,
/// labels) is assumed to be as in most pods.
pub fn decide_by_annotations(
    namespace: &str,
    annotations: Option<&BTreeMap<String, String>>,
    selection: &Selection,
    defaults: &CaptureArgs,
) -> (Result<PodVerdict, AnnotationError>, Certainty) {
    let ignore = |why| Ok(PodVerdict::Ignore(why));
    if selection.exclude_namespaces.contains(namespace) {
        return (ignore(IgnoreReason::NamespaceExcluded), Certainty::Certain);
    }
    let Some(annotations) = annotations else {
        return (ignore(IgnoreReason::AnnotationsUnknown), Certainty::Provisional);
    };
    let annotation = annotations.get(mode::NAME).map(String::as_str);
    // Only the API has the label and the owners.
    let modes = ModeClaims { annotation, label: None, workload: None, enforced: &selection.enforced };
    let applied = |verdict: Result<PodVerdict, _>| verdict.and_then(|verdict| modes.apply(verdict, defaults));
    if selection.mesh != Mesh::Istio {
        let (verdict, certainty) = mesh::decide_by_annotations(annotations, selection, defaults);
        return (applied(verdict), certainty);
    }
    let Some(status) = annotations.get(STATUS) else {
        return (ignore(IgnoreReason::NoSidecar), Certainty::Certain);
    };
    let injected = InjectionStatus::read(status);
    let inject = annotations.get(INJECT);
    let proxy = Container { environment: proxy_metadata(annotations), ..Container::default() };
    let has_init = injected.has_init(INIT);
    let verdict = if injected.is_without(PROXY) {
        ignore(IgnoreReason::NoSidecar)
    } else if inject.and_then(|value| parse_bool(value)) == Some(false) {
        ignore(IgnoreReason::InjectDisabled)
    } else if has_mode_none(annotations) {
        ignore(IgnoreReason::ModeNone)
    } else if proxy.is_set("DISABLE_ENVOY") {
        ignore(IgnoreReason::ProxyDisabled)
    } else if annotations.contains_key(MODE) || injected.has_init(VALIDATION) || has_init {
        applied(capture(annotations, Some(&proxy), selection, defaults))
    } else {
        ignore(IgnoreReason::TemplateUnknown)
    };
    let verdict = match has_init {
        true => takeover::decide_for_start(modes, defaults, annotations, verdict),
        false => verdict,
    };
    (verdict, Certainty::Provisional)
}

/// Returns the proxy's variables from [`PROXY_CONFIG`]. An invalid value is ignored, because the injector has already
/// accepted it.
fn proxy_metadata(annotations: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    #[derive(Default, Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct ProxyConfig {
        proxy_metadata: BTreeMap<String, String>,
    }
    let config =
        annotations.get(PROXY_CONFIG).and_then(|text| serde_saphyr::from_str::<ProxyConfig>(text).ok());
    config.unwrap_or_default().proxy_metadata
}

/// The result of the injection, from [`STATUS`].
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct InjectionStatus {
    init_containers: Option<Vec<String>>,
    containers: Option<Vec<String>>,
}

impl InjectionStatus {
    /// Parses the annotation. An invalid value is empty.
    fn read(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_default()
    }

    fn has_init(&self, name: &str) -> bool {
        self.init_containers.iter().flatten().any(|container| container == name)
    }

    /// Whether it lists containers without this one, which may be a native sidecar.
    fn is_without(&self, name: &str) -> bool {
        let mut listed = self.containers.iter().chain(&self.init_containers).flatten().peekable();
        listed.peek().is_some() && listed.all(|container| container != name)
    }
}

fn capture(
    annotations: &BTreeMap<String, String>,
    proxy: Option<&Container>,
    selection: &Selection,
    defaults: &CaptureArgs,
) -> Result<PodVerdict, AnnotationError> {
    let mut arguments: Vec<String> = Vec::new();
    let mut push = |flag: &str, value: &str| arguments.extend([flag.to_owned(), value.to_owned()]);
    // Root's connections cannot be distinguished from those of other processes, so istio-cni does not use root as the
    // proxy's user either.
    let id = |id: Option<i64>| id.filter(|id| *id != 0).unwrap_or(1337).to_string();
    push("-u", &id(proxy.and_then(|proxy| proxy.uid)));
    push("-g", &id(proxy.and_then(|proxy| proxy.gid)));
    for (_, flag, default) in ANNOTATIONS {
        push(flag, default);
    }
    push("-d", &OWN_PORTS.join(","));
    arguments.extend(defaults.arguments.iter().cloned());
    for (flag, value) in annotated(annotations)? {
        arguments.extend([flag.to_owned(), value]);
    }
    arguments.extend(switches(annotations)?);
    if proxy.is_some_and(|proxy| proxy.is_set("ISTIO_META_DNS_CAPTURE")) {
        // All DNS, because the resolvers of a pod that does not run yet are unknown.
        arguments.extend(["--redirect-dns".to_owned(), "--capture-all-dns".to_owned()]);
    }
    let dual_stack = proxy.is_some_and(|proxy| proxy.is_set("ISTIO_DUAL_STACK"));
    let ipv6 = if dual_stack { Ipv6::Always } else { selection.ipv6 };
    let given = CaptureArgs { arguments, environment: defaults.environment.clone() };
    Ok(PodVerdict::Capture(SidecarArgs { given, ipv6, takeover: Takeover::None, mode: None }))
}

/// Returns the flags of this project's annotations.
pub(super) fn switches(annotations: &BTreeMap<String, String>) -> Result<Vec<String>, AnnotationError> {
    let mut arguments = Vec::new();
    for (annotation, flag) in SWITCHES {
        if let Some(value) = annotations.get(annotation) {
            let problem = || format!("`{value}` is neither true nor false; give true or false");
            let on = parse_bool(value.trim()).ok_or_else(|| AnnotationError::new(annotation, problem()))?;
            arguments.push(format!("{flag}={on}"));
        }
    }
    Ok(arguments)
}

/// Returns flags and values of the pod's annotations, all valid.
fn annotated(annotations: &BTreeMap<String, String>) -> Result<Vec<(&'static str, String)>, AnnotationError> {
    let mut flags = Vec::new();
    for (annotation, flag, _) in ANNOTATIONS {
        if let Some(value) = annotations.get(annotation) {
            AnnotationError::check(annotation, flag, value)?;
            flags.push((flag, value.trim().to_owned()));
        }
    }
    if let Some(value) = annotations.get(EXCLUDE_INBOUND) {
        AnnotationError::check(EXCLUDE_INBOUND, "-d", value)?;
        let ports = value.split(',').map(str::trim).filter(|port| !port.is_empty()).chain(OWN_PORTS);
        flags.push(("-d", ports.collect::<Vec<_>>().join(",")));
    }
    if let Some(value) = annotations.get(EXEMPT) {
        AnnotationError::check(EXEMPT, "--exempt-containers", value)?;
        flags.push(("--exempt-containers", value.trim().to_owned()));
    }
    Ok(flags)
}

#[cfg(test)]
mod tests;
