//! Which pairs of pods do which work, how often and how long.

use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::goals;
use super::mode::{CaptureMode, Cell, Lists, Path, ProxyKind};
use super::topology::Topology;
use super::work::Work;
use super::worker::Timing;

/// wrk counts in whole seconds.
const WRK_MEASURES: Duration = Duration::from_secs(1);

/// A part of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Section {
    /// New connections
    Connect,
    /// Requests and responses on connections that stay
    Exchange,
    /// Bulk
    Stream,
    /// Only one of the two pods captured
    Paths,
    /// Many excluded networks and ports
    Lists,
    /// Envoy instead of the relay, copying bytes
    EnvoyTcp,
    /// Envoy instead of the relay, understanding HTTP
    EnvoyHttp,
    /// Joined connections between proxies, beside the agent without them
    Acceleration,
    /// Time to capture a pod and to release it
    Install,
    /// Time and runs of each BPF program
    Programs,
    /// Kernel memory of many connections
    Memory,
    /// How many connections one pod can have to three destinations
    Reach,
}

/// Cells that do the same works, interleaved.
#[derive(Debug, Clone)]
pub struct Suite {
    /// What it is called.
    pub title: &'static str,
    /// What is between the pods.
    pub topology: Topology,
    /// Compared with each other.
    pub cells: Vec<Cell>,
    /// What each of them does.
    pub works: Vec<Work>,
    /// So often.
    pub rounds: usize,
    /// For how long.
    pub timing: Timing,
}

/// How much is measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Compared; in the order of tables.
    pub modes: Vec<CaptureMode>,
    /// Parts that are wanted.
    pub sections: Vec<Section>,
    /// A smaller choice, for three minutes.
    pub quick: bool,
    /// Envoy is not there.
    pub without_envoy: bool,
    /// Overrides how often everything is measured.
    pub rounds: Option<usize>,
}

impl Plan {
    /// Whether a part is wanted.
    pub fn has(&self, section: Section) -> bool {
        self.sections.contains(&section)
    }

    /// One of two figures.
    pub fn choose<T>(&self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }

    /// How often something is measured.
    pub fn rounds(&self, quick: usize, full: usize) -> usize {
        self.rounds.unwrap_or(self.choose(quick, full))
    }

    fn timing(&self) -> Timing {
        let [warm_up, measure] = self.choose([80, 320], [200, 1000]).map(Duration::from_millis);
        Timing { warm_up, measure }
    }

    /// Those of the modes that are among `wanted`.
    fn among(&self, wanted: &[CaptureMode]) -> Vec<CaptureMode> {
        self.modes.iter().copied().filter(|mode| wanted.contains(mode)).collect()
    }

