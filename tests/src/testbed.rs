//! Guards for the kernel objects that a test needs. Dropping a guard removes its object.
//!
//! Names contain the pid of the process that made them, so that [`sweep::sweep`] can remove what a killed run left. The
//! guards need CAP_SYS_ADMIN, CAP_NET_ADMIN and a cgroup2 mount, and fail without them.

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

/// Reports that a guard could not remove its object. Panics, unless the thread is already panicking.
fn complain(what: &std::fmt::Arguments<'_>) {
    if std::thread::panicking() {
        eprintln!("{what}");
    } else {
        panic!("{what}");
    }
}
