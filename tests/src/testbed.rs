//! Guards for the kernel objects a test needs; each removes what it made when dropped.
//!
//! Names carry the maker's pid, so that what a killed run left behind is recognised and removed by
//! [`sweep::sweep`]. Needs CAP_SYS_ADMIN, CAP_NET_ADMIN and a cgroup2 mount; without them making a guard fails.

pub mod bpffs;
pub mod cgroup;
pub mod name;
pub mod namespace;
pub mod netlink;
pub mod pod;
pub mod sandbox;
pub mod sweep;

pub use bpffs::BpffsMount;
pub use cgroup::Cgroup;
pub use namespace::Namespace;
pub use pod::{Neighbour, Pod, PodInterface, PodSpec};
pub use sandbox::{Ids, Sandbox};

/// Reports what a guard could not undo: by panicking, unless a panic is what drops the guard.
fn complain(what: &std::fmt::Arguments<'_>) {
    if std::thread::panicking() {
        eprintln!("{what}");
    } else {
        panic!("{what}");
    }
}
