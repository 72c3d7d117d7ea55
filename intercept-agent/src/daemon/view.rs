//! Merges the claims of all sources on a pod.
//!
//! A source sets its own claim and changes no other. The resolution depends only on which claims there are, never on
//! their order:
//!
//! 1. A file of the folder is a separate pod. No other source shares its key.
//! 2. Selection and arguments come from the API object, else from the annotations that the CNI plugin received, else
//!    from the capture of an earlier daemon.
//! 3. The place is that of the runtime's sandbox (cgroup, namespace, address), else the cgroup of the object's UID,
//!    else that of an earlier daemon.
//! 4. Only the runtime ends a sandbox. An object that is deleted from the API keeps its claim until then.
//!
//! An API object describes the pod with its own UID. A mirror pod describes the static pod whose hash it has. Others
//! than the kubelet can create objects that look like mirror pods, so one is used only if the runtime reports the pod
//! with the same namespace and name, which are unique among objects.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    path::PathBuf,
};

use super::{
    cause::Cause,
    desired::{CaptureOptions, DesiredPod},
    mode::{ModeDecision, ModeRule},
    sidecar::{AnnotationError, IgnoreReason, PodVerdict, SidecarArgs},
};
use crate::{ids::PodUid, record::RecordOrigin};

/// UID of an API object. The API assigns it, and it is unique.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectUid(pub String);

/// How an API object refers to its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// The pod has the object's own UID.
    Own,
    /// The object mirrors a static pod, whose UID is the hash of its manifest.
    Mirror,
}

/// Identity of an API object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectId {
    /// Its UID.
    pub uid: ObjectUid,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// How it refers to its pod.
    pub binding: Binding,
}

/// Life cycle of an API object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its containers have not started yet.
    Pending,
    /// Its containers have started.
    Running,
    /// It is being deleted. No capture starts for it.
    Terminating,
    /// All its containers have terminated for good.
    Finished,
    /// It is deleted from the API, but its sandbox exists.
    Deleted,
}

/// The place of an object's pod among the node's cgroups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectPlace {
    /// Its cgroup.
    Cgroup(PathBuf),
    /// It has no cgroup yet.
    Pending,
    /// It should have a cgroup and has none; the text says more.
    Missing(String),
}

/// The claim of the API on a pod.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectClaim {
    /// The object.
    pub id: ObjectId,
    /// Time of creation in seconds since the epoch.
    pub created: i64,
    /// Its life cycle.
    pub stage: Stage,
    /// Whether the pod is captured, and how.
    pub verdict: Result<PodVerdict, AnnotationError>,
    /// The place of the pod.
    pub place: ObjectPlace,
    /// The pod's first address, once it has one.
    pub first_address: Option<IpAddr>,
}

/// The claim of the runtime on a pod, through the CNI plugin.
#[derive(Clone, Debug, PartialEq)]
pub struct SandboxClaim {
    /// Id of the sandbox.
    pub id: String,
    /// The pod's namespace; may be empty.
    pub namespace: String,
    /// The pod's name; may be empty.
    pub name: String,
    /// The sandbox's network namespace.
    pub netns: PathBuf,
    /// The pod's cgroup, or why it is unknown.
    pub cgroup: Result<PathBuf, String>,
    /// The pod's first address, if the runtime passes it.
    pub first_address: Option<IpAddr>,
    /// Whether the pod is captured, and how, according to the plugin's input.
    pub verdict: Result<PodVerdict, AnnotationError>,
    /// Whether the API may overrule it.
    pub certainty: Certainty,
}

/// How certain the plugin's input is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certainty {
    /// The API would give the same verdict.
    Certain,
    /// The API may give another verdict.
    Provisional,
}

/// Whether a sandbox still waits for the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ApiWait {
    /// It does not: there is no API, or the wait has timed out.
    #[default]
    Over,
    /// It waits.
    Running,
}

/// The claims on one pod.
#[derive(Debug, Default)]
pub struct PodView {
    file: Option<Result<DesiredPod, String>>,
    file_mode: Option<ModeDecision>,
    sandbox: Option<SandboxClaim>,
    objects: BTreeMap<ObjectUid, ObjectClaim>,
    applied_before: Option<DesiredPod>,
    api_wait: ApiWait,
}

