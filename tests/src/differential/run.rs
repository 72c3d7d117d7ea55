//! Makes the flows of a case in a new pod.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};

use super::capture::Capture;
use super::case::{Case, End, Flow, FlowKind};
use super::layout;
use super::observed::Observed;
use super::oracle;
use crate::actor::{Actor, Bind, Dial, Listen, Query, Transport};
use crate::iptables::IptablesOptions;
use crate::testbed::{Ids, Pod};

/// Long enough for two lost SYNs to be sent again (after one and three seconds).
const TIMEOUT: Duration = Duration::from_secs(5);
/// The timeout of flows that should get no answer. A wrong answer would arrive at once.
const SILENCE: Duration = Duration::from_millis(300);
/// The number of concurrent flows from each end.
const WINDOW: usize = 400;

/// Makes the flows of a case in a new pod with this capture. Returns the result of each flow.
pub fn observe(case: &Case, capture: &Capture) -> Result<Vec<Observed>> {
    Ok(observe_prepared(case, capture, |_| Ok(()), |_| Ok(()))?.0)
}

/// As [`observe`], with a change of the pod before the first flow, and a look at it before the capture ends.
pub fn observe_prepared<T>(
    case: &Case,
    capture: &Capture,
    change: impl FnOnce(&Pod) -> Result<()>,
    look: impl FnOnce(&Pod) -> Result<T>,
) -> Result<(Vec<Observed>, T)> {
    let pod = Pod::new(layout::spec("compared")).context("making a pod")?;
    let world = Actor::start(pod.neighbour())?;
    let inside = Actor::start(&pod)?;
    serve_outside(&world, &case.options)?;
    let captured = if case.listening_first {
        serve_inside(&inside, case)?;
        capture.start(&case.options, &pod)?
    } else {
        let captured = capture.start(&case.options, &pod)?;
        serve_inside(&inside, case)?;
        captured
    };
    change(&pod)?;
    let patience = oracle::predict(case).into_iter().map(|expected| match expected.server {
        Some(_) => TIMEOUT,
        None => SILENCE,
    });
    let flows: Vec<(Flow, Duration)> = case.flows.iter().cloned().zip(patience).collect();
    let mut seen = Vec::with_capacity(flows.len());
    for flows in flows.chunks(WINDOW) {
        seen.extend(make(flows, &inside, &world)?);
    }
    let looked = look(&pod)?;
    captured.stop()?;
    Ok((seen, looked))
}

/// Makes flows concurrently.
pub(super) fn make(flows: &[(Flow, Duration)], inside: &Actor, world: &Actor) -> Result<Vec<Observed>> {
    let mut seen: Vec<Option<Observed>> = vec![None; flows.len()];
    std::thread::scope(|scope| {
        let mut makers = Vec::new();
        for (actor, end) in [(inside, End::Pod), (world, End::World)] {
            let indexed = |is_kind: fn(FlowKind) -> bool| {
                let found = flows.iter().enumerate();
                let found = found.filter(|(_, (flow, _))| flow.end == end && is_kind(flow.kind));
                found.map(|(i, (flow, patience))| (i, flow, *patience)).collect::<Vec<_>>()
            };
            let (connections, datagrams) =
                (indexed(|kind| kind == FlowKind::Tcp), indexed(|kind| kind != FlowKind::Tcp));
            makers.push(scope.spawn(move || -> Result<Vec<(usize, Observed)>> {
                let dials = connections.iter().map(|(_, flow, patience)| dial(flow, *patience)).collect();
                let dialled = connections.iter().zip(actor.dial_all(dials)?);
                Ok(dialled.map(|((i, ..), seen)| (*i, seen.into())).collect())
            }));
            makers.push(scope.spawn(move || -> Result<Vec<(usize, Observed)>> {
                let queries =
                    datagrams.iter().filter_map(|(_, flow, patience)| query(flow, *patience)).collect();
                let queried = datagrams.iter().zip(actor.query_all(queries)?);
                Ok(queried.map(|((i, ..), seen)| (*i, seen.into())).collect())
            }));
        }
        for maker in makers {
            let made = maker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            for (i, of_flow) in made {
                seen[i] = Some(of_flow);
            }
        }
        seen.into_iter().map(|seen| seen.context("a flow without a result")).collect()
    })
}

fn dial(flow: &Flow, timeout: Duration) -> Dial {
    Dial { ids: flow.ids, to: flow.to, from: flow.from, mapped: flow.mapped, timeout }
}

fn query(flow: &Flow, timeout: Duration) -> Option<Query> {
    let FlowKind::Udp(datagram) = flow.kind else { return None };
    Some(Query {
        ids: flow.ids,
        to: vec![flow.to],
        from: flow.from,
        mapped: flow.mapped,
        sending: datagram.into(),
        timeout,
    })
}

fn serve_outside(world: &Actor, options: &IptablesOptions) -> Result<()> {
    for transport in [Transport::Tcp, Transport::Udp] {
        for port in layout::ports(options, transport) {
            for any in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
                let bind = Bind::new(Ids::ROOT, SocketAddr::new(any, port));
                world.listen(Listen { name: "world".into(), transport, bind })?;
            }
        }
    }
    Ok(())
}

fn serve_inside(inside: &Actor, case: &Case) -> Result<()> {
    let options = &case.options;
    for transport in [Transport::Tcp, Transport::Udp] {
        let tcp = transport == Transport::Tcp;
        for port in layout::ports(options, transport) {
            let Some(name) = layout::listener(options, transport, port) else { continue };
            let proxy = name != "app";
            let ids = if proxy { proxy_ids(options) } else { Ids::APP };
            let both = case.dual_stack_proxy && proxy && tcp;
            let v4 = (!both).then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            for any in v4.into_iter().chain([Ipv6Addr::UNSPECIFIED.into()]) {
                let mut bind = Bind::new(ids, SocketAddr::new(any, port));
                bind.v6only = !both;
                bind.transparent = options.tproxy.is_some() && name == "inbound";
                inside.listen(Listen { name: name.into(), transport, bind })?;
            }
        }
    }
    Ok(())
}

/// The user and group of the proxy, by which its DNS queries are recognised.
fn proxy_ids(options: &IptablesOptions) -> Ids {
    let uid = options.proxy_uids.first().copied().unwrap_or(Ids::PROXY.uid);
    let gid = options.proxy_gids.first().copied().unwrap_or(Ids::PROXY.gid);
    Ids { uid, gid }
}
