//! Whether a pod has a sidecar, and what its annotations ask for: as istio-cni reads them.

use std::collections::BTreeMap;

use super::wanted::Given;

/// The proxy's container.
const PROXY: &str = "istio-proxy";
/// The init container that captures its pod by itself.
const INIT: &str = "istio-init";
const STATUS: &str = "sidecar.istio.io/status";
/// Annotation and label: whether the pod was to be injected.
pub const INJECT: &str = "sidecar.istio.io/inject";
/// Answered by the proxy itself: never captured inbound.
const OWN_PORTS: [&str; 3] = ["15020", "15021", "15090"];

/// Annotation, flag, and what istio-cni takes without the annotation.
const ANNOTATIONS: [(&str, &str, &str); 9] = [
    ("sidecar.istio.io/interceptionMode", "-m", "REDIRECT"),
    ("traffic.sidecar.istio.io/includeOutboundIPRanges", "-i", "*"),
    ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "-x", ""),
    ("traffic.sidecar.istio.io/includeInboundPorts", "-b", "*"),
    ("traffic.sidecar.istio.io/includeOutboundPorts", "-q", ""),
    ("traffic.sidecar.istio.io/excludeOutboundPorts", "-o", "15020"),
    ("traffic.sidecar.istio.io/excludeInterfaces", "-c", ""),
    ("traffic.sidecar.istio.io/kubevirtInterfaces", "-k", ""),
    // The later name of the one before, and stronger.
    ("istio.io/reroute-virtual-interfaces", "-k", ""),
];
const EXCLUDE_INBOUND: &str = "traffic.sidecar.istio.io/excludeInboundPorts";

/// Whether the pod is to go on uncaptured while its proxy does not listen. Ours alone.
pub const OPEN: &str = "intercept/open-without-proxy";

/// What is known of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// The label `sidecar.istio.io/inject`.
    pub inject_label: Option<String>,
    /// It uses the node's network.
    pub host_network: bool,
    /// It will not run again.
    pub finished: bool,
    /// Its containers; none when only the annotations are known.
    pub containers: Option<Vec<Container>>,
}

/// What matters of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// Runs before the others, and ends before they start; not so a native sidecar.
    pub init: bool,
    /// As whom it runs: its own security context's, or the pod's.
    pub uid: Option<i64>,
    /// As `uid`.
    pub gid: Option<i64>,
    /// Plain values of its environment.
    pub environment: BTreeMap<String, String>,
    /// Its arguments.
    pub args: Vec<String>,
}

/// What becomes of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Captured with these options.
    Capture(Given),
    /// Left alone; one word for why.
    LeaveAlone(&'static str),
}

/// An annotation that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("annotation {annotation}: {problem}")]
pub struct AnnotationError {
    annotation: String,
    problem: String,
}

/// Decide. `defaults` are options for every pod of the node: stronger than istio's defaults, weaker than annotations.
pub fn decide(facts: &Facts, defaults: &Given) -> Result<Verdict, AnnotationError> {
    let leave = |why| Ok(Verdict::LeaveAlone(why));
    if facts.host_network {
        return leave("host_network");
    }
    if facts.finished {
        return leave("finished");
    }
    let containers = facts.containers.as_deref().unwrap_or_default();
    let proxy = containers.iter().find(|container| container.name == PROXY && !container.init);
    if proxy.is_none() && !facts.annotations.contains_key(STATUS) {
        return leave("no_sidecar");
    }
    let inject = facts.inject_label.as_deref().or_else(|| facts.annotations.get(INJECT).map(String::as_str));
    if inject.and_then(truth) == Some(false) {
        return leave("inject_disabled");
    }
    if containers.iter().any(|container| container.name == INIT && container.init) {
        return leave("captures_itself");
    }
    let variable = |name: &str| proxy.and_then(|proxy| proxy.environment.get(name)).map(String::as_str);
    if variable("DISABLE_ENVOY").and_then(truth) == Some(true) {
        return leave("proxy_disabled");
    }
    // `proxy router` is a gateway.
    let kind = proxy.and_then(|proxy| match proxy.args.as_slice() {
        [proxy, kind, ..] if proxy == "proxy" && !kind.starts_with('-') => Some(kind.as_str()),
        _ => None,
    });
    if kind.is_some_and(|kind| kind != "sidecar") {
        return leave("gateway");
    }

    let mut arguments: Vec<String> = Vec::new();
    let mut push = |flag: &str, value: &str| arguments.extend([flag.to_owned(), value.to_owned()]);
    // Root cannot be told from everybody else, so istio-cni does not take it for the proxy's either.
    let id = |id: Option<i64>| id.filter(|id| *id != 0).unwrap_or(1337).to_string();
    push("-u", &id(proxy.and_then(|proxy| proxy.uid)));
    push("-g", &id(proxy.and_then(|proxy| proxy.gid)));
    for (_, flag, default) in ANNOTATIONS {
        push(flag, default);
    }
    push("-d", &OWN_PORTS.join(","));
    arguments.extend(defaults.arguments.iter().cloned());
    let annotated = annotated(facts)?;
    for (flag, value) in annotated {
        arguments.extend([flag.to_owned(), value]);
    }
    if let Some(value) = facts.annotations.get(OPEN) {
        let problem = || format!("`{value}` is neither true nor false");
        let open = truth(value.trim());
        let open = open.ok_or_else(|| AnnotationError { annotation: OPEN.to_owned(), problem: problem() })?;
        arguments.push(format!("--open-without-proxy={open}"));
    }
    if variable("ISTIO_META_DNS_CAPTURE").and_then(truth) == Some(true) {
        // All of it, because the resolvers of a pod that does not run yet are not known.
        arguments.extend(["--redirect-dns".to_owned(), "--capture-all-dns".to_owned()]);
    }
    Ok(Verdict::Capture(Given { arguments, environment: defaults.environment.clone() }))
}

/// Flags and values of the annotations that are there, each of them sound.
fn annotated(facts: &Facts) -> Result<Vec<(&'static str, String)>, AnnotationError> {
    let mut flags = Vec::new();
    for (annotation, flag, _) in ANNOTATIONS {
        if let Some(value) = facts.annotations.get(annotation) {
            check(annotation, flag, value)?;
            flags.push((flag, value.trim().to_owned()));
        }
    }
    if let Some(value) = facts.annotations.get(EXCLUDE_INBOUND) {
        check(EXCLUDE_INBOUND, "-d", value)?;
        let ports = value.split(',').map(str::trim).filter(|port| !port.is_empty()).chain(OWN_PORTS);
        flags.push(("-d", ports.collect::<Vec<_>>().join(",")));
    }
    Ok(flags)
}

/// The error of the options names a flag that whoever wrote the annotation has never seen.
fn check(annotation: &str, flag: &str, value: &str) -> Result<(), AnnotationError> {
    let given = Given { arguments: vec![flag.to_owned(), value.trim().to_owned()], ..Given::default() };
    let at = |problem| AnnotationError { annotation: annotation.to_owned(), problem };
    given.check().map(drop).map_err(|error| at(error.to_string()))
}

/// As Go's `strconv.ParseBool`.
fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
