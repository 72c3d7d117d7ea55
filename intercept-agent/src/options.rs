//! The options of istio-iptables: read as given ([`RawOptions`]), then checked and typed ([`Config`]).
//!
//! Nothing past [`RawOptions::validate`] carries a port, an id or a range as text, and nothing is ignored in
//! silence: what needs no action here comes back as a [`Note`], everything else that is not understood is an
//! [`OptionError`] naming the option, the value and the way out.

mod binding;
mod cidr;
mod config;
mod error;
mod go_syntax;
mod interface;
mod names;
mod ports;
mod raw;
mod reader;
mod render;
mod resolv_conf;
mod setting;
mod table;
mod values;

pub use config::{
    Cidrs, Config, Dns, InboundMode, InboundPorts, MAX_OWNER_GROUPS, MAX_PROXY_IDS, MAX_RESOLVERS,
    OwnerGroups, RunOptions,
};
pub use error::{OptionError, OptionProblem};
pub(crate) use go_syntax::parse_bool;
pub use interface::InterfacePattern;
pub use names::{EtcFiles, NameSource, PodFiles};
pub use ports::Ports;
pub use raw::RawOptions;
pub use reader::Note;
