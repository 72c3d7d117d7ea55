//! Envoy as the proxy of a pod, or as the HTTP server behind it.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::interrupt;
use super::mode::ProxyKind;
use super::worker::Upstream;
use super::worker::protocol::RelayRole;
use crate::testbed::{Ids, Sandbox, name};

/// The variable that says where Envoy is.
pub const VARIABLE: &str = "INTERCEPT_ENVOY";

/// How long Envoy may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// Instances on one machine need numbers of their own; these are unlikely to be others'.
static BASE_ID: AtomicU32 = AtomicU32::new(0);

/// A running Envoy. Dropping it ends the process.
#[derive(Debug)]
pub struct Envoy {
    child: Child,
    _folder: TempDir,
}

impl Envoy {
    /// A pod's proxy: as the relay is, with Envoy's own means. The program must be one that every user may run.
    pub fn sidecar(program: &Path, sandbox: &Sandbox, relay: &RelayRole, kind: ProxyKind) -> Result<Self> {
        let mut cluster = cluster(relay);
        // The proxy that dials the other proxy has no source of its own.
        if kind == ProxyKind::EnvoyHttp2 && relay.source.is_none() {
            cluster["typed_extension_protocol_options"] = http2();
        }
        let filter = match kind {
            ProxyKind::EnvoyHttp | ProxyKind::EnvoyHttp2 => http(json!({"cluster": "upstream"}), "route"),
            ProxyKind::EnvoyTcp | ProxyKind::Relay => named(
                "envoy.filters.network.tcp_proxy",
                "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                json!({"stat_prefix": "tcp", "cluster": "upstream"}),
            ),
        };
        let mut listener = listener(relay.port, &filter);
        if matches!(relay.upstream, Upstream::OriginalDestination) {
            listener["listener_filters"] = json!([named(
                "envoy.filters.listener.original_dst",
                "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
                json!({}),
            )]);
        }
        Self::start(program, sandbox, Ids::PROXY, &[listener], &[cluster], relay.port, &[])
    }

    /// A server that answers every request with a few bytes.
    pub fn server(program: &Path, sandbox: &Sandbox, port: u16) -> Result<Self> {
        let answer = json!({"status": 200, "body": {"inline_string": "hello\n"}});
        let listener = listener(port, &http(answer, "direct_response"));
        Self::start(program, sandbox, Ids::APP, &[listener], &[], port, &[])
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Starts it with these parts and further arguments; returns when it listens on `port` of IPv4.
    pub(crate) fn start(
        program: &Path,
        sandbox: &Sandbox,
        ids: Ids,
        listeners: &[Value],
        clusters: &[Value],
        port: u16,
        more: &[&str],
    ) -> Result<Self> {
        let base = base_id().to_string();
        let alone = ["--concurrency", "1", "--disable-hot-restart", "--base-id", &base];
        let mut envoy = Self::launch(program, sandbox, ids, listeners, clusters, &[&alone, more].concat())?;
        envoy.wait_until_it_listens(port)?;
        Ok(envoy)
    }

    /// Starts it with these parts and arguments, and does not wait.
    pub(crate) fn launch(
        program: &Path,
        sandbox: &Sandbox,
        ids: Ids,
        listeners: &[Value],
        clusters: &[Value],
        arguments: &[&str],
    ) -> Result<Self> {
        let folder = name::scratch("envoy").context("making a folder")?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let path = folder.path().join("envoy.json");
        let config = json!({"static_resources": {"listeners": listeners, "clusters": clusters}});
        fs::write(&path, config.to_string()).with_context(|| format!("writing {}", path.display()))?;
        let child = sandbox
            .command_as(program, ids)?
            .arg("--config-path")
            .arg(&path)
            .args(["--log-level", "error"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        Ok(Self { child, _folder: folder })
    }

    /// Fails if it has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        let Some(status) = self.child.try_wait()? else { return Ok(()) };
        let mut said = String::new();
        if let Some(output) = &mut self.child.stderr {
            output.read_to_string(&mut said)?;
        }
        bail!("Envoy ended ({status}): {said}")
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Looks at the table of sockets: a connection would be one more that the proxy has to deal with.
    pub(crate) fn wait_until_it_listens(&mut self, port: u16) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let table = format!("/proc/{}/net/tcp", self.child.id());
        // "SL LOCAL:PORT REMOTE:PORT STATE ...", in hexadecimal; 0A is LISTEN.
        let local = format!("00000000:{port:04X}");
        loop {
            interrupt::check()?;
            let text = fs::read_to_string(&table).unwrap_or_default();
            let mut sockets = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            if sockets.any(|words| words.get(1) == Some(&&*local) && words.get(3) == Some(&"0A")) {
                return Ok(());
            }
            self.check()?;
            ensure!(Instant::now() < deadline, "Envoy does not listen on port {port} after {PATIENCE:?}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A number for `--base-id`.
pub(crate) fn base_id() -> u32 {
    std::process::id() % 100_000 * 100 + BASE_ID.fetch_add(1, Ordering::Relaxed) % 100
}

/// Where Envoy was installed.
pub fn program() -> Result<PathBuf> {
    let path = std::env::var_os(VARIABLE).with_context(|| {
        format!("Envoy is not known: run cargo xtask setup envoy, or set {VARIABLE} to its binary")
    })?;
    Ok(path.into())
}

pub(crate) fn named(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = kind.into();
    json!({"name": name, "typed_config": config})
}

fn listener(port: u16, filter: &Value) -> Value {
    json!({
        "address": {"socket_address": {"address": "0.0.0.0", "port_value": port}},
        "filter_chains": [{"filters": [filter]}],
    })
}

pub(crate) fn http(action: Value, kind: &str) -> Value {
    let router = named(
        "envoy.filters.http.router",
        "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
        json!({}),
    );
    let mut route = json!({"match": {"prefix": "/"}});
    route[kind] = action;
    named(
        "envoy.filters.network.http_connection_manager",
        "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": "http",
            "http_filters": [router],
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        }),
    )
}

/// Options of a cluster that is spoken to in HTTP/2.
fn http2() -> Value {
    json!({
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    })
}

fn cluster(relay: &RelayRole) -> Value {
    let mut cluster = json!({"name": "upstream", "connect_timeout": "5s"});
    match &relay.upstream {
        Upstream::OriginalDestination => {
            cluster["type"] = "ORIGINAL_DST".into();
            cluster["lb_policy"] = "CLUSTER_PROVIDED".into();
        }
        Upstream::Fixed(addresses) => {
            let endpoints: Vec<Value> = addresses
                .iter()
                .map(|to| {
                    let address = json!({"address": to.ip().to_string(), "port_value": to.port()});
                    json!({"endpoint": {"address": {"socket_address": address}}})
                })
                .collect();
            cluster["type"] = "STATIC".into();
            cluster["load_assignment"] =
                json!({"cluster_name": "upstream", "endpoints": [{"lb_endpoints": endpoints}]});
        }
    }
    if let Some(source) = relay.source {
        let address = json!({"address": source.to_string(), "port_value": 0});
        cluster["upstream_bind_config"] = json!({"source_address": address});
    }
    cluster
}
