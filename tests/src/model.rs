//! Two witnesses of a decision that know nothing of each other: the project's own, from the command line by way of
//! the compiled entries to `decide`, and the walk of the rules that istio-iptables would install.
//!
//! [`Situation`] is a configuration in a made-up namespace, [`Flow`] something that happens there, both drawn from a
//! seed; [`Ours`] and [`Rules`] are the witnesses, and [`Fate`] is what either says.

mod agent;
mod draw;
mod iptables;
mod netns;

pub use agent::AgentModel;
pub use draw::{ModelFlow, Situation};
pub use iptables::IptablesModel;
pub use netns::{ModelLink, ModelNetns};

/// What becomes of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ModelVerdict {
    /// The kernel does not send it.
    Unroutable,
    /// It goes where it was going.
    Passed,
    /// This port of the pod has it.
    To(u16),
    /// It is lost.
    Dropped,
}
