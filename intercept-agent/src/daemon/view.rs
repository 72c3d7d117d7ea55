//! What the sources say of one pod, merged.
//!
//! Each source makes its own claim and changes no other. What follows from all claims depends on which there are, never on
//! the order in which they came:
//!
//! 1. A file of the folder is a pod of its own; no other source shares its key.
//! 2. Selection and options: the API's object, else the CNI plugin's annotations, else what an earlier daemon applied.
//! 3. ObjectPlace: the runtime's sandbox (its cgroup, its namespace, its address), else the cgroup of the object's UID, else that of an
//!    earlier daemon.
//! 4. End: only the runtime ends a sandbox. An object that is gone from the API keeps its say until then.
//!
//! An object of the API speaks for the pod of its own UID. A mirror pod speaks for the static pod whose hash it bears; as
//! an object that looks like one can be made by others than the kubelet, it is heard only if the runtime has given the
//! pod the same namespace and name, which no two objects have.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    path::PathBuf,
};

use super::{
    desired::{CaptureOptions, DesiredPod},
    sidecar::{AnnotationError, IgnoreReason, PodVerdict},
};
use crate::store::Origin;

/// The UID of an object of the API. The API gives it out, so that no object has another's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectUid(pub String);

/// How an object of the API is bound to its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// The pod has the object's own UID.
    Own,
    /// The object mirrors a static pod, which has the hash of its manifest for a UID.
    Mirror,
}

/// Which object of the API speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectId {
    /// Its UID.
    pub uid: ObjectUid,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// How it is bound to the pod that it speaks for.
    pub binding: Binding,
}

/// Where an object of the API is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its containers are to be started.
    Pending,
    /// They were.
    Running,
    /// It is being deleted: nothing new begins for it.
    Terminating,
    /// All its containers have ended for good.
    Finished,
    /// It is gone from the API, and its sandbox is not.
    Deleted,
}

/// Where the pod of an object is, as far as the node's cgroups tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectPlace {
    /// Its cgroup.
    Cgroup(PathBuf),
    /// It has none yet.
    Pending,
    /// It has none, and should.
    Missing(String),
}

/// What the API says of a pod.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectClaim {
    /// Which object.
    pub id: ObjectId,
    /// When it was made, in seconds since 1970.
    pub created: i64,
    /// Where it is in its life.
    pub stage: Stage,
    /// Whether it is captured, and how.
    pub verdict: Result<PodVerdict, AnnotationError>,
    /// Where it is.
    pub place: ObjectPlace,
    /// Its first address, once it has one.
    pub first_address: Option<IpAddr>,
}

/// What the runtime says of a pod, through the CNI plugin.
#[derive(Clone, Debug, PartialEq)]
pub struct SandboxClaim {
    /// The sandbox.
    pub id: String,
    /// The pod's namespace; may be empty.
    pub namespace: String,
    /// The pod's name; may be empty.
    pub name: String,
    /// The sandbox's network namespace.
    pub netns: PathBuf,
    /// The pod's cgroup, or why it is not known.
    pub cgroup: Result<PathBuf, String>,
    /// Its first address, if the runtime has told the plugin.
    pub first_address: Option<IpAddr>,
    /// Whether it is captured, and how, by what the plugin was told.
    pub verdict: Result<PodVerdict, AnnotationError>,
    /// How far the plugin's word goes.
    pub certainty: Certainty,
}

/// How much is known from what the plugin is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certainty {
    /// The API would say the same.
    Certain,
    /// The API may know better.
    Provisional,
}

/// Whether a sandbox is decided on without the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ApiWait {
    /// It is: there is no API, or it was silent for too long.
    #[default]
    Over,
    /// Not yet.
    Running,
}

/// The claims on one pod.
#[derive(Debug, Default)]
pub struct PodView {
    file: Option<Result<DesiredPod, String>>,
    sandbox: Option<SandboxClaim>,
    objects: BTreeMap<ObjectUid, ObjectClaim>,
    applied_before: Option<DesiredPod>,
    api_wait: ApiWait,
}

/// What follows from the claims.
#[derive(Clone, Debug, PartialEq)]
pub enum Resolution {
    /// The pod is to be captured.
    Capture(Box<DesiredPod>),
    /// It is not.
    Ignore(IgnoreReason),
    /// What is said of it cannot be understood: what is applied stays.
    Refuse(ClaimError),
    /// It waits for the API: what is applied stays.
    AwaitApi,
    /// It is to be captured, and has no place yet.
    Unplaced,
    /// There is no such pod.
    Absent,
}

/// Why a claim cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimError {
    /// The options do not read.
    Options(String),
    /// The cgroup is not known.
    Cgroup(String),
}

/// Where the runtime has put a pod.
struct SandboxPlace<'a> {
    id: &'a str,
    namespace: &'a str,
    name: &'a str,
    netns: Option<&'a PathBuf>,
    cgroup: Result<&'a PathBuf, &'a String>,
}

