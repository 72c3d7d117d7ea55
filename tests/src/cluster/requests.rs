//! What became of the application's requests, as its clients, its servers and their proxies have it.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{
    AccessLine, App, CLIENTS, Cluster, SERVICE,
    app::{EXEMPT, OTHER},
};

/// The client of a connection that a proxy in REDIRECT mode makes to its application.
const PASSTHROUGH: &str = "127.0.0.6";

/// What a container says of its requests, by path.
#[derive(Debug, Default)]
pub struct ClientRequests {
    /// Those that were answered.
    pub answered: Vec<String>,
    /// Those that were not.
    pub failed: Vec<String>,
}

/// A request, as its server has seen it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedRequest {
    /// The address that the connection came from.
    pub client: String,
    /// What was asked for: it starts with the names of the client's pod and container.
    pub path: String,
    /// The listeners of proxies that the request has passed, in this order.
    pub passed: Vec<String>,
}

/// How many requests have arrived at the servers, from their start on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestCounts {
    /// By both proxies.
    by_both: usize,
    /// By both proxies, of which the server's is in TPROXY mode.
    transparent: usize,
    /// Of an exempt container: by the server's proxy only.
    exempt: usize,
    /// From the node: by the server's proxy only.
    from_node: usize,
    /// Not by the client's proxy, although it should.
    around_outbound: Vec<ServedRequest>,
    /// Not by the server's proxy.
    around_inbound: Vec<ServedRequest>,
    /// Between pods without a sidecar.
    plain: usize,
    /// Of these, with a proxy on their way or from another address than the client's.
    touched_plain: Vec<ServedRequest>,
}

impl ServedRequest {
    /// Whether the container asks to be exempt.
    pub fn is_exempt(&self) -> bool {
        self.path.split('/').nth(2) == Some(EXEMPT)
    }
}

impl RequestCounts {
    /// Requests that have gone around a proxy.
    pub fn around_a_proxy(&self) -> usize {
        self.around_outbound.len() + self.around_inbound.len()
    }

    /// Requests to the pod in TPROXY mode that have passed both proxies.
    pub fn transparent(&self) -> usize {
        self.transparent
    }

    /// Requests of ignored pods that were not left alone.
    pub fn touched(&self) -> usize {
        self.touched_plain.len()
    }
}

impl fmt::Display for RequestCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} requests by both proxies and {} under TPROXY, {} around one; {} of an exempt container, {} of the node; {} \
             between plain pods, {} touched",
            self.by_both,
            self.transparent,
            self.around_a_proxy(),
            self.exempt,
            self.from_node,
            self.plain,
            self.touched(),
        )
    }
}

impl ClientRequests {
    /// Reads the log of a container.
    pub fn of(cluster: &Cluster, pod: &Value, container: &str) -> Result<Self> {
        let said = cluster.printed(pod, container)?;
        let with = |word: &str| {
            let lines = said.lines().filter_map(|line| line.strip_prefix(word));
            lines.map(|path| path.trim().to_owned()).collect()
        };
        Ok(Self { answered: with("answered "), failed: with("failed ") })
    }
}

/// Waits until a client has been answered so much more often.
pub fn wait_for_more(cluster: &Cluster, app: App, more: usize) -> Result<()> {
    if app == App::Job {
        return Ok(());
    }
    let answered =
        || -> Result<usize> { Ok(ClientRequests::of(cluster, &cluster.pod(app)?, "app")?.answered.len()) };
    let before = answered().unwrap_or_default();
    let what = format!("{} is answered {more} times", app.as_str());
    cluster.wait(&what, |_| Ok(answered()? >= before + more))
}

/// Reads the log of a server.
pub fn served(cluster: &Cluster, server: &Value) -> Result<Vec<ServedRequest>> {
    let said = cluster.printed(server, "app")?;
    let lines = said.lines().filter_map(|line| line.strip_prefix("served "));
    let parse = |line: &str| {
        let mut words = line.split(' ');
        let (client, path) = (words.next()?.to_owned(), words.next()?.to_owned());
        let passed = words.next().unwrap_or_default().split(',').filter(|name| !name.is_empty());
        Some(ServedRequest { client, path, passed: passed.map(str::to_owned).collect() })
    };
    lines.map(|line| parse(line).with_context(|| format!("a server says {line:?}"))).collect()
}

