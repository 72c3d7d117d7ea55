//! What shadow mode has found: how often a pod's decisions agreed with what happened, and each kind of difference.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use intercept_common::{
    Reason,
    layout::{ComparedFlow, DifferenceKey, ShadowCounters, outcome},
};
use serde::Serialize;

use crate::{
    ids::{CookieNumber, NetnsCookie},
    maps::{MapsError, ShadowMaps},
    trace,
};

mod news;

pub use news::ShadowRecord;

/// What was found for a pod. The names in JSON are stable.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ShadowReport {
    /// Netns cookie.
    #[serde(with = "CookieNumber")]
    pub netns_cookie: NetnsCookie,
    /// When counting began, in seconds since 1970.
    pub since: u64,
    /// Number of flows that were compared.
    pub compared: u64,
    /// Number of these that differed.
    pub differed: u64,
    /// Flows of which it is not known what happened.
    pub uncompared: u64,
    /// Counts by reason.
    pub reasons: Vec<ReasonAgreement>,
    /// Each kind of difference.
    pub differences: Vec<FoundDifference>,
}

/// How often the decisions of a reason agreed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReasonAgreement {
    /// Word of the reason.
    pub reason: &'static str,
    /// `outbound` or `inbound`.
    pub direction: &'static str,
    /// Flows for which the decision is what happened.
    pub agreed: u64,
    /// The others.
    pub differed: u64,
}

/// A kind of difference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FoundDifference {
    /// Word of the reason of the decision.
    pub reason: &'static str,
    /// `outbound` or `inbound`.
    pub direction: &'static str,
    /// The row that decided.
    pub row: &'static str,
    /// The rule of istio-iptables that the row stands for.
    pub rule: String,
    /// What would have become of the flow.
    pub expected: &'static str,
    /// What became of it.
    pub actual: &'static str,
    /// Number of flows.
    pub count: u64,
    /// The first flow.
    pub first: FlowExample,
    /// The last one.
    pub last: FlowExample,
}

/// A flow that differed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FlowExample {
    /// Seconds since 1970.
    pub time: f64,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// The client.
    pub source: SocketAddr,
    /// The destination that it dialled.
    pub destination: SocketAddr,
    /// What the proxy is told instead, if the verdict is the same.
    pub original_dst: Option<SocketAddr>,
    /// Owner of the client's socket, if that is in the pod.
    pub uid: Option<u32>,
    /// As `uid`.
    pub gid: Option<u32>,
}

/// `outbound` or `inbound`, from the row.
fn direction(reason: Reason) -> &'static str {
    if reason.row().starts_with("inbound") && reason != Reason::MarkedLoopback {
        "inbound"
    } else {
        "outbound"
    }
}

/// A kind of difference: the reason, what would have become of the flow, and what became of it.
pub type DifferenceKind = (&'static str, &'static str, &'static str);

impl ShadowReport {
    /// Reads the reports of all pods in shadow mode.
    pub fn read_all(maps: &ShadowMaps) -> Result<Vec<Self>, MapsError> {
        let counters = maps.all_counters()?;
        if counters.is_empty() {
            return Ok(Vec::new());
        }
        let examples = maps.all_differences()?;
        let reports = counters.iter().map(|(cookie, counters)| {
            let own: Vec<_> = examples.iter().filter(|(key, _)| key.netns == *cookie).copied().collect();
            Self::of(*cookie, counters, &own)
        });
        Ok(reports.collect())
    }

    /// Reads the report of a pod. `None` if it is not in shadow mode.
    pub fn read(maps: &ShadowMaps, cookie: NetnsCookie) -> Result<Option<Self>, MapsError> {
        let Some(counters) = maps.counters(cookie)? else { return Ok(None) };
        Ok(Some(Self::of(cookie, &counters, &maps.differences(cookie)?)))
    }

    fn of(
        cookie: NetnsCookie,
        counters: &ShadowCounters,
        examples: &[(DifferenceKey, ComparedFlow)],
    ) -> Self {
        let reasons = counters.by_reason().filter(|(_, agreed, differed)| agreed + differed > 0);
        Self {
            netns_cookie: cookie,
            since: counters.since,
            compared: counters.total_compared(),
            differed: counters.total_differed(),
            uncompared: counters.uncompared,
            reasons: reasons
                .map(|(reason, agreed, differed)| ReasonAgreement {
                    reason: reason.as_str(),
                    direction: direction(reason),
                    agreed,
                    differed,
                })
                .collect(),
            differences: FoundDifference::all(examples),
        }
    }
}

impl FoundDifference {
    /// Its kind.
    pub fn kind(&self) -> DifferenceKind {
        (self.reason, self.expected, self.actual)
    }

    /// The kinds of differences, from the examples that the programs keep, in the order of their keys.
    pub fn all(examples: &[(DifferenceKey, ComparedFlow)]) -> Vec<Self> {
        let firsts = examples.iter().filter(|(key, _)| key.is_last == 0);
        let last = |of: &DifferenceKey| {
            let key = DifferenceKey { is_last: 1, ..*of };
            examples.iter().find(|(other, _)| *other == key).map(|(_, flow)| flow)
        };
        firsts.filter_map(|(key, first)| Self::of(key, first, last(key).unwrap_or(first))).collect()
    }

    /// `None` if the reason is not known to this build.
    fn of(key: &DifferenceKey, first: &ComparedFlow, last: &ComparedFlow) -> Option<Self> {
        let reason = *Reason::ALL.get(usize::from(key.reason))?;
        let boot = trace::boot_time();
        Some(Self {
            reason: reason.as_str(),
            direction: direction(reason),
            row: reason.row(),
            rule: format!("{}: {}", reason.chain(), reason.rule()),
            expected: outcome::as_str(key.expected),
            actual: outcome::as_str(key.actual),
            count: first.count,
            first: FlowExample::of(first, boot),
            last: FlowExample::of(last, boot),
        })
    }
}

impl FlowExample {
    fn of(flow: &ComparedFlow, boot: Duration) -> Self {
        let owner = |id: u32| (id != u32::MAX).then_some(id);
        let at = |addr, port| SocketAddr::new(IpAddr::from(addr), port);
        Self {
            time: (boot + Duration::from_nanos(flow.time)).as_secs_f64(),
            protocol: if flow.protocol == 17 { "udp" } else { "tcp" },
            source: at(flow.src, flow.src_port),
            destination: at(flow.dst, flow.dst_port),
            original_dst: (flow.other_port != 0).then(|| at(flow.other, flow.other_port)),
            uid: owner(flow.uid),
            gid: owner(flow.gid),
        }
    }
}

impl fmt::Display for FlowExample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} to {}", self.protocol, self.source, self.destination)?;
        if let (Some(uid), Some(gid)) = (self.uid, self.gid) {
            write!(f, " by {uid}:{gid}")?;
        }
        self.original_dst.map_or(Ok(()), |other| write!(f, ", of which the proxy is told {other}"))
    }
}

impl fmt::Display for FoundDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} would be {} ({}, row {}; {}), and was {}",
            self.first, self.expected, self.reason, self.row, self.rule, self.actual
        )
    }
}
