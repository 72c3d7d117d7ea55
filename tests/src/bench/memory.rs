//! The kernel memory that each mode takes for many connections, and how many connections one pod can have.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use aya::maps::loaded_maps;
use serde::{Deserialize, Serialize};

use super::interrupt;
use super::mode::{CaptureMode, Cell, Path};
use super::pool::WorkerPool;
use super::programs::maps;
use super::rig::{Rig, RigPods, Size, sources};
use super::worker::protocol::HeldConnections;
use super::worker::{WorkerAnswer, WorkerJob};

/// Descriptors that a process may use for connections: below every usual hard limit, with a margin for an uneven
/// distribution.
const PER_PROCESS: usize = 16_000;

/// How long the kernel may take to free closed connections.
const SETTLING: Duration = Duration::from_secs(15);

/// Many connections of one mode.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Crowd {
    /// Measured with the others of this round.
    #[serde(default)]
    pub round: usize,
    /// How they were captured.
    pub mode: CaptureMode,
    /// Requested number.
    pub wanted: usize,
    /// The result.
    pub held: HeldConnections,
    /// Growth of kernel memory in bytes: slabs that cannot be reclaimed, vmalloc and per-CPU memory.
    pub kernel: i64,
    /// Part of it in connection tracking's own slab, without extensions of its entries.
    pub conntrack: i64,
    /// Entries of connection tracking in the client's pod.
    pub tracked: u64,
    /// Bytes that the kernel accounts to the agent's maps.
    pub maps: i64,
}

/// What a crowd of connections measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trial {
    /// From several sources, so that every mode has enough ports.
    Memory,
    /// From one source to three destinations.
    Reach,
}

/// Opens connections through the client's pod's proxy and keeps them while the memory is read.
pub fn crowd(
    mode: CaptureMode,
    trial: Trial,
    wanted: usize,
    limit: Duration,
    pool: &WorkerPool,
) -> Result<Crowd> {
    let size = Size {
        clients: wanted.div_ceil(PER_PROCESS),
        relays: (2 * wanted).div_ceil(PER_PROCESS),
        servers: wanted.div_ceil(PER_PROCESS),
    };
    let cell = Cell { path: Path::Outbound, ..Cell::plain(mode) };
    let pods = RigPods::new(&mode.to_string())?;
    let mut rig = Rig::build(cell, size, &pods, pool)?;
    let (from, to) = match trial {
        Trial::Memory => (sources(), rig.destinations()),
        Trial::Reach => (Vec::new(), rig.destinations().into_iter().take(3).collect()),
    };
    let before = settled()?;
    let maps_before = map_bytes(mode, pool)?;
    let held = open(&mut rig, &from, &to, wanted, limit)?;
    let after = Usage::read()?;
    let maps = map_bytes(mode, pool)? - maps_before;
    let tracked =
        pods.client().netns.run(|| fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count"))?;
    let tracked = tracked.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    for client in &mut rig.clients {
        client.ask(&WorkerJob::Release, Duration::from_secs(30))?;
    }
    Ok(Crowd {
        round: 0,
        mode,
        wanted,
        held,
        kernel: after.kernel - before.kernel,
        conntrack: after.conntrack - before.conntrack,
        tracked,
        maps,
    })
}

fn open(
    rig: &mut Rig<'_>,
    from: &[IpAddr],
    to: &[SocketAddr],
    wanted: usize,
    limit: Duration,
) -> Result<HeldConnections> {
    let clients = rig.clients.len();
    for (n, client) in rig.clients.iter_mut().enumerate() {
        let connections = wanted * (n + 1) / clients - wanted * n / clients;
        client.tell(&WorkerJob::Hold { to: to.into(), from: from.into(), connections, limit })?;
    }
    let mut sum = HeldConnections { open: 0, failures: 0, errno: None, seconds: 0.0 };
    for client in &mut rig.clients {
        match client.answer(limit + Duration::from_secs(20))? {
            WorkerAnswer::Held(held) => {
                sum.open += held.open;
                sum.failures += held.failures;
                sum.errno = held.errno.or(sum.errno);
                sum.seconds = sum.seconds.max(held.seconds);
            }
            other => bail!("the client answered {other:?}"),
        }
    }
    Ok(sum)
}

/// Kernel memory in use, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Usage {
    kernel: i64,
    conntrack: i64,
}

impl Usage {
    fn read() -> Result<Self> {
        let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
        let kernel = text.lines().filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            let counted = ["SUnreclaim", "VmallocUsed", "Percpu"].contains(&name);
            counted.then(|| value.trim().trim_end_matches(" kB").parse::<i64>().ok())?
        });
        let kernel = kernel.sum::<i64>() * 1024;
        let slabs = fs::read_to_string("/proc/slabinfo").context("reading /proc/slabinfo")?;
        let conntrack = slabs.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            // name active total size ...; the first is left out when no pod has ever tracked.
            (words.first() == Some(&"nf_conntrack"))
                .then(|| Some(words.get(2)?.parse::<i64>().ok()? * words.get(3)?.parse::<i64>().ok()?))?
        });
        Ok(Self { kernel, conntrack: conntrack.unwrap_or(0) })
    }
}

/// The usage after closed connections are freed: when two readings agree.
fn settled() -> Result<Usage> {
    let deadline = Instant::now() + SETTLING;
    let mut last = Usage::read()?;
    loop {
        interrupt::check()?;
        std::thread::sleep(Duration::from_millis(300));
        let now = Usage::read()?;
        if (now.kernel - last.kernel).abs() < 512 * 1024 || Instant::now() > deadline {
            return Ok(now);
        }
        last = now;
    }
}

/// The memory that the kernel accounts to the maps that the agent's programs use.
fn map_bytes(mode: CaptureMode, pool: &WorkerPool) -> Result<i64> {
    if !mode.is_agent() {
        return Ok(0);
    }
    let ids = maps(pool)?;
    let mut bytes = 0;
    for map in loaded_maps() {
        // Maps of other programs may vanish meanwhile.
        let Ok(map) = map else { continue };
        if !ids.contains(&map.id()) {
            continue;
        }
        let fd = map.fd()?;
        let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let locked = text.lines().find_map(|line| line.strip_prefix("memlock:"));
        bytes += locked.and_then(|value| value.trim().parse::<i64>().ok()).unwrap_or(0);
    }
    Ok(bytes)
}
