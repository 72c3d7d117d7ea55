//! Envoy's configurations, as a sidecar's and a gateway's, and what it logs.

use serde::Deserialize;
use serde_json::{Value, json};

use super::app;
use crate::bench::envoy::{http, named};

/// What Envoy itself answers on, in every pod.
const ADMIN: u16 = 15000;
/// Where it says that it is ready.
pub(super) const READY: u16 = 15021;
/// Where a gateway listens.
pub(super) const GATEWAY: u16 = 8080;

/// The header that every listener adds with its name.
const PASSED: &str = "x-passed";

/// A line of the access log.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct AccessLine {
    /// `outbound`, `inbound` or `gateway`.
    pub listener: String,
    /// What was asked for: by this, requests are told apart.
    pub path: String,
    /// The original destination.
    pub original: String,
    /// The client.
    pub client: String,
    /// The answer's status.
    pub status: u16,
}

/// The mark of connections that a proxy in TPROXY mode makes from its client's address.
const MARK: u32 = 1337;

/// How the inbound listener accepts and goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Inbound {
    /// From 127.0.0.6.
    Redirected,
    /// From the client's own address.
    Transparent,
}

/// A sidecar in REDIRECT mode.
pub(super) fn sidecar() -> Value {
    listeners(Inbound::Redirected)
}

/// The same with `ISTIO_DUAL_STACK`: it also listens on IPv6, and reaches its application from ::6.
pub(super) fn dual_stack_sidecar() -> Value {
    let mut sidecar = sidecar();
    let resources = &mut sidecar["static_resources"];
    for listener in resources["listeners"].as_array_mut().into_iter().flatten() {
        let mut address = listener["address"].clone();
        address["socket_address"]["address"] = json!("::");
        listener["additional_addresses"] = json!([{ "address": address }]);
    }
    for cluster in resources["clusters"].as_array_mut().into_iter().flatten() {
        if let Some(bound) = cluster.get_mut("upstream_bind_config") {
            let source = json!({ "address": "::6", "port_value": 0 });
            bound["extra_source_addresses"] = json!([{ "address": source }]);
        }
    }
    sidecar
}

/// A sidecar in TPROXY mode.
pub(super) fn transparent_sidecar() -> Value {
    listeners(Inbound::Transparent)
}

/// Istio's two listeners, which go on to the original destination.
fn listeners(inbound: Inbound) -> Value {
    let (mut listeners, mut clusters) = (vec![ready()], Vec::new());
    for (name, port) in [("outbound", 15001), ("inbound", 15006)] {
        let mut listener = listener(name, port, name);
        listener["listener_filters"] = json!([named(
            "envoy.filters.listener.original_dst",
            "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
            json!({}),
        )]);
        let mut cluster = json!({
            "name": name, "connect_timeout": "5s", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED",
        });
        let is_transparent = name == "inbound" && inbound == Inbound::Transparent;
        if is_transparent {
            listener["transparent"] = json!(true);
            let filters = listener["listener_filters"].as_array_mut();
            filters.into_iter().for_each(|filters| filters.push(original_source()));
        } else if name == "inbound" {
            let source = json!({ "address": "127.0.0.6", "port_value": 0 });
            cluster["upstream_bind_config"] = json!({ "source_address": source });
        }
        listeners.push(listener);
        clusters.push(cluster);
    }
    configuration(&listeners, &clusters)
}

fn original_source() -> Value {
    named(
        "envoy.filters.listener.original_src",
        "type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc",
        json!({ "mark": MARK }),
    )
}

/// A gateway, which passes everything on to the service.
pub(super) fn gateway() -> Value {
    let address = json!({ "address": app::SERVICE, "port_value": 80 });
    let endpoint = json!({ "endpoint": { "address": { "socket_address": address } } });
    let cluster = json!({
        "name": "gateway", "connect_timeout": "5s", "type": "STATIC",
        "load_assignment": { "cluster_name": "gateway", "endpoints": [{ "lb_endpoints": [endpoint] }] },
    });
    configuration(&[ready(), listener("gateway", GATEWAY, "gateway")], &[cluster])
}

fn configuration(listeners: &[Value], clusters: &[Value]) -> Value {
    let admin = json!({ "address": "127.0.0.1", "port_value": ADMIN });
    json!({
        "admin": { "address": { "socket_address": admin } },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    })
}

fn listener(name: &str, port: u16, cluster: &str) -> Value {
    let log = named(
        "envoy.access_loggers.stdout",
        "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
        json!({ "log_format": { "json_format": {
            "listener": name,
            "path": "%REQ(:PATH)%",
            "original": "%DOWNSTREAM_LOCAL_ADDRESS%",
            "client": "%DOWNSTREAM_REMOTE_ADDRESS%",
            "status": "%RESPONSE_CODE%",
        } } }),
    );
    let mut filter = http(json!({ "cluster": cluster }), "route");
    filter["typed_config"]["access_log"] = json!([log]);
    // By this the server knows what a request has passed.
    filter["typed_config"]["route_config"]["request_headers_to_add"] =
        json!([{ "header": { "key": PASSED, "value": name } }]);
    on(name, port, &filter)
}

fn ready() -> Value {
    let answer = json!({ "status": 200, "body": { "inline_string": "ready\n" } });
    on("ready", READY, &http(answer, "direct_response"))
}

fn on(name: &str, port: u16, filter: &Value) -> Value {
    json!({
        "name": name,
        "address": { "socket_address": { "address": "0.0.0.0", "port_value": port } },
        "filter_chains": [{ "filters": [filter] }],
    })
}
