//! The containers of a pod that its options name, as cgroups below the pod's.

mod named;

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use intercept_common::layout::{MAX_CONTAINERS, PodPolicy, container};
use rustix::process::Pid;

use crate::{
    cgroup::{CgroupDir, CgroupError},
    options::Config,
};

/// The cgroups of the containers that the options of a pod name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ContainerCgroups {
    level: u32,
    /// Ids of cgroups, with bits of `layout::container`.
    members: Vec<(u64, u32)>,
}

/// Why a container's cgroup is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContainerError {
    /// It cannot be opened.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// It is not in the pod.
    #[error(
        "cgroup {} of a container is not below the pod's, {}; give a folder in that one", container.display(), pod.display()
    )]
    Outside {
        /// The container's cgroup.
        container: PathBuf,
        /// The pod's.
        pod: PathBuf,
    },
    /// Not all are equally deep.
    #[error(
        "cgroup {} of a container is at level {level} of the hierarchy and another one at level {other}; give cgroups of \
         the same level, as a runtime makes for the containers of a pod", container.display()
    )]
    Levels {
        /// The container's cgroup.
        container: PathBuf,
        /// Its level.
        level: u32,
        /// The level of the one before.
        other: u32,
    },
    /// More than the policy has room for.
    #[error("{0} cgroups of containers are named, and there is room for {MAX_CONTAINERS}; give fewer")]
    TooMany(usize),
}

impl ContainerCgroups {
    /// Opens the cgroups that `config` names by path or container, all of which must be below one of `around`: that of a
    /// pod, or those of a machine's workload, which may also be the proxy's. A container that does not run has none. `uid`
    /// is the pod's, if it is one of Kubernetes.
    pub fn find(config: &Config, around: &[&CgroupDir], uid: Option<&str>) -> Result<Self, ContainerError> {
        let mut found = Self::default();
        let Some((pod, also)) = around.split_first() else { return Ok(found) };
        for (path, kind) in paths(config, pod, uid)? {
            let cgroup = CgroupDir::open(&path)?;
            let lineage = cgroup.lineage()?;
            let is_below = around.iter().any(|around| lineage.contains(&around.id()));
            let is_one = !also.is_empty() && around.iter().any(|around| around.id() == cgroup.id());
            if !is_below && !is_one {
                return Err(ContainerError::Outside { container: path, pod: pod.path().to_owned() });
            }
            let level = cgroup.level()?;
            if !found.members.is_empty() && level != found.level {
                return Err(ContainerError::Levels { container: path, level, other: found.level });
            }
            found.level = level;
            found.members.push((cgroup.id(), kind));
        }
        match found.members.len() {
            count if count > MAX_CONTAINERS => Err(ContainerError::TooMany(count)),
            _ => Ok(found),
        }
    }

    /// Enters the cgroups into a compiled policy.
    pub fn write(&self, policy: &mut PodPolicy) {
        policy.cgroup_level = self.level;
        let places = policy.cgroup_ids.iter_mut().zip(&mut policy.cgroup_kinds);
        for ((id, kind), member) in places.zip(&self.members) {
            (*id, *kind) = *member;
        }
    }
}

/// The cgroups that `config` names, with bits of `layout::container`.
fn paths(config: &Config, pod: &CgroupDir, uid: Option<&str>) -> Result<Vec<(PathBuf, u32)>, CgroupError> {
    let of = |paths: &[PathBuf], kind| paths.iter().map(|path| (path.clone(), kind)).collect::<Vec<_>>();
    let mut paths = of(&config.proxy_cgroups, container::PROXY);
    paths.extend(of(&config.exempt_cgroups, container::EXEMPT));
    if config.names_containers() {
        for child in named::children(pod, uid)? {
            let is_in = |names: &[String]| child.name.as_ref().is_some_and(|name| names.contains(name));
            let is_proxy = is_in(&config.proxy_containers);
            let kind = if is_proxy { container::PROXY } else { container::EXEMPT };
            if is_proxy || is_in(&config.exempt_containers) {
                paths.push((child.path, kind));
            }
        }
    }
    Ok(paths)
}

