//! Finds the cgroup that the kubelet has created for a pod.
//!
//! | driver | pod |
//! |---|---|
//! | systemd | `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid, _ for ->.slice` |
//! | cgroupfs | `kubepods/burstable/pod<uid>` |
//!
//! Guaranteed pods have no QoS class in the path. The names of the containers' cgroups below depend on the runtime
//! (containerd: `cri-containerd-<id>.scope` or `<id>`, CRI-O: `crio-<id>.scope`) and do not matter, because a program
//! on the pod's cgroup covers all of them. The position of the folder `kubepods` depends on the kubelet's `cgroupRoot`
//! (`kubelet.slice/kubelet-kubepods.slice` and so on in kind), on whether the node is itself a container, and on the
//! cgroup2 hierarchy of a hybrid system. So it is searched for.

use std::{
    fs,
    path::{Component, Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Depth of the search below the mount point, enough for a node that is a container in a container.
const DEPTH: usize = 8;
/// Shortest interval between searches.
const AGAIN: Duration = Duration::from_secs(5);
const CLASSES: [&str; 3] = ["", "burstable", "besteffort"];

/// Why the cgroup of a pod is unknown.
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    /// The pod has no cgroup in any of the places.
    #[error(
        "looking for the cgroup of pod {uid}: it is not below {}; start the daemon with the node's cgroup2 hierarchy \
         mounted, and with --cgroup-root if the kubelet has its own root", shown(.roots)
    )]
    NotFound {
        /// UID of the pod.
        uid: String,
        /// The folders that were searched.
        roots: Vec<PathBuf>,
    },
    /// The name cannot be part of a path.
    #[error("{0:?} is not a valid {1}")]
    Malformed(String, &'static str),
}

fn shown(roots: &[PathBuf]) -> String {
    match roots {
        [] => "any folder called kubepods (there is none)".to_owned(),
        roots => roots.iter().map(|root| root.display().to_string()).collect::<Vec<_>>().join(", "),
    }
}

/// Finds the cgroups of pods.
pub struct Placement {
    mounts: Vec<PathBuf>,
    found: Mutex<SearchRoots>,
}

/// The folders of pods' cgroups, as last searched.
#[derive(Default)]
struct SearchRoots {
    roots: Vec<PathBuf>,
    looked: Option<Instant>,
}

impl Placement {
    /// Searches below these folders, which are mount points of cgroup2 or folders in one.
    pub fn below(mounts: Vec<PathBuf>) -> Self {
        Self { mounts, found: Mutex::default() }
    }

    /// Returns the existing cgroup of the pod with this UID.
    pub fn of_pod(&self, uid: &str) -> Result<PathBuf, PlacementError> {
        let is_sound = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if uid.is_empty() || !uid.chars().all(is_sound) {
            return Err(PlacementError::Malformed(uid.to_owned(), "pod UID"));
        }
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = among(&found.roots, uid) {
            return Ok(path);
        }
        // For the first pod of the node, or after the kubelet has been set up again.
        if found.looked.is_none_or(|looked| looked.elapsed() > AGAIN) || found.roots.is_empty() {
            found.looked = Some(Instant::now());
            found.roots.clear();
            for mount in &self.mounts {
                search(mount, DEPTH, &mut found.roots);
            }
        }
        among(&found.roots, uid)
            .ok_or_else(|| PlacementError::NotFound { uid: uid.to_owned(), roots: found.roots.clone() })
    }

    /// Returns the existing cgroup that a runtime names: a path from the root of the hierarchy, or the name of a slice.
    pub fn of_name(&self, name: &str) -> Result<PathBuf, PlacementError> {
        let relative = match name.strip_suffix(".slice") {
            Some(slice) if !name.contains('/') => expand(slice),
            _ => PathBuf::from(name.trim_start_matches('/')),
        };
        let is_sound = relative.components().all(|part| matches!(part, Component::Normal(_)));
        if relative.as_os_str().is_empty() || !is_sound {
            return Err(PlacementError::Malformed(name.to_owned(), "cgroup name"));
        }
        let found = self.mounts.iter().map(|mount| mount.join(&relative)).find(|path| path.is_dir());
        found.ok_or_else(|| PlacementError::NotFound { uid: name.to_owned(), roots: self.mounts.clone() })
    }
}

/// Returns the path of slice `a-b-c`, which is `a.slice/a-b.slice/a-b-c.slice`.
fn expand(slice: &str) -> PathBuf {
    let mut path = PathBuf::new();
    for (at, _) in slice.match_indices('-').chain(std::iter::once((slice.len(), ""))) {
        path.push(format!("{}.slice", &slice[..at]));
    }
    path
}

/// Returns the prefix of the names in a folder of the kubelet: the slice's name without `.slice`, or an empty string
/// for cgroupfs. `None` if the folder is not the kubelet's.
fn prefix(name: &str) -> Option<&str> {
    if name == "kubepods" {
        return Some("");
    }
    let slice = name.strip_suffix(".slice")?;
    (slice == "kubepods" || slice.ends_with("-kubepods")).then_some(slice)
}

