//! Consul's pods. Their options are in one annotation with JSON.

use serde::Deserialize;

use super::{Annotations, Flags, MeshVerdict, NO_GROUP, unsupported_option};
use crate::daemon::{
    desired::CaptureArgs,
    sidecar::{AnnotationError, IgnoreReason, PodVerdict, Selection},
};

/// The annotation with all options of Consul's injector.
pub(super) const CONFIG: &str = "consul.hashicorp.com/redirect-traffic-config";
/// `enabled`, or `complete` once Consul's own plugin has captured the pod.
pub(super) const STATUS: &str = "consul.hashicorp.com/transparent-proxy-status";

/// The fixed rules. The proxy is told apart by user alone, `-e 1` makes 15008 an ordinary port, and a range of loopback
/// addresses in `-i` has connections to the pod's own addresses captured, except to 127.0.0.1 and ::1.
const FLAGS: [&str; 9] =
    ["-g", NO_GROUP, "-e", "1", "-i", "0.0.0.0/0,::/0,127.0.0.0/8", "-b", "*", "--without-self-capture"];

/// The value of [`CONFIG`].
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ConsulConfig {
    #[serde(rename = "ConsulDNSIP", default)]
    dns_ip: String,
    #[serde(rename = "ConsulDNSPort", default)]
    dns_port: u16,
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

pub(super) fn reads(annotation: &str) -> bool {
    [CONFIG, STATUS].contains(&annotation)
}

pub(super) fn capture(
    annotations: &Annotations,
    selection: &Selection,
    defaults: &CaptureArgs,
) -> MeshVerdict {
    let Some(text) = annotations.get(CONFIG) else {
        return Ok(PodVerdict::Ignore(IgnoreReason::NoSidecar));
    };
    if annotations.get(STATUS).is_none_or(|status| status != "enabled") {
        return Ok(PodVerdict::Ignore(IgnoreReason::ProxyDisabled));
    }
    let config: ConsulConfig =
        serde_json::from_str(text).map_err(|error| AnnotationError::new(CONFIG, error.to_string()))?;
    let mut flags = Flags::default();
    flags.fixed(&FLAGS);
    dns(&config, &mut flags)?;
    let users = [vec![config.proxy_user], config.exclude_uids.unwrap_or_default()].concat();
    let outbound = if config.proxy_outbound_port == 0 { 15001 } else { config.proxy_outbound_port };
    let list = |items: Option<Vec<String>>| items.unwrap_or_default().join(",");
    for (flag, value) in [
        ("-p", outbound.to_string()),
        ("-z", config.proxy_inbound_port.to_string()),
        ("-u", users.join(",")),
        ("-d", list(config.exclude_inbound_ports)),
        ("-o", list(config.exclude_outbound_ports)),
        ("-x", list(config.exclude_outbound_cidrs)),
    ] {
        flags.value(CONFIG, flag, &value)?;
    }
    flags.0.extend(defaults.arguments.iter().cloned());
    flags.captured(annotations, selection.ipv6, defaults)
}

/// Consul sends DNS for one server to another port of that server. This agent can if the server is in the pod.
fn dns(config: &ConsulConfig, flags: &mut Flags) -> Result<(), AnnotationError> {
    if config.dns_port == 0 {
        return match config.dns_ip.as_str() {
            "" => Ok(()),
            _ => Err(unsupported_option(CONFIG, "ConsulDNSIP sends DNS to a server outside the pod")),
        };
    }
    if !["", "127.0.0.1"].contains(&config.dns_ip.as_str()) {
        return Err(unsupported_option(CONFIG, "ConsulDNSIP sends DNS to a server other than 127.0.0.1"));
    }
    flags.fixed(&["--redirect-dns"]);
    flags.value(CONFIG, "--dns-capture-port", &config.dns_port.to_string())?;
    // With IPv6, Consul also listens on ::1.
    let servers = if config.dns_ip.is_empty() { "127.0.0.1,::1" } else { "127.0.0.1" };
    flags.value(CONFIG, "--dns-servers", servers)
}