impl PodView {
    /// A file of the folder asks for the pod, or does not read.
    pub fn set_file(&mut self, file: Result<DesiredPod, String>) {
        self.file = Some(file);
        self.applied_before = None;
    }

    /// The file is gone.
    pub fn remove_file(&mut self) {
        self.file = None;
        self.applied_before = None;
    }

    /// An earlier daemon, or a command, applied this.
    pub fn set_applied_before(&mut self, desired: DesiredPod) {
        self.applied_before = Some(desired);
    }

    /// What was applied by command was taken away by command.
    pub fn forget_applied_before(&mut self) {
        self.applied_before = None;
    }

    /// The runtime has a sandbox for the pod: the one before, if any, is gone.
    pub fn set_sandbox(&mut self, sandbox: SandboxClaim, api_wait: ApiWait) {
        self.sandbox = Some(sandbox);
        self.applied_before = None;
        self.api_wait = api_wait;
    }

    /// The API was silent for too long. False if nothing waits for it any more on behalf of this sandbox.
    pub fn end_api_wait(&mut self, sandbox: &str) -> bool {
        let waits =
            self.api_wait == ApiWait::Running && self.sandbox.as_ref().is_some_and(|own| own.id == sandbox);
        if waits {
            self.api_wait = ApiWait::Over;
        }
        waits
    }

    /// The sandbox that the runtime has for the pod, as far as the plugin was told.
    pub fn sandbox_id(&self) -> Option<&str> {
        self.runtime().map(|sandbox| sandbox.id)
    }

    /// The runtime takes a sandbox away. False if the pod has another one by now, or none.
    pub fn end_sandbox(&mut self, id: &str) -> bool {
        let is_it = self.sandbox_id() == Some(id);
        if is_it {
            self.drop_sandbox();
        }
        is_it
    }

    /// The pod's cgroup or namespace is gone. False if a source that outlives it may want it again in the same place.
    pub fn on_gone(&mut self) -> bool {
        let is_over = self.runtime().is_some()
            || matches!(&self.applied_before, Some(DesiredPod { origin: Origin::Command, .. }));
        if is_over {
            self.drop_sandbox();
        }
        is_over
    }

    fn drop_sandbox(&mut self) {
        self.sandbox = None;
        self.applied_before = None;
        self.api_wait = ApiWait::Over;
        self.objects.retain(|_, object| object.stage != Stage::Deleted);
        for object in self.objects.values_mut() {
            // Its processes are ending. The API tells of the pod again once it has another sandbox.
            object.place = ObjectPlace::Pending;
        }
    }

    /// The API tells of an object.
    pub fn set_object(&mut self, claim: ObjectClaim) {
        match self.objects.get_mut(&claim.id.uid) {
            // What began for it goes on as it is.
            Some(before) if claim.stage == Stage::Terminating => before.stage = Stage::Terminating,
            _ => _ = self.objects.insert(claim.id.uid.clone(), claim),
        }
    }

    /// The API knows an object no more.
    pub fn remove_object(&mut self, id: &ObjectId) {
        let runtime = self.runtime().is_some();
        match self.objects.get_mut(&id.uid) {
            Some(object) if runtime => object.stage = Stage::Deleted,
            _ => _ = self.objects.remove(&id.uid),
        }
        if !runtime && self.is_bound(id) {
            self.drop_applied_by_api();
        }
    }

    /// The API has told of all the objects that it has.
    pub fn retain_objects(&mut self, listed: &HashSet<ObjectUid>) {
        let gone: Vec<ObjectId> = self
            .objects
            .values()
            .map(|object| object.id.clone())
            .filter(|id| !listed.contains(&id.uid))
            .collect();
        gone.iter().for_each(|id| self.remove_object(id));
        if self.runtime().is_none() && self.speaker().is_none() {
            self.drop_applied_by_api();
        }
    }

    fn drop_applied_by_api(&mut self) {
        if self.applied_before.as_ref().is_some_and(|before| matches!(before.origin, Origin::Pod { .. })) {
            self.applied_before = None;
        }
    }

    /// Whether a source has anything to say of the pod.
    pub fn is_empty(&self) -> bool {
        self.file.is_none()
            && self.sandbox.is_none()
            && self.objects.is_empty()
            && self.applied_before.is_none()
    }

    /// The object of the API that speaks for the pod.
    pub fn speaker(&self) -> Option<&ObjectClaim> {
        let bound = self.objects.values().filter(|object| self.is_bound(&object.id));
        // The kubelet makes another mirror pod of the same name when one is deleted.
        bound.max_by_key(|object| (object.stage != Stage::Deleted, object.created, &object.id.uid))
    }

    fn is_bound(&self, id: &ObjectId) -> bool {
        let named = match (&self.sandbox, &self.applied_before) {
            (Some(sandbox), _) => Some((&sandbox.namespace, &sandbox.name)),
            (None, Some(DesiredPod { origin: Origin::Pod { namespace, name, .. }, .. })) => {
                Some((namespace, name))
            }
            _ => None,
        };
        match id.binding {
            Binding::Own => true,
            Binding::Mirror => named == Some((&id.namespace, &id.name)),
        }
    }

