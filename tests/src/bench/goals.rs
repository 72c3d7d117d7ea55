//! What joined connections are to gain, as ratios to the agent without them in the same run.

use super::mode::{Path, ProxyKind};
use super::topology::Topology;
use super::work::Work;

/// Where a work is done: goals of one suite are measured together.
#[derive(Debug, Clone, Copy)]
pub struct GoalSuite {
    /// The title of the suite.
    pub title: &'static str,
    /// What is between the pods.
    pub topology: Topology,
    /// Which of them are captured.
    pub path: Path,
    /// By which proxy.
    pub proxy: ProxyKind,
}

/// A work and what is expected of it.
#[derive(Debug, Clone, Copy)]
pub struct Goal {
    /// Where.
    pub suite: GoalSuite,
    /// What.
    pub work: Work,
    /// The minimum ratio of rates.
    pub rate: Option<f64>,
    /// The maximum ratio of median latencies.
    pub p50: Option<f64>,
    /// The maximum ratio of CPU time for a unit.
    pub cpu: Option<f64>,
}

const NODE: GoalSuite = GoalSuite {
    title: "two pods of a node",
    topology: Topology::Node,
    path: Path::Both,
    proxy: ProxyKind::Relay,
};
/// Apart from the others: after many short connections to a destination, most of the next stay on TCP.
const NEW_CONNECTIONS: GoalSuite = GoalSuite { title: "two pods of a node, new connections", ..NODE };
const NOT_JOINED: GoalSuite =
    GoalSuite { title: "to a pod that is not captured, so never joined", path: Path::Outbound, ..NODE };
const VETH: GoalSuite = GoalSuite { title: "two pods on one veth", topology: Topology::Veth, ..NODE };
const ENVOY_TCP: GoalSuite =
    GoalSuite { title: "two pods of a node, Envoy, TCP", proxy: ProxyKind::EnvoyTcp, ..NODE };
const ENVOY_HTTP: GoalSuite =
    GoalSuite { title: "two pods of a node, Envoy, HTTP/1.1", proxy: ProxyKind::EnvoyHttp, ..NODE };
const ENVOY_HTTP2: GoalSuite =
    GoalSuite { title: "two pods of a node, Envoy, HTTP/2", proxy: ProxyKind::EnvoyHttp2, ..NODE };

const fn latency(size: u32, connections: usize, p50: f64, cpu: f64) -> Goal {
    let work = Work::Exchange { size, connections };
    Goal { suite: NODE, work, rate: None, p50: Some(p50), cpu: Some(cpu) }
}

const fn rate(suite: GoalSuite, work: Work, rate: f64) -> Goal {
    Goal { suite, work, rate: Some(rate), p50: None, cpu: None }
}

const SIXTEEN: Work = Work::Exchange { size: 128, connections: 16 };
const HTTP: Work = Work::Http { connections: 16 };

/// All goals, in the order of the report.
pub const ALL: [Goal; 11] = [
    latency(128, 1, 0.88, 0.82),
    latency(128, 16, 0.88, 0.82),
    latency(4096, 1, 0.78, 0.75),
    latency(4096, 16, 0.78, 0.75),
    Goal { cpu: Some(0.88), ..rate(NODE, Work::Stream, 1.15) },
    rate(NEW_CONNECTIONS, Work::Connect { clients: 8 }, 0.98),
    rate(NOT_JOINED, Work::Stream, 0.98),
    rate(VETH, SIXTEEN, 1.15),
    rate(ENVOY_TCP, SIXTEEN, 1.08),
    rate(ENVOY_HTTP, HTTP, 1.08),
    rate(ENVOY_HTTP2, HTTP, 1.03),
];

impl Goal {
    /// The goal of a work in a suite.
    pub fn of(suite: &str, work: Work) -> Option<&'static Self> {
        ALL.iter().find(|goal| goal.suite.title == suite && goal.work == work)
    }
}
