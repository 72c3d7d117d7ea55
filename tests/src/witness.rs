//! Two witnesses of a decision that know nothing of each other: the project's own, from the command line by way of
//! the compiled entries to `decide`, and the walk of the rules that istio-iptables would install.
//!
//! [`Situation`] is a configuration in a made-up namespace, [`Flow`] something that happens there, both drawn from a
//! seed; [`Ours`] and [`Rules`] are the witnesses, and [`Fate`] is what either says.

mod draw;
mod ours;
mod place;
mod rules;

pub use draw::{Flow, Situation};
pub use ours::Ours;
pub use place::{Place, Way};
pub use rules::Rules;

/// What becomes of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    /// The kernel does not send it.
    Unroutable,
    /// It goes where it was going.
    Left,
    /// This port of the pod has it.
    To(u16),
    /// It is lost.
    Dropped,
}
