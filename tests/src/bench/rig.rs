//! A pair of pods joined by veth, with their proxies, the client in the one and the server in the other.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::capture::TimedCapture;
use super::envoy::Envoy;
use super::interrupt;
use super::mode::{CaptureMode, Cell, Path, ProxyKind};
use super::pool::{WorkerPool, WorkerProcess};
use super::topology::{self, Topology};
use super::worker::protocol::RelayRole;
use super::worker::{Measured, Role, Timing, Upstream, WorkerAnswer, WorkerJob};
use crate::testbed::{Ids, Sandbox};

/// Where the server listens.
pub const SERVER_PORT: u16 = 8080;
/// Where outbound connections go.
const OUTBOUND: u16 = 15001;
/// Where inbound connections go.
const INBOUND: u16 = 15006;
/// What the server's proxy binds when it connects to the server.
const PASSTHROUGH: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);

/// How long a single connection may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Both pods have so many addresses.
const ADDRESSES: u8 = 4;

/// How many processes of a kind there are, where one may not have enough descriptors.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Clients.
    pub clients: usize,
    /// Relays of a pod.
    pub relays: usize,
    /// Servers.
    pub servers: usize,
}

impl Size {
    /// One of each.
    pub const ONE: Self = Self { clients: 1, relays: 1, servers: 1 };
}

/// The two pods, unoccupied.
#[derive(Debug)]
pub struct RigPods {
    pub(super) client: Sandbox,
    server: Sandbox,
    _node: Option<Sandbox>,
}

/// Captured pods with their processes. Dropping it ends the processes and releases the pods, which [`RigPods`] removes.
#[derive(Debug)]
pub struct Rig<'a> {
    cell: Cell,
    /// What makes the connections.
    pub clients: Vec<WorkerProcess>,
    _workers: Vec<WorkerProcess>,
    _envoys: Vec<Envoy>,
    _captures: Vec<TimedCapture<'a>>,
    pods: &'a RigPods,
}

impl RigPods {
    /// Two new pods, connected by a veth pair.
    pub fn new(label: &str) -> Result<Self> {
        Self::connected(label, Topology::Veth)
    }

    /// Two new pods, connected.
    pub fn connected(label: &str, topology: Topology) -> Result<Self> {
        let client = Sandbox::new(&format!("{label}-client"))?;
        let server = Sandbox::new(&format!("{label}-server"))?;
        let [clients, servers] = [client_address, server_address].map(|address| (0..ADDRESSES).map(address));
        let (clients, servers): (Vec<_>, Vec<_>) = (clients.collect(), servers.collect());
        let node = topology::connect(topology, (&client.netns, &clients), (&server.netns, &servers))?;
        Ok(Self { client, server, _node: node })
    }

    /// The client's pod.
    pub fn client(&self) -> &Sandbox {
        &self.client
    }

    /// The server's pod.
    pub fn server(&self) -> &Sandbox {
        &self.server
    }

    /// The cgroups of both.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        [&self.client, &self.server].map(|pod| pod.cgroup.path().to_owned()).into()
    }
}

fn client_address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 66, 0, 2 + n)
}

fn server_address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 66, 0, 102 + n)
}

/// How many sockets processes have.
fn sockets(processes: &[u32]) -> Result<usize> {
    let mut count = 0;
    for process in processes {
        let folder = format!("/proc/{process}/fd");
        let entries =
            fs::read_dir(&folder).with_context(|| format!("listing {folder}; has the proxy died?"))?;
        let targets = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        count += targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count();
    }
    Ok(count)
}

/// The addresses of the client's pod.
pub fn sources() -> Vec<IpAddr> {
    (0..ADDRESSES).map(|n| client_address(n).into()).collect()
}

/// The server's addresses, with its port.
fn servers(port: u16) -> Vec<SocketAddr> {
    (0..ADDRESSES).map(|n| (server_address(n), port).into()).collect()
}

impl<'a> Rig<'a> {
    /// Captures the pods and then starts the processes, in the order of an init container.
    pub fn build(cell: Cell, size: Size, pods: &'a RigPods, pool: &WorkerPool) -> Result<Self> {
        let here = || format!("setting up {} ({}, {}, {})", cell.mode, cell.path, cell.lists, cell.proxy);
        Self::try_build(cell, size, pods, pool).with_context(here)
    }

