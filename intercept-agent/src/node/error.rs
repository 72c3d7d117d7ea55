//! Errors of attaching, detaching and reading pods.

use std::{io, net::SocketAddr};

use crate::{
    cgroup::CgroupError,
    containers::ContainerError,
    ids::NetnsCookie,
    listeners::ListenersError,
    maps::MapsError,
    netns::NetnsError,
    netns_setup::NetnsSetupError,
    programs::ProgramError,
    routes::RoutesError,
    store::StoreError,
    support::{Lacking, ProbeError},
    userns::IdMapError,
};

/// Why a pod could not be attached, detached or read.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Table(#[from] MapsError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Lacking(#[from] Lacking),
    #[error("checking what this kernel supports")]
    Probe(#[from] ProbeError),
    #[error(
        "programs for an option of this capture were left out when the node's programs were loaded, but this kernel has \
         what they need now: load them again (`intercept-agent detach --all`, and attach the pods again)"
    )]
    LeftOut,
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("looking for the cgroups of the pod's containers")]
    Containers(#[from] ContainerError),
    #[error("reading the routes of {netns}")]
    RouteSnapshot { netns: String, source: RoutesError },
    #[error("looking for listeners of the proxy in {netns}")]
    Listeners { netns: String, source: ListenersError },
    #[error("taking the proxy's listener at {address} from its process")]
    Listener { address: SocketAddr, source: io::Error },
    #[error("changing or restoring namespace {netns}")]
    NetnsChanges { netns: String, source: NetnsSetupError },
    #[error("letting the listener of port {port} answer for the guests of -k (IP_TRANSPARENT)")]
    Transparent { port: u16, source: io::Error },
    #[error("translating user and group ids of {cgroup}")]
    UserNs { cgroup: String, source: IdMapError },
    #[error("attaching {program} to {target}")]
    Attach { program: &'static str, target: String, source: io::Error },
    #[error("reading what link {path} is attached to")]
    Link { path: String, source: io::Error },
    #[error("replacing {program} of pod {cookie}")]
    Replace { program: &'static str, cookie: NetnsCookie, source: io::Error },
    #[error(
        "{netns} is captured through cgroup {cgroup} already: a namespace has one capture; \
         detach that one first (`intercept-agent detach --cgroup-path {cgroup}`)"
    )]
    NetnsTaken { netns: String, cgroup: String },
    #[error(
        "cgroup {cgroup} is attached for another namespace (inode {inode}) already; \
         detach it first (`intercept-agent detach --cgroup-path {cgroup}`)"
    )]
    CgroupTaken { cgroup: String, inode: u64 },
    #[error(
        "cgroup {inner} is inside cgroup {outer}, and {captured} is captured already: what is in both would be decided on \
         twice; detach that one first (`intercept-agent detach --cgroup-path {captured}`)"
    )]
    Nested { inner: String, outer: String, captured: String },
    #[error(
        "cgroup {cgroup} is in another workload of this machine already; name all cgroups of one workload in one command,          or detach that one first (`intercept-agent detach --cgroup-path {cgroup}`)"
    )]
    InWorkload { cgroup: String },
    #[error(
        "port {port} is that of the proxy of another workload of this machine ({cgroup}): give the proxies different ports          (-p, -z, --dns-capture-port), or name the cgroups of both in one command for one proxy"
    )]
    ProxyTaken { port: u16, cgroup: String },
    #[error(
        "process {pid} listens on port {port}, which is the proxy's, and is outside of the cgroups of the workload: the proxy          would not learn original destinations; name its cgroup as well (--cgroup-path)"
    )]
    ProxyOutside { port: u16, pid: i32 },
    #[error(
        "map {0} of the agent is not there, and pods are attached: something removed its pin; `intercept-agent detach --all` \
         removes the rest"
    )]
    Incomplete(&'static str),
    #[error("the pod needs {needed} {what}, and may have {limit}: shorten its lists")]
    OverBudget { what: &'static str, needed: usize, limit: u32 },
    #[error(
        "an attach opens up to {count} files, which this process may not: raise its limit of open files (`ulimit -n`)"
    )]
    Descriptors { count: u8, source: io::Error },
    #[error("{0} pods are attached to this node, which is all it has counters for")]
    TooManyPods(usize),
    #[error(
        "pods are attached by another version of the agent, with another layout of its maps ({0}): detach them with that \
         version, or `intercept-agent detach --all`, and attach them again"
    )]
    OtherLayout(String),
    #[error("pod {0} has no record of its policy; attach it again, or detach it")]
    NoRecord(NetnsCookie),
    #[error("reading the log lines of the programs")]
    Logs { source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the agent was removed from this node on request; restart the daemon to capture pods")]
    Left,
    #[error(
        "the rules of iptables that captured cgroup {cgroup} are out, so nothing would capture it: put them in again first \
         (`intercept-agent cutover --back --cgroup-path {cgroup}`)"
    )]
    RulesOut { cgroup: String },
    #[error("{0} is not attached")]
    NotAttached(String),
}
