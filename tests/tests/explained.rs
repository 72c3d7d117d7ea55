//! `explain` agrees with the kernel: a flow increments the counter of the row that `explain` names, and no other.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use intercept_agent::facade::netns::Netns;
use intercept_agent::facade::routes::RouteSnapshot;
use intercept_common::Reason;
use tests::actor::{Actor, Dial, Query};
use tests::agent::{Agent, succeed};
use tests::differential::{Case, End, Flow, FlowKind, configurations, layout, random};
use tests::iptables::IptablesOptions;
use tests::testbed::Pod;

/// Connections without a listener are refused. Only those that leave the pod may get no answer.
const TIMEOUT: Duration = Duration::from_millis(300);

struct ExplainedFixture {
    agent: Agent,
    inside: Actor,
    world: Actor,
    interfaces: BTreeMap<String, u32>,
    pod: Pod,
}

impl ExplainedFixture {
    fn new(case: &Case) -> Self {
        let agent = Agent::new("explained").expect("a bpffs");
        let pod = Pod::new(layout::spec("explained")).expect("a pod");
        let (inside, world) =
            (Actor::start(&pod).expect("an actor"), Actor::start(pod.neighbour()).expect("an actor"));
        let mut resolv_conf = tempfile::NamedTempFile::new().expect("a file");
        std::io::Write::write_all(&mut resolv_conf, case.options.resolv_conf().as_bytes()).expect("written");
        let mut attach = agent.for_pod("attach", &pod, &[]);
        attach.args(case.options.arguments(resolv_conf.path())).envs(case.options.environment());
        succeed(attach).expect("attached");
        let netns = Netns::open(pod.netns.path()).expect("the namespace");
        let snapshot = RouteSnapshot::snapshot(&netns).expect("a mirror");
        let interfaces = snapshot.interfaces.into_iter().map(|i| (i.name, i.index)).collect();
        Self { agent, inside, world, interfaces, pod }
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        let pods = self.agent.pods().expect("a status");
        pods[0].decisions.iter().map(|count| (count.reason.clone(), count.count)).collect()
    }

    fn make(&self, flow: &Flow) {
        let actor = if flow.end == End::Pod { &self.inside } else { &self.world };
        let Flow { ids, to, from, mapped, .. } = *flow;
        match flow.kind {
            FlowKind::Tcp => {
                actor.dial(Dial { ids, to, from, mapped, timeout: TIMEOUT }).map(drop).expect("dialled");
            }
            FlowKind::Udp(datagram) => {
                let query =
                    Query { ids, to: vec![to], from, mapped, sending: datagram.into(), timeout: TIMEOUT };
                actor.query(query).map(drop).expect("asked");
            }
        }
    }

    fn explain(&self, flow: &Flow) -> String {
        let mut explain = self.agent.command("explain");
        let outbound = flow.end == End::Pod;
        explain.arg(if outbound { "outbound" } else { "inbound" }).arg("--json");
        explain.arg("--cgroup-path").arg(self.pod.cgroup.path());
        let mut option = |name: &str, value: String| _ = explain.args([name, &value]);
        option("--dst", flow.to.ip().to_string());
        option("--dport", flow.to.port().to_string());
        if outbound {
            option("--uid", flow.ids.uid.to_string());
            option("--gid", flow.ids.gid.to_string());
        } else {
            let arriving = layout::ingress(self.pod.spec(), flow.to.ip());
            option("--ifindex", self.interfaces[arriving].to_string());
        }
        let src = flow.from.or_else(|| (!outbound).then(|| self.neighbour(flow.to.ip())));
        if let Some(src) = src {
            option("--src", src.to_string());
        }
        if flow.kind != FlowKind::Tcp {
            explain.arg("--udp");
        }
        reason(explain)
    }

    /// The source of an unbound connection from the world.
    fn neighbour(&self, to: IpAddr) -> IpAddr {
        let spec = self.pod.spec();
        let name = layout::ingress(spec, to);
        let interface = spec.interfaces.iter().find(|interface| interface.name == name);
        let mut addresses = interface.into_iter().flat_map(|interface| &interface.neighbour);
        addresses.find(|net| net.addr().is_ipv6() == to.is_ipv6()).expect("a neighbour").addr()
    }
}

fn reason(explain: Command) -> String {
    let answer = succeed(explain).expect("explained");
    let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
    answer["reason"].as_str().expect("a word").to_owned()
}

/// Whether the flow is decided at all. Of datagrams, only outbound queries are.
fn is_decided(case: &Case, flow: &Flow) -> bool {
    let dns = case.options.dns.as_ref().is_some_and(|dns| dns.all || !dns.servers.is_empty());
    flow.kind == FlowKind::Tcp || (flow.end == End::Pod && dns && flow.to.port() == 53)
}

fn rows(words: impl Iterator<Item = String>, direction: &str) -> Vec<String> {
    let is_row = |word: &String| {
        Reason::ALL.iter().any(|reason| reason.as_str() == word && reason.row().starts_with(direction))
    };
    words.filter(is_row).collect()
}

#[test]
fn the_row_that_explain_names_is_the_row_that_counted() {
    let mut named = BTreeMap::new();
    // Not compared with real rules, which have no original destination for IPv6 here, because nothing enables connection
    // tracking.
    let without_ipv6 = IptablesOptions { ipv6: false, ..IptablesOptions::injected() };
    let configurations = configurations::fixed().into_iter().chain([("without IPv6", without_ipv6)]);
    for (seed, (name, options)) in (1..).zip(configurations) {
        let case = random::case_of(name, options, seed, 30);
        let fixture = ExplainedFixture::new(&case);
        for flow in case.flows.iter().filter(|flow| is_decided(&case, flow)) {
            let expected = fixture.explain(flow);
            let before = fixture.counters();
            fixture.make(flow);
            let after = fixture.counters();
            let moved = after.into_iter().filter(|(word, count)| before.get(word) != Some(count));
            let direction = if flow.end == End::Pod { "outbound" } else { "inbound" };
            let moved = rows(moved.map(|(word, _)| word), direction);
            *named.entry(expected.clone()).or_insert(0) += 1;
            assert_eq!(moved, [expected], "{}: {flow}", case.origin);
        }
    }
    println!("{named:#?}");
    assert!(["outbound_ipv6", "inbound_ipv6"].iter().all(|row| named.contains_key(*row)), "{named:?}");
    assert!(named.len() >= 15, "too few rows were met: {named:?}");
}
