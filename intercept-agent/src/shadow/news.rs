//! What a report of a pod has that the one before had not, so that each kind of difference is said once.

use std::collections::BTreeSet;

use super::{DifferenceKind, ShadowReport};

/// What is known of a pod in shadow mode.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ShadowRecord {
    /// When the programs began to count. They begin again with other options.
    since: u64,
    agreed: u64,
    differed: u64,
    uncompared: u64,
    said: BTreeSet<DifferenceKind>,
}

/// What a report has that the one before had not.
#[derive(Debug, PartialEq, Eq)]
pub struct ShadowNews {
    /// Flows.
    pub agreed: u64,
    /// Flows.
    pub differed: u64,
    /// Flows.
    pub uncompared: u64,
    /// The kinds of differences that were not said before, each as a text.
    pub differences: Vec<String>,
}

impl ShadowRecord {
    /// Number of kinds of differences.
    pub fn kinds(&self) -> usize {
        self.said.len()
    }

    /// Takes a report in.
    pub fn update(&mut self, report: &ShadowReport) -> ShadowNews {
        if self.since != report.since {
            *self = Self { since: report.since, ..Self::default() };
        }
        let agreed = report.compared - report.differed;
        let news = report.differences.iter().filter(|found| self.said.insert(found.kind()));
        let differences = news.map(ToString::to_string).collect();
        ShadowNews {
            agreed: agreed.saturating_sub(std::mem::replace(&mut self.agreed, agreed)),
            differed: report.differed.saturating_sub(std::mem::replace(&mut self.differed, report.differed)),
            uncompared: report
                .uncompared
                .saturating_sub(std::mem::replace(&mut self.uncompared, report.uncompared)),
            differences,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::NetnsCookie,
        shadow::{FlowExample, FoundDifference},
    };

    fn report(since: u64, agreed: u64, kinds: &[&'static str]) -> ShadowReport {
        let example = FlowExample {
            time: 0.0,
            protocol: "tcp",
            source: ([10, 0, 0, 1], 1).into(),
            destination: ([10, 0, 0, 2], 80).into(),
            original_dst: None,
            uid: None,
            gid: None,
        };
        let differences: Vec<_> = kinds
            .iter()
            .map(|reason| FoundDifference {
                reason,
                direction: "outbound",
                row: "7",
                rule: "ISTIO_OUTPUT: a rule".to_owned(),
                expected: "passed",
                actual: "redirected to outbound",
                count: 2,
                first: example.clone(),
                last: example.clone(),
            })
            .collect();
        let differed = 2 * differences.len() as u64;
        ShadowReport {
            netns_cookie: NetnsCookie(1),
            since,
            compared: agreed + differed,
            differed,
            uncompared: 1,
            reasons: Vec::new(),
            differences,
        }
    }

    #[test]
    fn a_kind_is_said_once_and_each_flow_is_counted_once() {
        let mut record = ShadowRecord::default();
        let news = record.update(&report(5, 10, &["excluded_port"]));
        assert_eq!((news.agreed, news.differed, news.uncompared, news.differences.len()), (10, 2, 1, 1));
        assert!(news.differences[0].contains("excluded_port"), "{:?}", news.differences);
        let news = record.update(&report(5, 15, &["excluded_port"]));
        assert_eq!((news.agreed, news.differed, news.uncompared, news.differences.len()), (5, 0, 0, 0));
        let news = record.update(&report(5, 15, &["excluded_port", "owner"]));
        assert_eq!((news.agreed, news.differed, news.differences.len(), record.kinds()), (0, 2, 1, 2));
    }

    #[test]
    fn with_other_options_everything_is_new() {
        let mut record = ShadowRecord::default();
        record.update(&report(5, 10, &["excluded_port"]));
        let news = record.update(&report(6, 3, &["excluded_port"]));
        assert_eq!((news.agreed, news.differed, news.differences.len()), (3, 2, 1));
    }
}
