//! Meshes other than Istio: how their pods are recognized, and their options as flags.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{
    desired::CaptureArgs,
    sidecar::{self, AnnotationError, IgnoreReason, Ipv6, PodMetadata, PodVerdict, SidecarArgs},
    view::Certainty,
};

/// The mesh whose sidecars are captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// A mesh with an annotation for each option.
struct MeshTable {
    /// Name of the proxy's container.
    proxy: &'static str,
    /// Name of the init container that captures the pod itself.
    init: &'static str,
    /// The annotation of the injector, and its value if it matters.
    mark: (&'static str, Option<&'static str>),
    /// The mesh's fixed rules as flags.
    flags: &'static [&'static str],
    /// Annotations with a corresponding flag.
    annotations: &'static [Annotation],
    /// Annotations without a corresponding flag.
    unsupported: &'static [&'static str],
}

struct Annotation {
    name: &'static str,
    flag: &'static str,
    /// A prefix for the annotation's value.
    always: &'static str,
}

/// A group without processes. These meshes identify the proxy only by user.
const NO_GROUP: &str = "999999";

const LINKERD: MeshTable = MeshTable {
    proxy: "linkerd-proxy",
    init: "linkerd-init",
    mark: ("linkerd.io/proxy-version", None),
    // `-e 1` makes 15008 an ordinary port.
    flags: &[
        "-p",
        "4140",
        "-z",
        "4143",
        "-u",
        "2102",
        "-g",
        NO_GROUP,
        "-e",
        "1",
        "-c",
        "lo",
        "-i",
        "*",
        "-b",
        "*",
        "-d",
        "4190,4191,4567,4568",
        "-o",
        "4567,4568",
    ],
    annotations: &[
        Annotation { name: "config.linkerd.io/skip-inbound-ports", flag: "-d", always: "4190,4191," },
        Annotation { name: "config.linkerd.io/skip-outbound-ports", flag: "-o", always: "" },
        Annotation { name: "config.linkerd.io/skip-subnets", flag: "-x", always: "" },
        Annotation { name: "config.linkerd.io/proxy-uid", flag: "-u", always: "" },
        Annotation { name: "config.linkerd.io/proxy-gid", flag: "-g", always: "" },
    ],
    unsupported: &[],
};

const KUMA: MeshTable = MeshTable {
    proxy: "kuma-sidecar",
    init: "kuma-init",
    mark: ("kuma.io/sidecar-injected", Some("true")),
    flags: &[
        "-p",
        "15001",
        "-z",
        "15006",
        "-u",
        "5678",
        "-g",
        NO_GROUP,
        "-e",
        "1",
        "-i",
        "*",
        "-b",
        "*",
        "--redirect-dns",
        "--capture-all-dns",
    ],
    annotations: &[
        Annotation { name: "traffic.kuma.io/exclude-inbound-ports", flag: "-d", always: "" },
        Annotation { name: "traffic.kuma.io/exclude-outbound-ports", flag: "-o", always: "" },
        Annotation { name: "traffic.kuma.io/exclude-outbound-ips", flag: "-x", always: "" },
        Annotation { name: "kuma.io/sidecar-uid", flag: "-u", always: "" },
    ],
    unsupported: &["traffic.kuma.io/exclude-inbound-ips", "traffic.kuma.io/transparent-proxy-config"],
};

/// The annotation with all options of Consul's injector.
const CONSUL_CONFIG: &str = "consul.hashicorp.com/redirect-traffic-config";
/// `enabled`, or `complete` once Consul's own plugin has captured the pod.
const CONSUL_STATUS: &str = "consul.hashicorp.com/transparent-proxy-status";

/// The value of [`CONSUL_CONFIG`].
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ConsulConfig {
    #[serde(rename = "ConsulDNSIP", default)]
    dns_ip: String,
    #[serde(rename = "ProxyUserID")]
    proxy_user: String,
    proxy_inbound_port: u16,
    #[serde(default)]
    proxy_outbound_port: u16,
    exclude_inbound_ports: Option<Vec<String>>,
    exclude_outbound_ports: Option<Vec<String>>,
    #[serde(rename = "ExcludeOutboundCIDRs")]
    exclude_outbound_cidrs: Option<Vec<String>>,
    #[serde(rename = "ExcludeUIDs")]
    exclude_uids: Option<Vec<String>>,
}

/// Decides for a pod of the API.
pub(super) fn decide(
    mesh: Mesh,
    pod: &PodMetadata,
    defaults: &CaptureArgs,
) -> Result<PodVerdict, AnnotationError> {
    let Some(table) = mesh.table() else { return consul(&pod.annotations, defaults) };
    let ignore = |why| Ok(PodVerdict::Ignore(why));
    if !pod.containers.iter().any(|container| container.name == table.proxy && !container.init) {
        return ignore(IgnoreReason::NoSidecar);
    }
    if pod.containers.iter().any(|container| container.name == table.init && container.init) {
        return ignore(IgnoreReason::CapturesItself);
    }
    let proxy = pod.containers.iter().find(|container| container.name == table.proxy);
    table.capture(&pod.annotations, proxy.and_then(|proxy| proxy.uid), defaults)
}