/// Counts what has arrived at both servers, also from clients that have ended.
pub fn count(cluster: &Cluster) -> Result<RequestCounts> {
    let mut counts = RequestCounts::default();
    for request in served(cluster, &cluster.pod(App::Backend)?)? {
        let passed: Vec<&str> = request.passed.iter().map(String::as_str).collect();
        let of_client = CLIENTS.iter().any(|app| request.path.starts_with(&format!("/{}-", app.as_str())));
        match (passed.as_slice(), of_client) {
            _ if passed.last() != Some(&"inbound") || request.client != PASSTHROUGH => {
                counts.around_inbound.push(request);
            }
            (["outbound", "inbound"], true) => counts.by_both += 1,
            (_, true) if request.is_exempt() => counts.exempt += 1,
            (_, true) => counts.around_outbound.push(request),
            (_, false) => counts.from_node += 1,
        }
    }
    count_transparent(cluster, &mut counts)?;
    let plain = cluster.pod(App::Plain)?;
    let address = plain["status"]["podIP"].as_str().context("a pod without address")?;
    let requests = served(cluster, &cluster.pod(App::PlainServer)?)?;
    for request in requests.into_iter().filter(|request| request.path.starts_with("/plain-")) {
        counts.plain += 1;
        if request.client != address || !request.passed.is_empty() {
            counts.touched_plain.push(request);
        }
    }
    Ok(counts)
}

/// Counts what has arrived at the pod in TPROXY mode, whose application sees the clients' own addresses.
fn count_transparent(cluster: &Cluster, counts: &mut RequestCounts) -> Result<()> {
    let client = cluster.pod(App::Frontend)?;
    let address = client["status"]["podIP"].as_str().context("a pod without address")?;
    let own = format!("/{}/", client["metadata"]["name"].as_str().context("a pod without a name")?);
    for request in served(cluster, &cluster.pod(App::Transparent)?)? {
        let passed: Vec<&str> = request.passed.iter().map(String::as_str).collect();
        let is_clients =
            request.client != PASSTHROUGH && (!request.path.starts_with(&own) || request.client == address);
        match (passed.as_slice(), request.path.starts_with("/frontend-")) {
            _ if passed.last() != Some(&"inbound") || !is_clients => counts.around_inbound.push(request),
            (["outbound", "inbound"], true) => counts.transparent += 1,
            (_, true) => counts.around_outbound.push(request),
            (_, false) => counts.from_node += 1,
        }
    }
    Ok(())
}

/// The requests to the pod in TPROXY mode.
pub fn of_other_client(cluster: &Cluster) -> Result<ClientRequests> {
    ClientRequests::of(cluster, &cluster.pod(App::Frontend)?, OTHER)
}

/// Every answered request of a client has passed its own proxy and the backend's, once each, with the destination that it
/// dialled and the client that dialled.
pub fn both_proxies_passed(cluster: &Cluster, client: &Value) -> Result<()> {
    let answered = ClientRequests::of(cluster, client, "app")?.answered;
    let backend = cluster.pod(App::Backend)?;
    // Read after what it said; Envoy writes its log every 50 ms.
    std::thread::sleep(std::time::Duration::from_millis(200));
    let address = |pod: &Value| pod["status"]["podIP"].as_str().unwrap_or_default().to_owned();
    let (from, to) = (address(client), address(&backend));
    for (proxy, listener, destination) in
        [(client, "outbound", format!("{SERVICE}:80")), (&backend, "inbound", format!("{to}:8080"))]
    {
        let logged = by_path(cluster.logged(proxy)?, listener);
        for path in &answered {
            match logged.get(path).map(Vec::as_slice) {
                Some([line]) => {
                    ensure!(line.original == destination, "{line:?}: the destination is {destination}");
                    ensure!(line.client.starts_with(&format!("{from}:")), "{line:?}: the client is {from}");
                }
                other => bail!("{path} has passed {listener} as {other:?}"),
            }
        }
    }
    Ok(())
}

/// How often each path is in an access log.
fn by_path(lines: Vec<AccessLine>, listener: &str) -> BTreeMap<String, Vec<AccessLine>> {
    let mut paths: BTreeMap<String, Vec<AccessLine>> = BTreeMap::new();
    for line in lines.into_iter().filter(|line| line.listener == listener) {
        paths.entry(line.path.clone()).or_default().push(line);
    }
    paths
}