    fn runtime(&self) -> Option<SandboxPlace<'_>> {
        if let Some(SandboxClaim { id, namespace, name, netns, cgroup, .. }) = &self.sandbox {
            return Some(SandboxPlace { id, namespace, name, netns: Some(netns), cgroup: cgroup.as_ref() });
        }
        match &self.applied_before {
            Some(DesiredPod {
                origin: Origin::Pod { namespace, name, sandbox: Some(id), .. },
                cgroup,
                netns,
                ..
            }) => Some(SandboxPlace { id, namespace, name, netns: netns.as_ref(), cgroup: Ok(cgroup) }),
            _ => None,
        }
    }

    /// What follows from the claims for the pod of this UID or sandbox.
    pub fn resolve(&self, uid: &str) -> Resolution {
        let before = self.applied_before.as_ref();
        let verdict = match (&self.file, self.speaker(), &self.sandbox) {
            (Some(Ok(desired)), ..) => return Resolution::Capture(Box::new(desired.clone())),
            (Some(Err(problem)), ..) => return Resolution::Refuse(ClaimError::Options(problem.clone())),
            (None, Some(object), _) => match object.stage {
                Stage::Finished if self.runtime().is_none() => {
                    return Resolution::Ignore(IgnoreReason::Finished);
                }
                Stage::Terminating if let Some(before) = before => {
                    return Resolution::Capture(Box::new(before.clone()));
                }
                _ => &object.verdict,
            },
            (None, None, Some(_)) if self.api_wait == ApiWait::Running => return Resolution::AwaitApi,
            (None, None, Some(sandbox)) => &sandbox.verdict,
            (None, None, None) => {
                return match before {
                    Some(before) => Resolution::Capture(Box::new(before.clone())),
                    // A mirror pod, which is heard once the runtime has told of the static pod.
                    None if !self.objects.is_empty() => Resolution::Unplaced,
                    None => Resolution::Absent,
                };
            }
        };
        match verdict {
            Ok(PodVerdict::Capture(args)) => {
                let added = self.sandbox.as_ref().and_then(|sandbox| sandbox.first_address);
                let told = self.speaker().and_then(|object| object.first_address);
                self.place(uid, &CaptureOptions::Args(args.for_address(added.or(told))))
            }
            Ok(PodVerdict::Ignore(why)) => Resolution::Ignore(*why),
            Err(error) => Resolution::Refuse(ClaimError::Options(error.to_string())),
        }
    }

    fn place(&self, uid: &str, options: &CaptureOptions) -> Resolution {
        let pod = |namespace: &str, name: &str, sandbox: Option<&str>| Origin::Pod {
            uid: uid.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            sandbox: sandbox.map(str::to_owned),
        };
        let capture = |origin, cgroup: &PathBuf, netns: Option<&PathBuf>| {
            let (cgroup, netns, options) = (cgroup.clone(), netns.cloned(), options.clone());
            Resolution::Capture(Box::new(DesiredPod { origin, cgroup, netns, options }))
        };
        if let Some(sandbox) = self.runtime() {
            return match sandbox.cgroup {
                Ok(cgroup) => {
                    capture(pod(sandbox.namespace, sandbox.name, Some(sandbox.id)), cgroup, sandbox.netns)
                }
                Err(problem) => Resolution::Refuse(ClaimError::Cgroup(problem.clone())),
            };
        }
        let Some(ObjectClaim { id, place, .. }) = self.speaker() else { return Resolution::Unplaced };
        match (place, &self.applied_before) {
            (ObjectPlace::Cgroup(cgroup), _) => capture(pod(&id.namespace, &id.name, None), cgroup, None),
            (_, Some(before)) => {
                capture(pod(&id.namespace, &id.name, None), &before.cgroup, before.netns.as_ref())
            }
            (ObjectPlace::Pending, None) => Resolution::Unplaced,
            (ObjectPlace::Missing(problem), None) => Resolution::Refuse(ClaimError::Cgroup(problem.clone())),
        }
    }

    /// A name for people.
    pub fn name(&self) -> Option<String> {
        let slashed = |namespace: &str, name: &str| {
            (!namespace.is_empty() && !name.is_empty()).then(|| format!("{namespace}/{name}"))
        };
        if let Some(named) = self.runtime().and_then(|sandbox| slashed(sandbox.namespace, sandbox.name)) {
            return Some(named);
        }
        if let Some(named) = self.speaker().and_then(|object| slashed(&object.id.namespace, &object.id.name))
        {
            return Some(named);
        }
        let file = self.file.as_ref().and_then(|file| file.as_ref().ok());
        file.or(self.applied_before.as_ref()).map(DesiredPod::name)
    }
}

#[cfg(test)]
mod tests;
