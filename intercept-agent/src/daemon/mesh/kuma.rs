//! Kuma's pods. Their options are in one annotation with YAML, or, before Kuma 3.0, in one annotation each.

use serde::{Deserialize, Deserializer, de::Error as _};

use super::{
    Annotations, Flags, Known, MeshVerdict, NO_GROUP, refuse_unsupported, unsupported_option, with_colons,
};
use crate::daemon::{
    desired::CaptureArgs,
    sidecar::{AnnotationError, Ipv6},
};

pub(super) const PROXY: &str = "kuma-sidecar";
pub(super) const INIT: &str = "kuma-init";
pub(super) const INJECTED: &str = "kuma.io/sidecar-injected";

/// The fixed rules. `-e 1` makes 15008 an ordinary port.
const FLAGS: [&str; 8] = ["-u", "5678", "-g", NO_GROUP, "-e", "1", "-i", "*"];
const DNS_FLAGS: [&str; 3] = ["--redirect-dns", "--capture-all-dns", "--dns-over-udp-only"];

const CONFIG: &str = "traffic.kuma.io/transparent-proxy-config";
const GATEWAY: &str = "kuma.io/gateway";
const DNS: &str = "kuma.io/builtin-dns";
const DNS_PORT: &str = "kuma.io/builtin-dns-port";
const FAMILY: &str = "kuma.io/transparent-proxying-ip-family-mode";
const PROBES: &str = "kuma.io/application-probe-proxy-port";
const INBOUND_PORTS: &str = "traffic.kuma.io/exclude-inbound-ports";

/// Annotations with a corresponding flag.
const ANNOTATIONS: [(&str, &str); 7] = [
    ("kuma.io/transparent-proxying-outbound-port", "-p"),
    ("kuma.io/transparent-proxying-inbound-port", "-z"),
    ("traffic.kuma.io/exclude-outbound-ports", "-o"),
    ("traffic.kuma.io/exclude-outbound-ips", "-x"),
    ("traffic.kuma.io/exclude-inbound-ips", "--exclude-inbound-cidr"),
    ("kuma.io/sidecar-uid", "-u"),
    (DNS_PORT, "--dns-capture-port"),
];
const UNSUPPORTED: [&str; 1] = ["traffic.kuma.io/exclude-outbound-ports-for-uids"];

pub(super) fn reads(annotation: &str) -> bool {
    [INJECTED, CONFIG, GATEWAY, DNS, FAMILY, PROBES, INBOUND_PORTS].contains(&annotation)
        || ANNOTATIONS.iter().any(|(name, _)| *name == annotation)
        || UNSUPPORTED.contains(&annotation)
}

pub(super) fn capture(annotations: &Annotations, known: Known<'_>, defaults: &CaptureArgs) -> MeshVerdict {
    let mut flags = Flags::default();
    flags.fixed(&FLAGS);
    flags.user(known.proxy);
    match annotations.get(CONFIG).filter(|text| !text.trim().is_empty()) {
        Some(text) => configured(text, &mut flags, defaults)?,
        None => annotated(annotations, &mut flags, defaults)?,
    }
    flags.captured(annotations, Ipv6::Always, defaults)
}

/// An annotation that is `enabled` or `true`.
fn is_enabled(annotations: &Annotations, name: &str) -> bool {
    annotations.get(name).is_some_and(|value| ["enabled", "true"].contains(&value.trim()))
}

fn annotated(
    annotations: &Annotations,
    flags: &mut Flags,
    defaults: &CaptureArgs,
) -> Result<(), AnnotationError> {
    refuse_unsupported(annotations, &UNSUPPORTED)?;
    if !is_enabled(annotations, GATEWAY) {
        flags.fixed(&["-b", "*"]);
    }
    let dns = is_enabled(annotations, DNS);
    if dns {
        flags.fixed(&DNS_FLAGS);
    }
    flags.0.extend(defaults.arguments.iter().cloned());
    for (name, flag) in ANNOTATIONS {
        let Some(value) = annotations.get(name).filter(|value| !value.trim().is_empty()) else { continue };
        let value = with_colons(value);
        let value = if flag == "-o" && dns { without_dns(&value) } else { value };
        flags.value(name, flag, &value)?;
    }
    let excluded = annotations.get(INBOUND_PORTS).map(|ports| with_colons(ports)).unwrap_or_default();
    let probes = annotations.get(PROBES).map(|port| port.trim()).filter(|port| *port != "0");
    flags.value(INBOUND_PORTS, "-d", &excluded)?;
    if let Some(port) = probes {
        flags.value(PROBES, "-d", port)?;
        flags.fixed(&["-d", &format!("{excluded},{port}")]);
    }
    family(FAMILY, annotations.get(FAMILY).map(String::as_str), flags)
}

