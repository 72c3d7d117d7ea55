//! What the client does.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::worker::{Timing, WorkerJob};

/// One kind of traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// Fresh connections, one byte each way.
    Connect {
        /// At the same time.
        clients: usize,
    },
    /// Requests on connections that stay.
    Exchange {
        /// Bytes of a request and of a response.
        size: u32,
        /// At the same time.
        connections: usize,
    },
    /// One way, as much as goes through.
    Stream,
    /// HTTP requests, made by wrk.
    Http {
        /// At the same time.
        connections: usize,
    },
}

impl Work {
    /// The job of the client; none if the client is another program.
    pub fn job(self, to: SocketAddr, timing: Timing) -> Option<WorkerJob> {
        Some(match self {
            Self::Connect { clients } => WorkerJob::Connect { to, clients, timing },
            Self::Exchange { size, connections } => WorkerJob::Exchange { to, connections, size, timing },
            Self::Stream => WorkerJob::Stream { to, timing },
            Self::Http { .. } => return None,
        })
    }

    /// What is counted, in the plural.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Connect { .. } => "connections",
            Self::Exchange { .. } | Self::Http { .. } => "requests",
            Self::Stream => "MiB",
        }
    }

    /// So many counted operations are one of [`Work::unit`].
    pub fn per_unit(self) -> f64 {
        if self == Self::Stream { 1_048_576.0 } else { 1.0 }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Connect { clients } => format!("connect-{clients}"),
            Self::Exchange { size, connections } if size % 1024 == 0 => {
                format!("exchange-{}KiB-{connections}", size / 1024)
            }
            Self::Exchange { size, connections } => format!("exchange-{size}B-{connections}"),
            Self::Stream => "stream".into(),
            Self::Http { connections } => format!("http-{connections}"),
        };
        f.pad(&text)
    }
}