/// The result of merging the claims.
#[derive(Clone, Debug, PartialEq)]
pub enum Resolution {
    /// The pod is to be captured.
    Capture(Box<DesiredPod>),
    /// The same if something is applied for it; otherwise it captures itself.
    CaptureIfKept(Box<DesiredPod>),
    /// The pod is not captured.
    Ignore(IgnoreReason),
    /// A claim is invalid. An applied capture stays.
    Refuse(ClaimError),
    /// The sandbox waits for the API. An applied capture stays.
    AwaitApi,
    /// The pod is to be captured and its place is unknown.
    Unplaced,
    /// There is no such pod.
    Absent,
}

/// Why a claim is invalid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimError {
    /// The arguments cannot be parsed.
    Options(String),
    /// The cgroup is unknown.
    Cgroup(String),
}

impl ClaimError {
    /// Its cause, for metrics.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Options(_) => Cause::Options,
            Self::Cgroup(_) => Cause::Cgroup,
        }
    }
}

/// Where the runtime has placed a pod.
struct SandboxPlace<'a> {
    id: &'a str,
    namespace: &'a str,
    name: &'a str,
    netns: Option<&'a PathBuf>,
    cgroup: Result<&'a PathBuf, &'a String>,
}

impl PodView {
    /// Sets the claim of a file of the folder, or why it is invalid.
    pub fn set_file(&mut self, file: Result<DesiredPod, String>) {
        let mode = |desired: &DesiredPod| ModeDecision::of_options(desired.options.mode(), ModeRule::File);
        self.file_mode = file.as_ref().ok().map(mode);
        self.file = Some(file);
        self.applied_before = None;
    }

    /// Removes the claim of the file.
    pub fn remove_file(&mut self) {
        (self.file, self.file_mode) = (None, None);
        self.applied_before = None;
    }

    /// Sets the capture that an earlier daemon or a command has applied.
    pub fn set_applied_before(&mut self, desired: DesiredPod) {
        self.applied_before = Some(desired);
    }

    /// Removes a capture that a command had applied and has now removed.
    pub fn forget_applied_before(&mut self) {
        self.applied_before = None;
    }

    /// Sets the sandbox of the pod. It replaces an earlier one.
    pub fn set_sandbox(&mut self, sandbox: SandboxClaim, api_wait: ApiWait) {
        self.sandbox = Some(sandbox);
        self.applied_before = None;
        self.api_wait = api_wait;
    }

    /// Ends the wait for the API. False if this sandbox does not wait any more.
    pub fn end_api_wait(&mut self, sandbox: &str) -> bool {
        let waits =
            self.api_wait == ApiWait::Running && self.sandbox.as_ref().is_some_and(|own| own.id == sandbox);
        if waits {
            self.api_wait = ApiWait::Over;
        }
        waits
    }

    /// Returns the pod's sandbox, if the plugin has reported one.
    pub fn sandbox_id(&self) -> Option<&str> {
        self.runtime().map(|sandbox| sandbox.id)
    }

    /// Ends a sandbox. False if the pod has another one or none.
    pub fn end_sandbox(&mut self, id: &str) -> bool {
        let is_it = self.sandbox_id() == Some(id);
        if is_it {
            self.drop_sandbox();
        }
        is_it
    }