/// Kuma excludes ports of TCP only, and leaves DNS over TCP alone anyway.
fn without_dns(ports: &str) -> String {
    ports.split(',').filter(|port| *port != "53").collect::<Vec<_>>().join(",")
}

fn family(annotation: &str, mode: Option<&str>, flags: &mut Flags) -> Result<(), AnnotationError> {
    match mode.map(str::trim) {
        None | Some("" | "dualstack") => Ok(()),
        Some("ipv4") => {
            flags.fixed(&["--without-ipv6"]);
            Ok(())
        }
        Some(other) => {
            let problem = format!("`{other}` is not an IP family mode; give dualstack or ipv4");
            Err(AnnotationError::new(annotation, problem))
        }
    }
}

/// The value of [`CONFIG`]. Fields that decide no flow are ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct KumaConfig {
    #[serde(rename = "kumaDPUser", deserialize_with = "scalar")]
    user: Option<String>,
    ip_family_mode: Option<String>,
    redirect: Redirect,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Redirect {
    inbound: KumaRedirect,
    outbound: KumaRedirect,
    dns: DnsConfig,
    vnet: VirtualNetworks,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct KumaRedirect {
    enabled: Option<bool>,
    #[serde(deserialize_with = "scalar")]
    port: Option<String>,
    include_ports: PortList,
    exclude_ports: PortList,
    #[serde(rename = "excludePortsForUIDs")]
    for_uids: Vec<String>,
    #[serde(rename = "excludePortsForIPs")]
    for_ips: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DnsConfig {
    enabled: bool,
    #[serde(deserialize_with = "scalar")]
    port: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct VirtualNetworks {
    networks: Vec<String>,
}

/// A number or text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar {
    Number(u32),
    Text(String),
}

impl Scalar {
    fn text(self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text,
        }
    }
}

fn scalar<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let value = Option::<Scalar>::deserialize(deserializer).map_err(D::Error::custom)?;
    Ok(value.map(Scalar::text).filter(|text| !text.is_empty()))
}

/// A list of ports, or text with commas.
#[derive(Debug, Default)]
struct PortList(String);

impl<'de> Deserialize<'de> for PortList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum ListOrText {
            List(Vec<Scalar>),
            One(Scalar),
        }
        Ok(Self(match Option::<ListOrText>::deserialize(deserializer)? {
            Some(ListOrText::List(ports)) => {
                ports.into_iter().map(Scalar::text).collect::<Vec<_>>().join(",")
            }
            Some(ListOrText::One(ports)) => ports.text(),
            None => String::new(),
        }))
    }
}

fn configured(text: &str, flags: &mut Flags, defaults: &CaptureArgs) -> Result<(), AnnotationError> {
    let config: KumaConfig = serde_saphyr::from_str(text)
        .map_err(|error| AnnotationError::new(CONFIG, format!("is not Kuma's configuration: {error}")))?;
    let Redirect { inbound, outbound, dns, vnet } = config.redirect;
    if !inbound.for_uids.is_empty() || !outbound.for_uids.is_empty() {
        return Err(unsupported_option(CONFIG, "excludePortsForUIDs has no corresponding flag"));
    }
    if !vnet.networks.is_empty() {
        return Err(unsupported_option(CONFIG, "vnet has no corresponding flag"));
    }
    if dns.enabled {
        flags.fixed(&DNS_FLAGS);
    }
    flags.0.extend(defaults.arguments.iter().cloned());
    let mut set = |flag: &str, value: &str| flags.value(CONFIG, flag, value);
    for (flag, value) in [
        ("-u", &config.user),
        ("-p", &outbound.port),
        ("-z", &inbound.port),
        ("--dns-capture-port", &dns.port),
    ] {
        if let Some(value) = value {
            set(flag, value)?;
        }
    }
    // PortList to include replace those to exclude, and all others.
    match (outbound.enabled, outbound.include_ports.0.as_str()) {
        (Some(false), _) => set("-i", "")?,
        (_, "") if dns.enabled => set("-o", &without_dns(&outbound.exclude_ports.0))?,
        (_, "") => set("-o", &outbound.exclude_ports.0)?,
        (_, ports) => {
            set("-i", "")?;
            set("-q", ports)?;
        }
    }
    match (inbound.enabled, inbound.include_ports.0.as_str()) {
        (Some(false), _) => set("-b", "")?,
        (_, "") => {
            set("-b", "*")?;
            set("-d", &inbound.exclude_ports.0)?;
        }
        (_, ports) => set("-b", ports)?,
    }
    set("-x", &outbound.for_ips.join(","))?;
    set("--exclude-inbound-cidr", &inbound.for_ips.join(","))?;
    family(CONFIG, config.ip_family_mode.as_deref(), flags)
}
