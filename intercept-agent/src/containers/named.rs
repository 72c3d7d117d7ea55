//! Which container a cgroup below a pod's is of: by the file for termination messages, which the kubelet mounts into every
//! container from `.../pods/UID/containers/NAME/ID`. It is there with every runtime, before the container's first instruction.

use std::{ffi::OsStr, fs, path::Path, path::PathBuf};

use procfs::process::Process;

use crate::{
    cgroup::{CgroupDir, CgroupError},
    pod_process::LeafCgroup,
};

/// Filesystems that a process without privileges can mount, in which it can make any path.
const FORGEABLE: [&str; 5] = ["tmpfs", "ramfs", "overlay", "overlayfs", "devtmpfs"];

/// A cgroup directly below a pod's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ChildCgroup {
    pub(super) path: PathBuf,
    /// The name of its container, if that is known yet. The sandbox has none.
    pub(super) name: Option<String>,
}

/// The cgroups directly below `pod`. With the pod's UID, names that the kubelet gave to another pod's containers do not count.
pub(super) fn children(pod: &CgroupDir, uid: Option<&str>) -> Result<Vec<ChildCgroup>, CgroupError> {
    let mut children = Vec::new();
    for path in
        folders(pod.path()).map_err(|source| CgroupError::Read { path: pod.path().to_owned(), source })?
    {
        let processes = match CgroupDir::open(&path).and_then(|cgroup| cgroup.processes()) {
            Ok(processes) => processes,
            // Removed meanwhile, or nothing in it can be seen from here.
            Err(CgroupError::Open { .. } | CgroupError::Hidden { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        // The first process: it is the runtime's until the container starts, and the others may have mounts of their own.
        let name = processes.first().and_then(|pid| name_of(pid.as_raw_nonzero().get(), uid));
        children.push(ChildCgroup { path, name });
    }
    Ok(children)
}

/// The folders in a cgroup, without those of the agent's own children.
pub(super) fn folders(cgroup: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(cgroup)?.flatten();
    Ok(entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter(|entry| !entry.file_name().to_str().is_some_and(LeafCgroup::is_one))
        .map(|entry| entry.path())
        .collect())
}

fn name_of(pid: i32, uid: Option<&str>) -> Option<String> {
    let mounts = Process::new(pid).ok()?.mountinfo().ok()?;
    mounts.into_iter().find_map(|mount| {
        let forgeable = FORGEABLE.contains(&mount.fs_type.as_str()) || mount.fs_type.starts_with("fuse");
        if forgeable { None } else { name_in(Path::new(&mount.root), uid) }
    })
}

/// The name in `.../pods/UID/containers/NAME/ID`. Only the first `pods` counts: volumes are further down.
fn name_in(root: &Path, uid: Option<&str>) -> Option<String> {
    let mut parts = root.iter().skip_while(|part| *part != "pods").skip(1);
    let of = parts.next()?;
    if uid.is_some_and(|uid| OsStr::new(uid) != of) || parts.next()? != "containers" {
        return None;
    }
    let name = parts.next()?.to_str()?.to_owned();
    (parts.count() == 1).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_kubelets_folders() {
        let name = |root: &str| name_in(Path::new(root), Some("1-2"));
        assert_eq!(
            name("/var/lib/kubelet/pods/1-2/containers/istio-proxy/0a1b").as_deref(),
            Some("istio-proxy")
        );
        assert_eq!(name("/pods/1-2/containers/app/0a1b").as_deref(), Some("app"), "a filesystem of its own");
        for other in [
            "/",
            "/var/lib/kubelet/pods/3/containers/istio-proxy/0a1b",
            "/var/lib/kubelet/pods/1-2/containers/istio-proxy",
            "/var/lib/kubelet/pods/1-2/containers/istio-proxy/0a1b/more",
            "/var/lib/kubelet/pods/1-2/volumes/kubernetes.io~empty-dir/v/pods/1-2/containers/istio-proxy/0a1b",
        ] {
            assert_eq!(name(other), None, "{other}");
        }
        assert_eq!(name_in(Path::new("/pods/3/containers/app/0"), None).as_deref(), Some("app"));
    }
}