    /// The pod's cgroup or namespace is gone. False if a source outlives it and may request the same place again.
    pub fn on_gone(&mut self) -> bool {
        let is_over = self.runtime().is_some()
            || matches!(&self.applied_before, Some(DesiredPod { origin: RecordOrigin::Command, .. }));
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
            // Its processes have ended. The API reports the pod again when it has another sandbox.
            object.place = ObjectPlace::Pending;
        }
    }

    /// Sets the claim of an API object.
    pub fn set_object(&mut self, claim: ObjectClaim) {
        match self.objects.get_mut(&claim.id.uid) {
            // A capture of a terminating pod stays as it is.
            Some(before) if claim.stage == Stage::Terminating => before.stage = Stage::Terminating,
            _ => _ = self.objects.insert(claim.id.uid.clone(), claim),
        }
    }

    /// An object has been deleted from the API.
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

    /// Removes the objects that the API does not list.
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
        if self
            .applied_before
            .as_ref()
            .is_some_and(|before| matches!(before.origin, RecordOrigin::Pod { .. }))
        {
            self.applied_before = None;
        }
    }

    /// Whether no source has a claim on the pod.
    pub fn is_empty(&self) -> bool {
        self.file.is_none()
            && self.sandbox.is_none()
            && self.objects.is_empty()
            && self.applied_before.is_none()
    }

    /// Returns the API object that describes the pod.
    pub fn speaker(&self) -> Option<&ObjectClaim> {
        let bound = self.objects.values().filter(|object| self.is_bound(&object.id));
        // The kubelet creates another mirror pod with the same name after one is deleted.
        bound.max_by_key(|object| (object.stage != Stage::Deleted, object.created, &object.id.uid))
    }

    fn is_bound(&self, id: &ObjectId) -> bool {
        let named = match (&self.sandbox, &self.applied_before) {
            (Some(sandbox), _) => Some((&sandbox.namespace, &sandbox.name)),
            (None, Some(DesiredPod { origin: RecordOrigin::Pod { namespace, name, .. }, .. })) => {
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
                origin: RecordOrigin::Pod { namespace, name, sandbox: Some(id), .. },
                cgroup,
                netns,
                ..
            }) => Some(SandboxPlace { id, namespace, name, netns: netns.as_ref(), cgroup: Ok(cgroup) }),
            _ => None,
        }
    }

    /// Merges the claims on the pod with this UID or sandbox id.
    pub fn resolve(&self, uid: &PodUid) -> Resolution {
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
                    // A mirror pod, which is not used until the runtime reports the static pod.
                    None if !self.objects.is_empty() => Resolution::Unplaced,
                    None => Resolution::Absent,
                };
            }
        };
        match verdict {
            Ok(PodVerdict::Capture(args)) => self.place(uid, args),
            Ok(PodVerdict::CaptureIfKept(args)) => match self.place(uid, args) {
                Resolution::Capture(desired) => Resolution::CaptureIfKept(desired),
                _ => Resolution::Ignore(IgnoreReason::CapturesItself),
            },
            Ok(PodVerdict::Ignore(why)) => Resolution::Ignore(*why),
            Err(error) => Resolution::Refuse(ClaimError::Options(error.to_string())),
        }
    }

    fn place(&self, uid: &PodUid, args: &SidecarArgs) -> Resolution {
        let added = self.sandbox.as_ref().and_then(|sandbox| sandbox.first_address);
        let told = self.speaker().and_then(|object| object.first_address);
        let options = CaptureOptions::Args(args.for_address(added.or(told)));
        let pod = |namespace: &str, name: &str, sandbox: Option<&str>| RecordOrigin::Pod {
            uid: uid.clone(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            sandbox: sandbox.map(str::to_owned),
        };
        let capture = |origin, cgroup: &PathBuf, netns: Option<&PathBuf>| {
            let (cgroup, netns, options) = (cgroup.clone(), netns.cloned(), options.clone());
            let takeover = args.takeover;
            Resolution::Capture(Box::new(DesiredPod { origin, cgroup, netns, options, takeover }))
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

    /// The mode of a pod that is to be captured, and why.
    pub fn mode(&self) -> Option<&ModeDecision> {
        let verdict = match (&self.file, self.speaker(), &self.sandbox) {
            (Some(_), ..) => return self.file_mode.as_ref(),
            (None, Some(object), _) => &object.verdict,
            (None, None, sandbox) => &sandbox.as_ref()?.verdict,
        };
        match verdict {
            Ok(PodVerdict::Capture(args) | PodVerdict::CaptureIfKept(args)) => args.mode.as_ref(),
            Ok(PodVerdict::Ignore(_)) | Err(_) => None,
        }
    }

    /// Returns a readable name.
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
