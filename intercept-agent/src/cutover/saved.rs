//! What is known of a pod's rules of iptables while they are out, in the pod's folder of the store. It is written before
//! anything is changed.

use serde::{Deserialize, Serialize};

use super::{iptables::Tool, rules::BaseRule};

/// Whether the rules that capture the pod are in its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RulesState {
    /// They are.
    In,
    /// They are being taken out, or put in again.
    Changing,
    /// They are not.
    Out,
}

impl RulesState {
    /// The word in `status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Changing => "changing",
            Self::Out => "out",
        }
    }
}

/// The rules of a pod that is cut over, or is about to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRules {
    /// Where they are.
    pub state: RulesState,
    /// Since when, in seconds since 1970.
    pub since: u64,
    /// Those of each implementation of iptables that has some.
    pub tools: Vec<SavedTool>,
}

/// The rules of one implementation of iptables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedTool {
    /// The implementation.
    pub tool: Tool,
    /// The rules of base chains that capture the pod.
    pub captures: Vec<BaseRule>,
    /// Rules that keep both captures apart while both are active.
    pub guards: Vec<BaseRule>,
    /// All tables as they were, without counters.
    pub tables: Vec<String>,
}