    fn try_build(cell: Cell, size: Size, pods: &'a RigPods, pool: &WorkerPool) -> Result<Self> {
        let proxied = cell.mode != CaptureMode::None;
        let outbound = proxied && cell.path != Path::Inbound;
        let inbound = proxied && cell.path != Path::Outbound;
        let mut captures = Vec::new();
        for (wanted, sandbox) in [(outbound, &pods.client), (inbound, &pods.server)] {
            if wanted && cell.mode.captures() {
                let mut capture = TimedCapture::prepare(cell.mode, &cell.lists.options(), sandbox, pool)?;
                capture.install()?;
                captures.push(capture);
            }
        }
        let mut workers = Vec::new();
        let mut passed = Vec::new();
        let mut envoys = Vec::new();
        if cell.proxy.is_http() {
            envoys.push(Envoy::server(pool.envoy()?, &pods.server, SERVER_PORT)?);
        } else {
            let server = Role::Server { ports: vec![SERVER_PORT] };
            for _ in 0..size.servers {
                workers.push(pool.start(&pods.server, Ids::APP, &server)?);
            }
        }
        let next = if inbound { INBOUND } else { SERVER_PORT };
        let proxies = [
            (inbound, &pods.server, INBOUND, SERVER_PORT, Some(PASSTHROUGH.into())),
            (outbound, &pods.client, OUTBOUND, next, None),
        ];
        for (wanted, sandbox, port, next, source) in proxies {
            if !wanted {
                continue;
            }
            let upstream = match cell.mode {
                // To as many destinations as the client of the other modes.
                CaptureMode::Explicit if size.relays == 1 => Upstream::Fixed(servers(next)[..1].into()),
                CaptureMode::Explicit => Upstream::Fixed(servers(next)),
                _ => Upstream::OriginalDestination,
            };
            let relay = RelayRole { port, upstream, source };
            let mut processes = Vec::new();
            if cell.proxy == ProxyKind::Relay {
                for _ in 0..size.relays {
                    let worker = pool.start(sandbox, Ids::PROXY, &Role::Relay(relay.clone()))?;
                    processes.push(worker.pid());
                    workers.push(worker);
                }
            } else {
                let envoy = Envoy::sidecar(pool.envoy()?, sandbox, &relay, cell.proxy)?;
                processes.push(envoy.pid());
                envoys.push(envoy);
            }
            passed.push(processes);
        }
        let role = Role::Client { pods: pods.cgroups() };
        let clients =
            (0..size.clients).map(|_| pool.start(&pods.client, Ids::APP, &role)).collect::<Result<_>>()?;
        let mut rig = Self { cell, clients, _workers: workers, _envoys: envoys, _captures: captures, pods };
        rig.prove(&passed, pool)?;
        Ok(rig)
    }

    /// Makes sure that a connection passes the proxies of each pod that is to be captured: a way around them
    /// would look fast.
    fn prove(&mut self, proxies: &[Vec<u32>], pool: &WorkerPool) -> Result<()> {
        let before = proxies.iter().map(|pod| sockets(pod)).collect::<Result<Vec<_>>>()?;
        let say = if self.cell.proxy.is_http() { "GET / HTTP/1.1\r\nHost: pod\r\n\r\n" } else { "" };
        let to = self.destinations()[0];
        let client = &mut self.clients[0];
        client.ask(&WorkerJob::Probe { to, say: say.into() }, PATIENCE)?;
        for (pod, before) in proxies.iter().zip(before) {
            let deadline = Instant::now() + PATIENCE;
            // The one that was accepted, and the one that goes onwards.
            while sockets(pod)? < before + 2 {
                interrupt::check()?;
                ensure!(
                    Instant::now() < deadline,
                    "a connection to {to} has not passed the proxy: it is not captured"
                );
                std::thread::yield_now();
            }
        }
        client.ask(&WorkerJob::Release, PATIENCE)?;
        if self.cell.mode.is_accelerated() { self.prove_joined(pool) } else { Ok(()) }
    }

    /// Makes sure that the connection between two captured pods was joined, and that no other was.
    fn prove_joined(&self, pool: &WorkerPool) -> Result<()> {
        let agent = pool.agent_of(self.cell.mode)?;
        let mut joined = 0;
        if self.cell.path != Path::Inbound {
            joined += agent.joined(&self.pods.client)?;
        }
        if self.cell.path != Path::Outbound {
            joined += agent.joined(&self.pods.server)?;
        }
        let both = self.cell.path == Path::Both;
        ensure!(
            (joined > 0) == both,
            "{joined} ends were joined, with these pods captured: {}",
            self.cell.path
        );
        Ok(())
    }

    /// What this is.
    pub fn cell(&self) -> Cell {
        self.cell
    }

    /// The pods it is made of.
    pub fn pods(&self) -> &'a RigPods {
        self.pods
    }

    /// What the client dials, once for each address of the server.
    pub fn destinations(&self) -> Vec<SocketAddr> {
        match (self.cell.mode, self.cell.path) {
            (CaptureMode::Explicit, Path::Both | Path::Outbound) => {
                vec![(Ipv4Addr::LOCALHOST, OUTBOUND).into()]
            }
            (CaptureMode::Explicit, Path::Inbound) => servers(INBOUND),
            _ => servers(SERVER_PORT),
        }
    }

    /// Measures one job of the client.
    pub fn measure(&mut self, job: &WorkerJob, timing: Timing) -> Result<Measured> {
        let limit = timing.warm_up + timing.measure + Duration::from_secs(10);
        let cell = self.cell;
        let measured =
            match self.clients[0].ask(job, limit).with_context(|| format!("measuring {}", cell.mode))? {
                WorkerAnswer::Measured(measured) => measured,
                other => bail!("the client answered {other:?}"),
            };
        // A few lost connections are the machine's; many are the mode's, and no figure.
        ensure!(
            measured.failures * 100 <= measured.operations.max(100),
            "measuring {}: {} connections failed beside {} operations",
            cell.mode,
            measured.failures,
            measured.operations
        );
        Ok(measured)
    }
}