fn search(folder: &Path, depth: usize, roots: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        if entry.file_name().to_str().and_then(prefix).is_some() {
            roots.push(path.clone());
        }
        if depth > 0 {
            search(&path, depth - 1, roots);
        }
    }
}

fn among(roots: &[PathBuf], uid: &str) -> Option<PathBuf> {
    roots.iter().flat_map(|root| candidates(root, uid)).find(|path| path.is_dir())
}

/// Returns the possible paths of a pod below a folder `kubepods`.
fn candidates(root: &Path, uid: &str) -> Vec<PathBuf> {
    let slice = root.file_name().and_then(|name| name.to_str()).and_then(prefix).unwrap_or_default();
    let place = |class: &&str| match (slice, *class) {
        ("", "") => root.join(format!("pod{uid}")),
        ("", class) => root.join(class).join(format!("pod{uid}")),
        (slice, "") => root.join(format!("{slice}-pod{}.slice", uid.replace('-', "_"))),
        (slice, class) => root
            .join(format!("{slice}-{class}.slice"))
            .join(format!("{slice}-{class}-pod{}.slice", uid.replace('-', "_"))),
    };
    CLASSES.iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "3e5d2a1c-0c1f-4d53-9f57-6b1d6a3b7c11";

    /// Layouts observed on nodes, from the mount point of cgroup2 to the pod.
    const LAYOUTS: [(&str, &str); 8] = [
        ("systemd, guaranteed", "kubepods.slice/kubepods-podU_.slice"),
        ("systemd, burstable", "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_.slice"),
        ("systemd, besteffort", "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_.slice"),
        ("cgroupfs, guaranteed", "kubepods/podU-"),
        ("cgroupfs, besteffort", "kubepods/besteffort/podU-"),
        (
            "kind, systemd",
            "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-podU_.slice",
        ),
        ("kind, cgroupfs", "kubelet/kubepods/burstable/podU-"),
        (
            "kind seen from the host",
            "system.slice/docker-0a1b.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podU_.slice",
        ),
    ];

    #[test]
    fn pods_are_found_in_every_layout() {
        for (what, layout) in LAYOUTS {
            let mount = tempfile::tempdir().expect("a folder");
            let pod = mount.path().join(layout.replace("U_", &UID.replace('-', "_")).replace("U-", UID));
            for container in ["cri-containerd-11.scope", "crio-22.scope"] {
                fs::create_dir_all(pod.join(container)).expect("made");
            }
            fs::create_dir_all(mount.path().join("user.slice/user-0.slice")).expect("made");
            let placement = Placement::below(vec![mount.path().to_owned()]);
            assert_eq!(placement.of_pod(UID).expect(what), pod, "{what}");
        }
    }

    #[test]
    fn a_pod_that_is_not_there_is_named_with_where_was_looked() {
        let mount = tempfile::tempdir().expect("a folder");
        let placement = Placement::below(vec![mount.path().to_owned()]);
        let error = placement.of_pod(UID).expect_err("no pods").to_string();
        assert!(error.contains(UID) && error.contains("there is none"), "{error}");
        // The node's first pod may appear right afterwards.
        fs::create_dir_all(mount.path().join(format!("kubepods/pod{UID}"))).expect("made");
        placement.of_pod(UID).expect("found now");
        let error = placement.of_pod("other").expect_err("no such pod").to_string();
        assert!(error.contains("/kubepods"), "{error}");
    }

    #[test]
    fn what_is_no_uid_leads_nowhere() {
        let mount = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(mount.path().join("kubepods/podx")).expect("made");
        let placement = Placement::below(vec![mount.path().to_owned()]);
        for uid in ["", "x/../x", "x/", ".."] {
            assert!(matches!(placement.of_pod(uid), Err(PlacementError::Malformed(..))), "{uid:?}");
        }
        for name in ["", "/", "../kubepods", "/kubepods/../kubepods/podx"] {
            assert!(matches!(placement.of_name(name), Err(PlacementError::Malformed(..))), "{name:?}");
        }
    }

    #[test]
    fn names_of_slices_are_paths() {
        let mount = tempfile::tempdir().expect("a folder");
        let slice = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice";
        for path in [slice, "kubepods/pod1-2"] {
            fs::create_dir_all(mount.path().join(path)).expect("made");
        }
        let placement = Placement::below(vec![mount.path().to_owned()]);
        let found = |name: &str| placement.of_name(name).expect(name);
        assert_eq!(found("kubepods-burstable-pod1_2.slice"), mount.path().join(slice));
        assert_eq!(found(&format!("/{slice}")), mount.path().join(slice));
        assert_eq!(found("/kubepods/pod1-2"), mount.path().join("kubepods/pod1-2"));
    }
}
