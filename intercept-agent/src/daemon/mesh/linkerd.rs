//! Linkerd's pods.

use super::{Annotations, Flags, Known, MeshVerdict, NO_GROUP, with_colons};
use crate::daemon::{
    desired::CaptureArgs,
    sidecar::{AnnotationError, Ipv6, Selection},
};

pub(super) const PROXY: &str = "linkerd-proxy";
pub(super) const INIT: &str = "linkerd-init";
pub(super) const INJECTED: &str = "linkerd.io/proxy-version";
/// The label of pods of the control plane.
pub(crate) const CONTROL_PLANE: &str = "linkerd.io/control-plane-component";

/// The variable with the address on which the proxy accepts inbound connections: `[::]:4143` if it has IPv6.
const LISTEN: &str = "LINKERD2_PROXY_INBOUND_LISTEN_ADDR";

/// The fixed rules. `-c lo` leaves loopback alone, and `-e 1` makes 15008 an ordinary port.
const FLAGS: [&str; 20] = [
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
];
/// The proxy's own ports, which are never captured inbound.
const OWN_PORTS: &str = "4190,4191";
/// The API's ports, which the control plane reaches without its proxy.
const API_PORTS: &str = "443,6443";

const SKIP_OUTBOUND: &str = "config.linkerd.io/skip-outbound-ports";
/// Annotation, flag, and a prefix for the annotation's value. An empty annotation counts as absent.
const ANNOTATIONS: [(&str, &str, &str); 5] = [
    ("config.linkerd.io/skip-inbound-ports", "-d", OWN_PORTS),
    (SKIP_OUTBOUND, "-o", ""),
    // The clients' addresses, not the destinations'.
    ("config.linkerd.io/skip-subnets", "--exclude-inbound-cidr", ""),
    ("config.linkerd.io/proxy-uid", "-u", ""),
    ("config.linkerd.io/proxy-gid", "-g", ""),
];

pub(super) fn reads(annotation: &str) -> bool {
    annotation == INJECTED || inherits(annotation)
}

pub(super) fn inherits(annotation: &str) -> bool {
    ANNOTATIONS.iter().any(|(name, ..)| *name == annotation)
}

pub(super) fn capture(
    annotations: &Annotations,
    known: Known<'_>,
    selection: &Selection,
    defaults: &CaptureArgs,
) -> MeshVerdict {
    let mut flags = Flags::default();
    flags.fixed(&FLAGS);
    flags.user(known.proxy);
    flags.0.extend(defaults.arguments.iter().cloned());
    for (name, flag, always) in ANNOTATIONS {
        let Some(value) = annotations.get(name).filter(|value| !value.trim().is_empty()) else { continue };
        let value = with_colons(value);
        AnnotationError::check(name, flag, &value)?;
        let value = if always.is_empty() { value } else { format!("{always},{value}") };
        flags.fixed(&[flag, &value]);
    }
    if known.control_plane {
        let skipped =
            annotations.get(SKIP_OUTBOUND).map_or_else(|| "4567,4568".to_owned(), |v| with_colons(v));
        flags.fixed(&["-o", &format!("{skipped},{API_PORTS}")]);
    }
    let listen = known.proxy.and_then(|proxy| proxy.environment.get(LISTEN));
    let ipv6 =
        if listen.is_some_and(|address| address.starts_with('[')) { Ipv6::Always } else { selection.ipv6 };
    flags.captured(annotations, ipv6, defaults)
}
