//! Compares the same flows under real iptables, under the agent, and as interpreted rules.
//!
//! A [`Case`] is a configuration and a list of flows, drawn from a seed or written by hand. [`observe`] makes the flows
//! in a new pod with either capture and returns what both ends [`Observed`]. [`oracle`] predicts the result from the rules,
//! and [`compare`] describes the differences.

pub mod capture;
pub mod case;
pub mod compare;
pub mod configurations;
pub mod layout;
pub mod meshes;
pub mod observed;
pub mod oracle;
pub mod random;
pub mod run;

pub use capture::Capture;
pub use case::{Case, End, Flow, FlowKind};
pub use observed::Observed;
pub use run::{observe, observe_prepared};
