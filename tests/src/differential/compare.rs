//! Describes how results differ from each other or from the prediction.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use super::case::{Case, End, Flow};
use super::observed::{Connection, Observed};
use super::oracle::{self, ExpectedFlow};

/// How many flows are printed for each kind of difference.
const SHOWN: usize = 3;

/// A flow that differs.
struct Differing {
    /// The kind of difference, by which flows are grouped.
    how: String,
    /// The flow and its results.
    story: String,
}

/// How real iptables differs from the interpreted rules. `None` if it does not.
pub fn with_oracle(case: &Case, seen: &[Observed]) -> Option<String> {
    let expected = oracle::predict(case);
    let all = case.flows.iter().zip(&expected).zip(seen);
    let found = all.filter_map(|((flow, expected), seen)| {
        let lines = oracle::unexpected(flow, expected, seen);
        (!lines.is_empty()).then(|| differing(flow, expected, &lines, &[("seen", seen)]))
    });
    report(case, found.collect())
}

/// How the agent differs from iptables. `None` if it does not.
pub fn with_iptables(case: &Case, iptables: &[Observed], agent: &[Observed]) -> Option<String> {
    let expected = oracle::predict(case);
    let all = case.flows.iter().zip(&expected).zip(iptables.iter().zip(agent));
    let found = all.filter_map(|((flow, expected), (iptables, agent))| {
        let lines = differences(iptables, agent);
        (!lines.is_empty())
            .then(|| differing(flow, expected, &lines, &[("iptables", iptables), ("agent", agent)]))
    });
    report(case, found.collect())
}

/// The flows in which the server sees another client port than the client has. `None` if there are none. Only connection
/// tracking may change a port, when it clashes with that of another flow.
pub fn changed_ports(case: &Case, agent: &[Observed]) -> Option<String> {
    let expected = oracle::predict(case);
    let all = case.flows.iter().zip(&expected).zip(agent);
    let found = all.filter_map(|((flow, expected), agent)| {
        let changed = matches!(agent, Observed::Connection(connection) if !connection.same_port);
        changed.then(|| differing(flow, expected, &["the ports differ".into()], &[("agent", agent)]))
    });
    report(case, found.collect())
}

/// The differences between the agent's result and that of iptables, one line each.
pub fn differences(iptables: &Observed, agent: &Observed) -> Vec<String> {
    let (Observed::Connection(iptables), Observed::Connection(agent)) = (iptables, agent) else {
        if iptables == agent {
            return Vec::new();
        }
        return vec!["the results differ".into()];
    };
    let mut lines = Vec::new();
    // Destructured, so that the compiler points out a new field.
    let Connection {
        server,
        original_dst,
        peer,
        same_port: _,
        same_peername,
        sockname,
        peername,
        peername_after,
    } = iptables;
    let mut differ = |what: &str, same: bool| {
        if !same {
            lines.push(format!("{what} differs"));
        }
    };
    differ("who answered", *server == agent.server);
    differ("the original destination", *original_dst == agent.original_dst);
    differ("the client as the server sees it", *peer == agent.peer);
    differ("the server's getpeername", *same_peername == agent.same_peername);
    differ("the client's getsockname", *sockname == agent.sockname);
    differ("the client's getpeername", *peername == agent.peername);
    differ("the client's getpeername afterwards", *peername_after == agent.peername_after);
    lines
}

fn differing(
    flow: &Flow,
    expected: &ExpectedFlow,
    lines: &[String],
    seen: &[(&str, &Observed)],
) -> Differing {
    let ExpectedFlow { verdict, server } = expected;
    let end = if flow.end == End::Pod { "from the pod" } else { "from the world" };
    let how = format!("{end}, by the rules {verdict:?} to {server:?}: {}", lines.join(", "));
    let mut story = format!("    - {flow}\n");
    for (who, seen) in seen {
        writeln!(story, "        {:<9} {seen:?}", format!("{who}:")).expect("strings take everything");
    }
    Differing { how, story }
}

fn report(case: &Case, differing: Vec<Differing>) -> Option<String> {
    if differing.is_empty() {
        return None;
    }
    let mut text = format!("{} of {} flows differ; {}\n", differing.len(), case.flows.len(), describe(case));
    let mut ways: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for Differing { how, story } in differing {
        ways.entry(how).or_default().push(story);
    }
    for (how, stories) in ways {
        writeln!(text, "  {} {how}", stories.len()).expect("strings take everything");
        text.extend(stories.into_iter().take(SHOWN));
    }
    Some(text)
}

/// How to repeat the case, and its configuration.
pub fn describe(case: &Case) -> String {
    let mut text = format!("case {}\n  ", case.origin);
    for (name, value) in case.options.environment() {
        write!(text, "{name}='{value}' ").expect("strings take everything");
    }
    let arguments = case.options.arguments(Path::new("resolv.conf"));
    let arguments: Vec<String> = arguments
        .iter()
        .map(|argument| {
            if argument.is_empty() || argument.contains('*') {
                format!("'{argument}'")
            } else {
                argument.clone()
            }
        })
        .collect();
    write!(text, "{}", arguments.join(" ")).expect("strings take everything");
    if let Some(dns) = &case.options.dns {
        write!(text, " (nameservers {:?})", dns.servers).expect("strings take everything");
    }
    let listening = if case.listening_first { "before" } else { "after" };
    let sockets = if case.dual_stack_proxy { "by one socket for both families" } else { "" };
    write!(text, "\n  proxy listening {listening} capture {sockets}").expect("strings take everything");
    text
}
