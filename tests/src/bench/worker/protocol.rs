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
    /// Answers requests. A connection begins with the lengths of its requests and responses, 4 bytes each in network order.
    Server {
        /// The port, on all addresses.
        ports: Vec<u16>,
    },
    /// The pod's proxy.
    Relay(RelayRole),
    /// Runs jobs.
    Client {
        /// The cgroups whose CPU time counts.
        pods: Vec<PathBuf>,
    },
}

/// A proxy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RelayRole {
    /// The port, on all addresses.
    pub port: u16,
    /// Where its connections go.
    pub upstream: Upstream,
    /// The source address of its connections.
    pub source: Option<IpAddr>,
}

/// Where the connections of a relay go.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Upstream {
    /// To the original destination (SO_ORIGINAL_DST).
    OriginalDestination,
    /// To these addresses, in turn.
    Fixed(Vec<SocketAddr>),
}

/// How long a measurement takes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Timing {
    /// The warm-up, which does not count.
    pub warm_up: Duration,
    /// The measured time.
    pub measure: Duration,
}

/// What a client can do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum WorkerJob {
    /// Connect, exchange one byte each way, reset, and repeat.
    Connect {
        /// The server.
        to: SocketAddr,
        /// Number of connections at the same time.
        clients: usize,
        /// The time of the measurement.
        timing: Timing,
    },
    /// Requests and responses on connections that stay open.
    Exchange {
        /// The server.
        to: SocketAddr,
        /// Number of connections, each with one request in flight.
        connections: usize,
        /// Bytes of a request, and of a response.
        size: u32,
        /// The time of the measurement.
        timing: Timing,
    },
    /// The throughput of one connection.
    Stream {
        /// The server.
        to: SocketAddr,
        /// The time of the measurement.
        timing: Timing,
    },
    /// Open connections and keep them until [`WorkerJob::Release`].
    Hold {
        /// The servers, in turn.
        to: Vec<SocketAddr>,
        /// Source addresses, in turn. If empty, the route selects the source.
        from: Vec<IpAddr>,
        /// Number of connections.
        connections: usize,
        /// The time limit.
        limit: Duration,
    },
    /// Open a connection, write to it, and keep it until [`WorkerJob::Release`].
    Probe {
        /// The server.
        to: SocketAddr,
        /// The bytes to write.
        say: String,
    },
    /// Close the connections of [`WorkerJob::Hold`] and [`WorkerJob::Probe`].
    Release,
}

/// The result of a job.
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
    /// The error of a job that failed.
    Failed(String),
}

/// A measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measured {
    /// The time it took.
    pub seconds: f64,
    /// Connections, requests, or bytes.
    pub operations: u64,
    /// Connections that were refused, reset or closed early.
    pub failures: u64,
    /// The time of one operation, in nanoseconds. None for bytes.
    pub latency: Option<Latency>,
    /// The CPU time that it used.
    pub cpu: Spent,
}

/// Percentiles, in nanoseconds. The client has a fixed number of requests in flight, so a slow response also delays the
/// requests after it.
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
    /// Number of open connections, each with a response.
    pub open: usize,
    /// Number of failures.
    pub failures: u64,
    /// The errno of the last failure.
    pub errno: Option<i32>,
    /// The time it took.
    pub seconds: f64,
}

impl Latency {
    /// The percentiles of samples, which it sorts. `None` without samples.
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
