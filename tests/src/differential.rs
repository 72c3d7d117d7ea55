//! The same flows under the real iptables, under the agent, and by the walk of the rules, compared.
//!
//! A [`Case`] is a configuration and a list of flows, both drawn from a seed or written down. [`observe`] makes
//! the flows in a fresh pod captured one way or another and returns what each end [`Observed`]; [`oracle`] says what
//! the rules mean; [`compare`] tells the differences.

pub mod run;
pub mod capture;
pub mod case;
pub mod compare;
pub mod configurations;
pub mod layout;
pub mod observed;
pub mod oracle;
pub mod random;

pub use run::observe;
pub use capture::Capture;
pub use case::{Case, End, Flow, FlowKind};
pub use observed::Observed;
