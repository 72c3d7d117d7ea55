//! What tests, fuzzers and the benchmark use of the agent, under the names of its modules. Nothing else of the library is
//! public.

/// The pod's cgroup.
pub mod cgroup {
    pub use crate::cgroup::CgroupDir;
}

/// The CNI plugin.
pub mod cni {
    pub use crate::cni::install;
}

/// Options and route snapshot to map entries.
pub mod compile {
    pub use crate::compile::{Compiled, Entries, PortPrefix, compile};
}

/// The daemon: its protocol, and what it reports.
pub mod daemon {
    pub use crate::daemon::{
        cutover::{CutoverProgress, CutoverState},
        desired::CaptureArgs,
        mesh::Mesh,
        mode::{ModeDecision, ModeRule, PodMode},
        protocol::{Add, DEFAULT_SOCKET, DaemonRequest, Response, SandboxInfo, Select},
        report::{PodFailure, PodReport, PodState, ProofReport},
        sidecar::{Container, Ipv6, PodMetadata, PodVerdict, Selection, decide},
        socket,
    };
}

/// The proxy's listeners.
pub mod listeners {
    pub use crate::listeners::{FoundListeners, Listener, find};
}

/// The maps, typed.
pub mod maps {
    pub use crate::maps::Maps;
}

/// Network namespaces.
pub mod netns {
    pub use crate::netns::Netns;
}

/// The programs and maps of a node and its pods.
pub mod node {
    pub use crate::node::{Node, Observation, Rewrite, Target};
}

/// istio-iptables' options.
pub mod options {
    pub use crate::options::{
        Cidrs, Config, Dns, EtcFiles, InboundMode, InboundPorts, InterfacePattern, NameSource, Note,
        OptionError, OwnerGroups, Ports, RawOptions, RunOptions,
    };
}

/// The programs.
pub mod programs {
    pub use crate::objects::CAPTURE;
    pub use crate::programs::{DEFAULT_MAX_CONNECTIONS, attach_type};
}

/// The record of a pod.
pub mod record {
    pub use crate::record::RecordOrigin;
}

/// Routes, addresses and interfaces of a namespace.
pub mod routes {
    pub use crate::routes::{Interface, MAX_ENTRIES, Reach, Route, RouteSnapshot};
}

/// The `bpf()` calls that aya does not have.
pub mod sys {
    pub use crate::sys::{LinkInfo, Plain, create_blob, entries, link_create, link_info, open_pin, pin};
}
