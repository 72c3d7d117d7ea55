//! The rules that istio-iptables installs, as data.
//!
//! [`IptablesOptions`] and [`rules`](chains::rules) follow istio's own program (tools/istio-iptables/pkg/capture/run.go,
//! 1.2x), rule by rule and in its order. There are two consumers: [`apply`](install::apply) gives them to the
//! real iptables inside a namespace, and [`Walker`] is a naive interpreter of the same chains. Nothing here
//! knows of the project's own decision; that is the point.

pub mod arguments;
pub mod chains;
pub mod install;
pub mod options;
pub mod restore;
pub mod rule;
pub mod walk;

pub use install::{Backend, apply};
pub use options::{Groups, IptablesCidrs, IptablesDns, IptablesOptions, IptablesPorts, Tproxy};
pub use rule::{Chain, IpFamily, IptablesTable, Match, Protocol, Rule, RuleTarget};
pub use walk::{IptablesVerdict, Packet, PacketOrigin, Walker};
