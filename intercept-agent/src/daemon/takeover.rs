//! Whether a pod that its own init container captures is cut over from those rules of iptables (docs/cutover.md).

use std::collections::BTreeMap;

use super::{
    desired::CaptureArgs,
    mode::{self, EnforcedWorkloads, ModeClaims, ModeDecision, ModeRule, PodMode},
    sidecar::{AnnotationError, IgnoreReason, PodMetadata, PodVerdict, SidecarArgs},
};
use crate::cutover::Caution;

/// The annotation by which a pod is cut over although the comparison differs or has little to say. Of this project.
pub const NAME: &str = "intercept/cutover";

/// Default of `--cutover-min-flows`: flows that must have been compared, without a difference, before a pod is cut over.
pub const DEFAULT_MIN_FLOWS: u64 = 10;

/// Whether a pod is cut over from rules of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Takeover {
    /// It has none, or is in shadow mode.
    #[default]
    None,
    /// It is compared first, and cut over when it agrees.
    Agreed,
    /// It is cut over without that.
    Forced,
}

impl Takeover {
    /// What must be known before the pod is cut over. It is compared in at least `min_flows` flows.
    pub fn caution(self, min_flows: u64) -> Caution {
        match self {
            Self::None | Self::Agreed => Caution::Compared(min_flows),
            Self::Forced => Caution::Forced,
        }
    }

    fn read(annotations: &BTreeMap<String, String>) -> Result<Self, AnnotationError> {
        match annotations.get(NAME).map(|value| value.trim()) {
            None | Some("") => Ok(Self::Agreed),
            Some("force") => Ok(Self::Forced),
            Some(other) => {
                let problem = format!("`{other}` is not known; give force, or remove it");
                Err(AnnotationError::new(NAME, problem))
            }
        }
    }
}

impl PodMetadata {
    /// What is said of its mode.
    pub(super) fn modes<'a>(&'a self, enforced: &'a EnforcedWorkloads) -> ModeClaims<'a> {
        ModeClaims {
            annotation: self.annotations.get(mode::NAME).map(String::as_str),
            label: self.namespace_mode.as_deref(),
            workload: self.workload.as_ref(),
            enforced,
        }
    }

    /// Decides for a pod that this init container may capture itself, whose verdict is `captured` otherwise.
    pub(super) fn beside(
        &self,
        init: &str,
        modes: ModeClaims<'_>,
        defaults: &CaptureArgs,
        captured: impl FnOnce() -> Result<PodVerdict, AnnotationError>,
    ) -> Result<PodVerdict, AnnotationError> {
        let has_init = self.containers.iter().any(|container| container.name == init && container.init);
        if !has_init {
            return captured();
        }
        decide(modes, defaults, &self.annotations, captured)
    }
}

/// Decides for a pod that its init container captures. `captured` is the verdict without that container.
pub fn decide(
    modes: ModeClaims<'_>,
    defaults: &CaptureArgs,
    annotations: &BTreeMap<String, String>,
    captured: impl FnOnce() -> Result<PodVerdict, AnnotationError>,
) -> Result<PodVerdict, AnnotationError> {
    let ModeDecision { mode, rule, .. } = modes.decide(defaults)?;
    if mode == PodMode::Shadow {
        return captured();
    }
    let is_asked = rule != ModeRule::Default;
    match captured().and_then(|verdict| Ok((verdict, Takeover::read(annotations)?))) {
        Ok((PodVerdict::Capture(args), takeover)) => {
            let args = SidecarArgs { takeover, ..args };
            Ok(if is_asked { PodVerdict::Capture(args) } else { PodVerdict::CaptureIfKept(args) })
        }
        Ok((other, _)) => Ok(other),
        Err(error) if is_asked => Err(error),
        // It was not asked for, and the annotations of a pod that is left alone need not be right.
        Err(_) => Ok(PodVerdict::Ignore(IgnoreReason::CapturesItself)),
    }
}

/// As [`decide`], for a pod that starts, for which nothing is applied.
pub fn decide_for_start(
    modes: ModeClaims<'_>,
    defaults: &CaptureArgs,
    annotations: &BTreeMap<String, String>,
    captured: Result<PodVerdict, AnnotationError>,
) -> Result<PodVerdict, AnnotationError> {
    Ok(match decide(modes, defaults, annotations, || captured)? {
        PodVerdict::CaptureIfKept(_) => PodVerdict::Ignore(IgnoreReason::CapturesItself),
        verdict => verdict,
    })
}
