//! The arguments of commands for one attached pod.

use std::{net::IpAddr, path::PathBuf};

use clap::{Args, ValueEnum};

use super::{Bpffs, WhichCapture};

// Of `audit` and `prove`. Not a doc comment, which clap would take for help.
#[derive(Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub(crate) attachment: WhichCapture,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

#[derive(Args)]
pub(crate) struct CutoverArgs {
    /// Cgroup of the attached pod
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_path: PathBuf,
    /// Put the rules in again, and the policy back into shadow mode
    #[arg(long)]
    pub(crate) back: bool,
    /// Cut over although flows differ, or none has been compared
    #[arg(long, conflicts_with = "back")]
    pub(crate) force: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Direction {
    /// Opened in the pod
    Outbound,
    /// Arriving at the pod
    Inbound,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FlowContainer {
    /// That of --proxy-cgroup
    Proxy,
    /// One of --exempt-cgroup
    Exempt,
}

#[derive(Args)]
pub(crate) struct ExplainArgs {
    /// Direction of the flow
    #[arg(value_enum)]
    pub(crate) direction: Direction,
    #[command(flatten)]
    pub(crate) attachment: WhichCapture,
    /// Destination address
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) dst: IpAddr,
    /// Destination port
    #[arg(long, value_name = "PORT")]
    pub(crate) dport: u16,
    /// Outbound: address that the socket is bound to. Inbound: source address
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) src: Option<IpAddr>,
    /// User id of the socket's creator, in the initial user namespace
    #[arg(long, default_value_t = 0)]
    pub(crate) uid: u32,
    /// Group id of the socket's creator, in the initial user namespace
    #[arg(long, default_value_t = 0)]
    pub(crate) gid: u32,
    /// Outbound: SO_MARK of the socket
    #[arg(long, default_value_t = 0)]
    pub(crate) mark: u32,
    /// Outbound, with --proxy-cgroup or --exempt-cgroup: the container that the process runs in [default: another one]
    #[arg(long, value_enum)]
    pub(crate) container: Option<FlowContainer>,
    /// UDP instead of TCP
    #[arg(long)]
    pub(crate) udp: bool,
    /// Inbound: index of the interface that the flow arrives on
    #[arg(long, default_value_t = 0, value_name = "INDEX")]
    pub(crate) ifindex: u32,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}
