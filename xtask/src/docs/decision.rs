//! The tables of reasons and failures, from the tables that the programs and `explain` use.

use anyhow::Result;
use intercept_common::{
    ProxyListener, Reason, Verdict,
    failure::{Failure, OnFailure},
};

use super::{MarkdownTable, code};
use crate::tidy::Tree;

/// The rows of flows that a process of the pod starts.
pub(super) fn outbound(_: &Tree) -> Result<String> {
    Ok(rows("outbound"))
}

/// The rows of connections that arrive.
pub(super) fn inbound(_: &Tree) -> Result<String> {
    Ok(rows("inbound"))
}

/// What happens when a program fails.
pub(super) fn failures(_: &Tree) -> Result<String> {
    let mut table = MarkdownTable::new(["failure", "what happens", "policy"]);
    for failure in Failure::ALL {
        let policy = match failure.policy() {
            OnFailure::Closed => "closed",
            OnFailure::Open => "open",
        };
        table.row([code(failure.as_str()).as_str(), failure.describe(), policy]);
    }
    Ok(table.0)
}

fn rows(direction: &str) -> String {
    let mut reasons: Vec<_> =
        Reason::ALL.iter().filter_map(|reason| Some((place(*reason, direction)?, reason))).collect();
    // Of one row's reasons the first is declared first.
    reasons.sort_by_key(|(place, _)| *place);
    let columns = ["row", "reason", "verdict", "the flow", "chain of istio-iptables", "its rule"];
    let mut table = MarkdownTable::new(columns);
    for (Place { row, .. }, reason) in reasons {
        let rule = match reason.rule().strip_prefix('(').and_then(|rule| rule.strip_suffix(')')) {
            Some(none) => none.to_owned(),
            None => reason.rule().split("; ").map(code).collect::<Vec<_>>().join(", "),
        };
        let word = code(reason.as_str());
        table.row([row, &word, verdict(*reason), reason.describe(), reason.chain(), &rule]);
    }
    table.0
}

/// Where a reason stands in its table: what has no number comes after row 0, which comes before all rules.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    number: u32,
    row: &'static str,
}

fn place(reason: Reason, direction: &str) -> Option<Place> {
    let row = reason.row().strip_prefix(direction)?.strip_prefix(' ')?;
    let digits = row.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    Some(Place { number: digits.parse().unwrap_or(0), row })
}

fn verdict(reason: Reason) -> &'static str {
    match reason.verdict() {
        Verdict::Pass => "pass",
        Verdict::Redirect(ProxyListener::Outbound) => "to `-p`, 15001",
        Verdict::Redirect(ProxyListener::Inbound) => "to `-z`, 15006",
        Verdict::Redirect(ProxyListener::Dns) => "to `--dns-capture-port`, 15053",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_stands_in_one_table_in_the_order_of_its_rows() {
        let (outbound, inbound) = (rows("outbound"), rows("inbound"));
        for reason in Reason::ALL {
            let word = format!("| `{}` |", reason.as_str());
            assert_eq!(
                [&outbound, &inbound].iter().filter(|table| table.contains(&word)).count(),
                1,
                "{word}"
            );
        }
        let at = |word: &str| outbound.find(&format!("`{word}`")).expect(word);
        for pair in ["no_route", "outbound_ipv6", "excluded_egress", "proxy_uid", "localhost", "not_included"]
            .windows(2)
        {
            assert!(at(pair[0]) < at(pair[1]), "{pair:?}");
        }
        let marked = inbound.find("marked_loopback").expect("a row");
        assert!(inbound.find("local_source") < Some(marked) && Some(marked) < inbound.find("virt_included"));
    }
}
