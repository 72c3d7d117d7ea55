//! Two independent models of a decision. [`AgentModel`] parses and compiles the command line and calls `decide`.
//! [`IptablesModel`] interprets the rules that istio-iptables would install.
//!
//! [`Situation`] is a configuration in an artificial namespace, and [`ModelFlow`] is a flow in it. Both are drawn from a
//! seed. [`ModelVerdict`] is the answer of a model.

mod agent;
mod draw;
mod iptables;
mod netns;

pub use agent::AgentModel;
pub use draw::{ModelFlow, Situation};
pub use iptables::IptablesModel;
pub use netns::{ModelLink, ModelNetns};

/// The verdict on a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ModelVerdict {
    /// The kernel does not send it.
    Unroutable,
    /// It goes to its destination.
    Passed,
    /// It goes to this port of the pod.
    To(u16),
    /// It is dropped.
    Dropped,
}