/// The cgroups directly below a pod's and their first processes: it changes whenever a container comes or goes.
pub fn fingerprint(pod: &Path) -> Vec<(u64, String)> {
    let children = named::folders(pod).unwrap_or_default();
    let mut found: Vec<_> = children
        .iter()
        .filter_map(|path| {
            let processes = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
            let first = processes.lines().next().unwrap_or_default().to_owned();
            Some((fs::metadata(path).ok()?.ino(), first))
        })
        .collect();
    found.sort_unstable();
    found
}

/// The processes of the proxy's container. `None` if the options name no such container, so that any process of the pod may
/// be the proxy.
pub fn proxy_processes(
    config: &Config,
    pod: &CgroupDir,
    uid: Option<&str>,
) -> Result<Option<Vec<Pid>>, CgroupError> {
    if config.proxy_cgroups.is_empty() && config.proxy_containers.is_empty() {
        return Ok(None);
    }
    let mut processes = Vec::new();
    let proxies = paths(config, pod, uid)?.into_iter().filter(|(_, kind)| *kind == container::PROXY);
    for (path, _) in proxies {
        match CgroupDir::open(path).and_then(|cgroup| cgroup.processes()) {
            Ok(found) => processes.extend(found),
            // The container has ended since the options were validated.
            Err(CgroupError::Open { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(processes))
}

#[cfg(test)]
mod tests {
    use std::{fs, slice::from_ref};

    use super::*;
    use crate::testing::TestCgroup;

    fn config(proxy: &[PathBuf], exempt: &[PathBuf]) -> Config {
        Config { proxy_cgroups: proxy.to_vec(), exempt_cgroups: exempt.to_vec(), ..Config::default() }
    }

    #[test]
    fn containers_are_below_the_pod_and_of_one_level() {
        let (pod, other) = (TestCgroup::new(), TestCgroup::new());
        let make = |pod: &TestCgroup, name: &str| {
            let path = pod.cgroup.path().join(name);
            fs::create_dir_all(&path).expect("a cgroup");
            path
        };
        let (proxy, init, deep) = (make(&pod, "proxy"), make(&pod, "init"), make(&pod, "init/deep"));
        let find = |proxy: &[PathBuf], exempt: &[PathBuf]| {
            ContainerCgroups::find(&config(proxy, exempt), &[&pod.cgroup], None)
        };
        let id = |path: &PathBuf| CgroupDir::open(path).expect("a cgroup").id();

        let found = find(from_ref(&proxy), from_ref(&init)).expect("found");
        let level = pod.cgroup.level().expect("a level") + 1;
        let members = vec![(id(&proxy), container::PROXY), (id(&init), container::EXEMPT)];
        assert_eq!(found, ContainerCgroups { level, members });

        let outside = make(&other, "proxy");
        for path in [outside, other.cgroup.path().to_owned(), pod.cgroup.path().to_owned()] {
            let error = find(&[path], &[]).expect_err("not in the pod");
            assert!(matches!(error, ContainerError::Outside { .. }), "{error}");
        }
        let error = find(from_ref(&proxy), &[deep]).expect_err("two levels");
        assert!(matches!(error, ContainerError::Levels { .. }), "{error}");
        let error = find(&[pod.cgroup.path().join("gone")], &[]).expect_err("no such cgroup");
        assert!(matches!(error, ContainerError::Cgroup(CgroupError::Open { .. })), "{error}");

        let many: Vec<_> = (0..MAX_CONTAINERS).map(|n| make(&pod, &format!("c{n}"))).collect();
        assert_eq!(find(&many, &[]).expect("room").members.len(), MAX_CONTAINERS);
        let error = find(&many, &[proxy]).expect_err("too many");
        assert!(matches!(error, ContainerError::TooMany(9)), "{error}");
    }
}
