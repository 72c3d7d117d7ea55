//! Shadow mode of pods: when the programs count, and from when.

use std::time::{SystemTime, UNIX_EPOCH};

use intercept_common::layout::{PodPolicy, policy};

use super::{Node, NodeError};
use crate::{cutover::RulesState, ids::NetnsCookie, options::Config, record::Record};

/// Whether a policy only decides and compares.
pub(super) fn is_shadow(policy: &PodPolicy) -> bool {
    policy.flags & policy::SHADOW != 0
}

impl Node {
    /// Before a policy in shadow mode is activated: switches the programs' part on, and counts from zero if the options
    /// differ from those of the record, so that the counts are of one set of rules.
    pub(super) fn begin_shadow(
        &mut self,
        cookie: NetnsCookie,
        config: &Config,
        record: Option<&Record>,
    ) -> Result<(), NodeError> {
        if !config.shadow {
            return Ok(());
        }
        self.maps.shadow_mut().switch_on()?;
        let continues = record.is_some_and(|record| record.config == *config);
        if !continues || self.maps.shadow().counters(cookie)?.is_none() {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
            self.maps.shadow_mut().begin(cookie, now)?;
        }
        Ok(())
    }

    /// Whether a pod's policy only decides and compares. False if it has none.
    pub fn is_in_shadow(&self, cookie: NetnsCookie) -> Result<bool, NodeError> {
        Ok(self.maps.policy(cookie)?.is_some_and(|policy| is_shadow(&policy)))
    }

    /// Refuses what would leave a pod without any capture: its rules of iptables are out.
    pub(super) fn refuse_uncaptured(&self, cookie: NetnsCookie) -> Result<(), NodeError> {
        match self.store.saved_rules(cookie)? {
            Some(saved) if saved.state != RulesState::In => {
                let cgroup = self.record_of(cookie)?.map(|record| record.cgroup);
                Err(NodeError::RulesOut { cgroup: cgroup.unwrap_or_default().display().to_string() })
            }
            _ => Ok(()),
        }
    }

    /// After a pod has left shadow mode, or was removed.
    pub(super) fn end_shadow(&mut self, cookie: NetnsCookie) -> Result<(), NodeError> {
        if self.maps.shadow().counters(cookie)?.is_none() {
            return Ok(());
        }
        self.maps.shadow_mut().end(cookie)?;
        if self.maps.policies()?.iter().any(|(_, policy)| is_shadow(policy)) {
            return Ok(());
        }
        Ok(self.maps.shadow_mut().switch_off()?)
    }
}