/// Decides by annotations only.
pub(super) fn decide_by_annotations(
    mesh: Mesh,
    annotations: &BTreeMap<String, String>,
    defaults: &CaptureArgs,
) -> (Result<PodVerdict, AnnotationError>, Certainty) {
    let Some(table) = mesh.table() else { return (consul(annotations, defaults), Certainty::Certain) };
    let (name, expected) = table.mark;
    let value = annotations.get(name);
    if value.is_none_or(|value| expected.is_some_and(|expected| value != expected)) {
        return (Ok(PodVerdict::Ignore(IgnoreReason::NoSidecar)), Certainty::Certain);
    }
    (table.capture(annotations, None, defaults), Certainty::Provisional)
}

/// Whether a verdict for the mesh depends on an annotation.
pub(super) fn reads(annotation: &str) -> bool {
    let of_table = |table: &MeshTable| {
        table.mark.0 == annotation
            || table.annotations.iter().any(|known| known.name == annotation)
            || table.unsupported.contains(&annotation)
    };
    [CONSUL_CONFIG, CONSUL_STATUS].contains(&annotation) || of_table(&LINKERD) || of_table(&KUMA)
}

impl Mesh {
    fn table(self) -> Option<&'static MeshTable> {
        match self {
            Self::Linkerd => Some(&LINKERD),
            Self::Kuma => Some(&KUMA),
            Self::Istio | Self::Consul => None,
        }
    }
}

impl MeshTable {
    fn capture(
        &self,
        annotations: &BTreeMap<String, String>,
        uid: Option<i64>,
        defaults: &CaptureArgs,
    ) -> Result<PodVerdict, AnnotationError> {
        if let Some(name) = self.unsupported.iter().find(|name| annotations.contains_key(**name)) {
            let problem =
                "this agent does not support it: remove it, or let the mesh's own init container capture \
                           this pod"
                    .to_owned();
            return Err(AnnotationError::new(name, problem));
        }
        let mut arguments: Vec<String> = self.flags.iter().map(|flag| (*flag).to_owned()).collect();
        if let Some(uid) = uid.filter(|uid| *uid != 0) {
            arguments.extend(["-u".to_owned(), uid.to_string()]);
        }
        arguments.extend(defaults.arguments.iter().cloned());
        for Annotation { name, flag, always } in self.annotations {
            if let Some(value) = annotations.get(*name) {
                let value = with_colons(value);
                AnnotationError::check(name, flag, &value)?;
                arguments.extend([(*flag).to_owned(), format!("{always}{value}")]);
            }
        }
        arguments.extend(sidecar::switches(annotations)?);
        Ok(captured(arguments, defaults))
    }
}

fn captured(arguments: Vec<String>, defaults: &CaptureArgs) -> PodVerdict {
    let given = CaptureArgs { arguments, environment: defaults.environment.clone() };
    // Their proxies listen on both families if the pod has both.
    PodVerdict::Capture(SidecarArgs { given, ipv6: Ipv6::Always })
}

/// Converts ranges of ports from `a-b`, as in annotations, to `a:b`, as for iptables.
fn with_colons(list: &str) -> String {
    let item = |item: &str| match item.split_once('-') {
        Some((first, last)) => format!("{}:{}", first.trim(), last.trim()),
        None => item.trim().to_owned(),
    };
    list.split(',').map(item).collect::<Vec<_>>().join(",")
}

fn consul(
    annotations: &BTreeMap<String, String>,
    defaults: &CaptureArgs,
) -> Result<PodVerdict, AnnotationError> {
    let Some(text) = annotations.get(CONSUL_CONFIG) else {
        return Ok(PodVerdict::Ignore(IgnoreReason::NoSidecar));
    };
    if annotations.get(CONSUL_STATUS).is_none_or(|status| status != "enabled") {
        return Ok(PodVerdict::Ignore(IgnoreReason::ProxyDisabled));
    }
    let at = |problem| AnnotationError::new(CONSUL_CONFIG, problem);
    let config: ConsulConfig = serde_json::from_str(text).map_err(|error| at(error.to_string()))?;
    if !config.dns_ip.is_empty() {
        return Err(at("Consul's DNS is not captured: remove ConsulDNSIP".to_owned()));
    }
    let users = [vec![config.proxy_user], config.exclude_uids.unwrap_or_default()].concat();
    let outbound = if config.proxy_outbound_port == 0 { 15001 } else { config.proxy_outbound_port };
    let list = |items: Option<Vec<String>>| items.unwrap_or_default().join(",");
    let mut arguments = Vec::new();
    for (flag, value) in [
        ("-p", outbound.to_string()),
        ("-z", config.proxy_inbound_port.to_string()),
        ("-u", users.join(",")),
        ("-g", NO_GROUP.to_owned()),
        ("-e", "1".to_owned()),
        ("-c", "lo".to_owned()),
        ("-i", "*".to_owned()),
        ("-b", "*".to_owned()),
        ("-d", list(config.exclude_inbound_ports)),
        ("-o", list(config.exclude_outbound_ports)),
        ("-x", list(config.exclude_outbound_cidrs)),
    ] {
        AnnotationError::check(CONSUL_CONFIG, flag, &value)?;
        arguments.extend([flag.to_owned(), value]);
    }
    arguments.extend(defaults.arguments.iter().cloned());
    arguments.extend(sidecar::switches(annotations)?);
    Ok(captured(arguments, defaults))
}

#[cfg(test)]
mod tests;
