//! The rules that istio-iptables installs, as data.
//!
//! [`IptablesOptions`] and [`rules`](chains::rules) follow Istio's program (tools/istio-iptables/pkg/capture/run.go, 1.2x) rule
//! by rule and in the same order. The rules are used twice: [`apply`](install::apply) installs them with real iptables in
//! a namespace, and [`Walker`] interprets them. Nothing here may use `decide`, which is checked against these rules.

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