    /// Only the section on joined connections compares two builds that join.
    fn without_joining_baseline(&self) -> impl Iterator<Item = CaptureMode> + use<'_> {
        self.modes.iter().copied().filter(|mode| *mode != CaptureMode::BaselineAccelerated)
    }

    /// The modes of the smaller parts: of the netfilter ones only the usual one in quick runs.
    fn few(&self) -> Vec<CaptureMode> {
        let few = [
            CaptureMode::Explicit,
            CaptureMode::IptablesNft,
            CaptureMode::Baseline,
            CaptureMode::Agent,
            CaptureMode::Accelerated,
        ];
        if self.quick {
            return self.among(&few);
        }
        // Beside iptables, which is in the list already.
        self.without_joining_baseline().filter(|mode| *mode != CaptureMode::Shadowed).collect()
    }

    /// The modes that are given many connections: one of those that share a mechanism.
    pub fn crowded(&self) -> Vec<CaptureMode> {
        self.among(&[
            CaptureMode::Explicit,
            CaptureMode::IptablesNft,
            CaptureMode::Nft,
            CaptureMode::Baseline,
            CaptureMode::Agent,
        ])
        .into_iter()
        .filter(|mode| !self.quick || *mode != CaptureMode::Nft)
        .collect()
    }

    /// The parts that consist of rounds.
    pub fn suites(&self) -> Vec<Suite> {
        let suites = [self.plain(), self.paths(), self.lists(), self.envoy_tcp(), self.envoy_http()];
        suites
            .into_iter()
            .chain(self.acceleration())
            .filter(|suite| !suite.cells.is_empty() && !suite.works.is_empty())
            .collect()
    }

    fn plain(&self) -> Suite {
        let mut works = Vec::new();
        if self.has(Section::Connect) {
            works.extend([1, 8].map(|clients| Work::Connect { clients }));
        }
        if self.has(Section::Exchange) {
            for size in self.choose(&[128][..], &[128, 4096]) {
                for &connections in self.choose(&[1, 16][..], &[1, 16, 128]) {
                    works.push(Work::Exchange { size: *size, connections });
                }
            }
        }
        if self.has(Section::Stream) {
            works.push(Work::Stream);
        }
        let cells = self.without_joining_baseline().map(Cell::plain).collect();
        Suite { title: "both pods captured", cells, works, rounds: self.rounds(5, 11), ..self.empty() }
    }

    fn paths(&self) -> Suite {
        let mut suite = Suite { title: "one pod captured", rounds: self.rounds(3, 7), ..self.empty() };
        if self.has(Section::Paths) {
            suite.works = vec![Work::Connect { clients: 8 }, Work::Exchange { size: 128, connections: 16 }];
            for path in [Path::Outbound, Path::Inbound] {
                let modes = self.few().into_iter().filter(|mode| *mode != CaptureMode::None);
                suite.cells.extend(modes.map(|mode| Cell { path, ..Cell::plain(mode) }));
            }
        }
        suite
    }

    fn lists(&self) -> Suite {
        let mut suite = Suite { title: "long lists", rounds: self.rounds(3, 7), ..self.empty() };
        if self.has(Section::Lists) {
            suite.works = vec![Work::Connect { clients: 8 }];
            let full = [
                Lists::Injected,
                Lists::Cidrs(100),
                Lists::Cidrs(1000),
                Lists::Cidrs(10_000),
                Lists::Ports(1000),
            ];
            for &lists in self.choose(&[Lists::Injected, Lists::Cidrs(10_000)][..], &full) {
                let modes = self.few().into_iter().filter(|mode| mode.captures() && !mode.is_accelerated());
                suite.cells.extend(modes.map(|mode| Cell { lists, ..Cell::plain(mode) }));
            }
        }
        suite
    }

    fn envoy_tcp(&self) -> Suite {
        let mut suite = Suite { title: "Envoy, TCP", rounds: self.rounds(3, 7), ..self.empty() };
        if self.has(Section::EnvoyTcp) {
            suite.works = vec![Work::Connect { clients: 8 }, Work::Exchange { size: 128, connections: 16 }];
            suite.cells = self
                .few()
                .iter()
                .map(|&mode| Cell { proxy: ProxyKind::EnvoyTcp, ..Cell::plain(mode) })
                .collect();
        }
        suite
    }

    fn envoy_http(&self) -> Suite {
        let mut suite = Suite { title: "Envoy, HTTP", rounds: self.rounds(3, 7), ..self.empty() };
        suite.timing.measure = WRK_MEASURES;
        if self.has(Section::EnvoyHttp) {
            suite.works = vec![Work::Http { connections: 16 }];
            suite.cells = self
                .few()
                .iter()
                .map(|&mode| Cell { proxy: ProxyKind::EnvoyHttp, ..Cell::plain(mode) })
                .collect();
        }
        suite
    }

    /// The works that have goals, in all modes that matter to them.
    fn acceleration(&self) -> Vec<Suite> {
        let mut suites: Vec<Suite> = Vec::new();
        if !self.has(Section::Acceleration) {
            return suites;
        }
        let modes = self.among(&[
            CaptureMode::IptablesNft,
            CaptureMode::Agent,
            CaptureMode::BaselineAccelerated,
            CaptureMode::Accelerated,
        ]);
        let wanted = |goal: &goals::Goal| goal.suite.proxy == ProxyKind::Relay || !self.without_envoy;
        for goal in goals::ALL.into_iter().filter(wanted) {
            if let Some(suite) = suites.iter_mut().find(|suite| suite.title == goal.suite.title) {
                suite.works.push(goal.work);
                continue;
            }
            let goals::GoalSuite { title, topology, path, proxy } = goal.suite;
            let cells = modes.iter().map(|&mode| Cell { path, proxy, ..Cell::plain(mode) }).collect();
            let works = vec![goal.work];
            let mut suite =
                Suite { title, topology, cells, works, rounds: self.rounds(3, 20), ..self.empty() };
            if proxy.is_http() {
                suite.timing.measure = WRK_MEASURES;
            }
            suites.push(suite);
        }
        suites
    }

    fn empty(&self) -> Suite {
        Suite {
            title: "",
            topology: Topology::Veth,
            cells: Vec::new(),
            works: Vec::new(),
            rounds: 0,
            timing: self.timing(),
        }
    }
}

impl Suite {
    /// How long it will take, roughly, in seconds.
    pub fn seconds(&self) -> f64 {
        let one = (self.timing.warm_up + self.timing.measure).as_secs_f64() + 0.02;
        let set_up =
            self.cells.iter().map(|cell| if cell.proxy == ProxyKind::Relay { 0.3 } else { 1.0 }).sum::<f64>();
        (self.cells.len() * self.works.len() * self.rounds) as f64 * one + set_up
    }
}
