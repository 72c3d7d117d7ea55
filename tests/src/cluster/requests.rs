//! What became of the application's requests, as its clients, its servers and their proxies have it.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{
    AccessLine, App, CLIENTS, Cluster, SERVICE,
    app::{DUAL_STACK_SERVICES, EXEMPT, OTHER, OVER_IPV6, PORT},
};

/// The client of a connection that a proxy in REDIRECT mode makes to its application.
const PASSTHROUGH: &str = "127.0.0.6";
/// The same on IPv6.
const PASSTHROUGH_V6: &str = "::6";

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
    /// By both proxies, over IPv6.
    over_ipv6: usize,
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

impl RequestCounts {
    /// Requests that have gone around a proxy.
    pub fn around_a_proxy(&self) -> usize {
        self.around_outbound.len() + self.around_inbound.len()
    }

    /// Requests to the pod in TPROXY mode that have passed both proxies.
    pub fn transparent(&self) -> usize {
        self.transparent
    }

    /// Requests over IPv6 that have passed both proxies.
    pub fn over_ipv6(&self) -> usize {
        self.over_ipv6
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
            "{} requests by both proxies, {} under TPROXY and {} over IPv6, {} around one; {} of an exempt container, {} of \
             the node; {} between plain pods, {} touched",
            self.by_both,
            self.transparent,
            self.over_ipv6,
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

/// Which proxies a request has passed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Passed {
    Both,
    Inbound,
    NotInbound,
}

impl ServedRequest {
    /// By the listeners, and by the client that the server has seen.
    fn passed(&self, is_from_proxy: impl Fn(&Self) -> bool) -> Passed {
        match self.passed.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["outbound", "inbound"] if is_from_proxy(self) => Passed::Both,
            [.., "inbound"] if is_from_proxy(self) => Passed::Inbound,
            _ => Passed::NotInbound,
        }
    }

    /// Whether the container asks to be exempt.
    pub fn is_exempt(&self) -> bool {
        self.path.split('/').nth(2) == Some(EXEMPT)
    }

    fn is_of(&self, apps: &[App]) -> bool {
        apps.iter().any(|app| self.path.starts_with(&format!("/{}-", app.as_str())))
    }
}

/// Counts what has arrived at the servers, also from clients that have ended.
pub fn count(cluster: &Cluster) -> Result<RequestCounts> {
    let mut counts = RequestCounts::default();
    for request in served(cluster, &cluster.pod(App::Backend)?)? {
        let is_redirected = |request: &ServedRequest| request.client == PASSTHROUGH;
        counts.by_both += counts.take(request, &CLIENTS, is_redirected);
    }
    for request in served(cluster, &cluster.pod(App::DualStack)?)? {
        let is_ipv6 = request.path.split('/').nth(2) == Some(OVER_IPV6);
        let source = if is_ipv6 { PASSTHROUGH_V6 } else { PASSTHROUGH };
        let passed = counts.take(request, &[App::DualStackClient], |request| request.client == source);
        *if is_ipv6 { &mut counts.over_ipv6 } else { &mut counts.by_both } += passed;
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
    let is_transparent = |request: &ServedRequest| {
        request.client != PASSTHROUGH && (!request.path.starts_with(&own) || request.client == address)
    };
    for request in served(cluster, &cluster.pod(App::Transparent)?)? {
        counts.transparent += counts.take(request, &[App::Frontend], is_transparent);
    }
    Ok(())
}

impl RequestCounts {
    /// Takes in a request to a captured server, which clients with a sidecar and the node dial. Returns how many have passed
    /// both proxies: it, or none.
    fn take(
        &mut self,
        request: ServedRequest,
        clients: &[App],
        is_from_proxy: impl Fn(&ServedRequest) -> bool,
    ) -> usize {
        match (request.passed(is_from_proxy), request.is_of(clients)) {
            (Passed::NotInbound, _) => self.around_inbound.push(request),
            (Passed::Both, true) => return 1,
            (Passed::Inbound, true) if request.is_exempt() => self.exempt += 1,
            (Passed::Inbound, true) => self.around_outbound.push(request),
            (_, false) => self.from_node += 1,
        }
        0
    }
}

/// The requests to the pod in TPROXY mode.
pub fn of_other_client(cluster: &Cluster) -> Result<ClientRequests> {
    ClientRequests::of(cluster, &cluster.pod(App::Frontend)?, OTHER)
}

/// A container that dials a service.
#[derive(Clone, Copy, Debug)]
pub struct ServiceClient {
    /// Its pod.
    pub client: App,
    /// Its name.
    pub container: &'static str,
    /// The service's pod.
    pub server: App,
    /// The service.
    pub service: SocketAddr,
}

impl ServiceClient {
    /// Every client with a sidecar and every service with one, other than in TPROXY mode.
    pub fn all() -> Vec<Self> {
        let parse = |address: &str| SocketAddr::new(address.parse().expect("an address"), 80);
        let to_backend =
            |client| Self { client, container: "app", server: App::Backend, service: parse(SERVICE) };
        let [v4, v6] = DUAL_STACK_SERVICES.map(parse);
        let to_both = [("app", v4), (OVER_IPV6, v6)].map(|(container, service)| Self {
            client: App::DualStackClient,
            container,
            server: App::DualStack,
            service,
        });
        CLIENTS.map(to_backend).into_iter().chain(to_both).collect()
    }

    /// What the client says.
    pub fn requests(&self, cluster: &Cluster) -> Result<ClientRequests> {
        ClientRequests::of(cluster, &cluster.pod(self.client)?, self.container)
    }

    /// A pod's address of the service's family, as proxies log it.
    fn address(&self, pod: &Value) -> Result<SocketAddr> {
        let addresses = pod["status"]["podIPs"].as_array().into_iter().flatten();
        let mut addresses = addresses.filter_map(|one| one["ip"].as_str()?.parse::<IpAddr>().ok());
        let own = addresses.find(|address| address.is_ipv6() == self.service.is_ipv6());
        Ok(SocketAddr::new(own.with_context(|| format!("{:?} has no such address", self.client))?, PORT))
    }
}

/// Every answered request of a client has passed its own proxy and the server's, once each, with the destination that it
/// dialled and the client that dialled.
pub fn both_proxies_passed(cluster: &Cluster, route: &ServiceClient) -> Result<()> {
    let answered = route.requests(cluster)?.answered;
    ensure!(!answered.is_empty(), "no request is answered");
    let (client, server) = (cluster.pod(route.client)?, cluster.pod(route.server)?);
    // Read after what it said; Envoy writes its log every 50 ms.
    std::thread::sleep(std::time::Duration::from_millis(200));
    let from = route.address(&client)?.ip();
    for (proxy, listener, destination) in
        [(&client, "outbound", route.service), (&server, "inbound", route.address(&server)?)]
    {
        let logged = by_path(cluster.logged(proxy)?, listener);
        for path in &answered {
            match logged.get(path).map(Vec::as_slice) {
                Some([line]) => {
                    let original = line.original.parse();
                    ensure!(original == Ok(destination), "{line:?}: the destination is {destination}");
                    let client = line.client.parse::<SocketAddr>().map(|client| client.ip());
                    ensure!(client == Ok(from), "{line:?}: the client is {from}");
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
