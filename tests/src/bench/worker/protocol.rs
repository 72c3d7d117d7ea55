//! The messages to and from workers, one JSON document per line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bench::cpu::Spent;

/// The first line of every worker.
pub const READY: &str = "\"ready\"";

/// The length of a request that the server takes as "everything, and do not answer".
pub const ENDLESS: u32 = u32::MAX;

/// The role of a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Role {
    /// Answers: a connection begins with the lengths of requests and responses, 4 bytes each in network order.
    Server {
        /// Where it listens, on all addresses.
        ports: Vec<u16>,
    },
    /// The pod's proxy.
    Relay(RelayRole),
    /// Makes connections on command.
    Client {
        /// The cgroups whose CPU time counts.
        pods: Vec<PathBuf>,
    },
}

/// A proxy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RelayRole {
    /// Where it listens, on all addresses.
    pub port: u16,
    /// Where it passes connections on.
    pub upstream: Upstream,
    /// What it binds before it connects.
    pub source: Option<IpAddr>,
}

/// Where a relay passes connections on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Upstream {
    /// To what SO_ORIGINAL_DST says.
    OriginalDestination,
    /// To these, in turn.
    Fixed(Vec<SocketAddr>),
}

/// How long a measurement takes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Timing {
    /// Before it counts.
    pub warm_up: Duration,
    /// While it counts.
    pub measure: Duration,
}

/// What a client can do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum WorkerJob {
    /// Connect, ask a byte, be answered a byte, reset; over and over.
    Connect {
        /// The server.
        to: SocketAddr,
        /// So many at the same time.
        clients: usize,
        /// How long.
        timing: Timing,
    },
    /// Requests and responses on connections that stay.
    Exchange {
        /// The server.
        to: SocketAddr,
        /// So many, each with one request under way.
        connections: usize,
        /// Bytes of a request, and of a response.
        size: u32,
        /// How long.
        timing: Timing,
    },
    /// As many bytes as go through one connection.
    Stream {
        /// The server.
        to: SocketAddr,
        /// How long.
        timing: Timing,
    },
    /// Open connections and keep them until [`WorkerJob::Release`].
    Hold {
        /// The servers, in turn.
        to: Vec<SocketAddr>,
        /// The sources to bind, in turn; none leaves it to the route.
        from: Vec<IpAddr>,
        /// So many.
        connections: usize,
        /// When to give up.
        limit: Duration,
    },
    /// Open a connection, write to it, and keep it until [`WorkerJob::Release`].
    Probe {
        /// The server.
        to: SocketAddr,
        /// What is written.
        say: String,
    },
    /// Close what [`WorkerJob::Hold`] and [`WorkerJob::Probe`] opened.
    Release,
}

/// What came of a job.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum WorkerAnswer {
    /// Of Connect, Exchange and Stream.
    Measured(Measured),
    /// Of Hold.
    Held(HeldConnections),
    /// Of Probe.
    Connected,
    /// Of Release.
    Released,
    /// It could not be done.
    Failed(String),
}

/// A measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measured {
    /// How long it took.
    pub seconds: f64,
    /// Connections, requests, or bytes.
    pub operations: u64,
    /// Connections that were refused, reset or closed early.
    pub failures: u64,
    /// Nanoseconds of one operation; none for bytes.
    pub latency: Option<Latency>,
    /// CPU time that went into it.
    pub cpu: Spent,
}

/// Percentiles, in nanoseconds. The generator has a fixed number of requests under way: a slow answer also holds
/// back the requests after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// The median.
    pub p50: u32,
    /// 99 of 100.
    pub p99: u32,
    /// 999 of 1000.
    pub p999: u32,
}

/// Connections that were opened and are kept.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct HeldConnections {
    /// So many are open, each has been answered.
    pub open: usize,
    /// So many failed.
    pub failures: u64,
    /// The last failure's error number.
    pub errno: Option<i32>,
    /// How long it took.
    pub seconds: f64,
}

impl Latency {
    /// Of a set of samples, which it sorts; none of an empty set.
    pub fn of(samples: &mut [u32]) -> Option<Self> {
        samples.sort_unstable();
        let at =
            |permille: usize| samples.get((samples.len() * permille / 1000).min(samples.len() - 1)).copied();
        if samples.is_empty() {
            return None;
        }
        Some(Self { p50: at(500)?, p99: at(990)?, p999: at(999)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_samples() {
        let mut samples: Vec<u32> = (0..1000).rev().collect();
        assert_eq!(Latency::of(&mut samples), Some(Latency { p50: 500, p99: 990, p999: 999 }));
        assert_eq!(Latency::of(&mut [7]), Some(Latency { p50: 7, p99: 7, p999: 7 }));
        assert_eq!(Latency::of(&mut []), None);
    }
}
