//! Whether the programs act for a pod or only compare (docs/shadow.md).
//!
//! The first that says something decides:
//!
//! 1. the pod's annotation;
//! 2. the label of its namespace;
//! 3. the list of workloads (`--enforce-workloads`);
//! 4. the percentage of workloads (`--enforce-percent`);
//! 5. the daemon's options.
//!
//! No other file knows this order.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use super::{
    desired::CaptureArgs,
    sidecar::{AnnotationError, PodVerdict},
    workload::WorkloadRef,
};

/// The annotation of pods, and the label of namespaces. Of this project.
pub const NAME: &str = "intercept/mode";

/// What the programs do for a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodMode {
    /// They act.
    Enforce,
    /// They decide, compare and change nothing.
    Shadow,
}

/// Which workloads are enforced although shadow mode is the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EnforcedWorkloads {
    /// The percentage of workloads, by [`WorkloadRef::percentile`].
    pub percent: u8,
    /// Workloads by name.
    pub listed: BTreeSet<WorkloadRef>,
}

impl EnforcedWorkloads {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.percent == 0 && self.listed.is_empty()
    }

    /// The rule by which a workload is enforced, if it is. An unknown one is in no list, and in the whole alone.
    fn rule(&self, workload: Option<&WorkloadRef>) -> Option<ModeRule> {
        if workload.is_some_and(|workload| self.listed.contains(workload)) {
            return Some(ModeRule::EnforceWorkloads);
        }
        let percentile = workload.map_or(99, WorkloadRef::percentile);
        (percentile < self.percent).then_some(ModeRule::EnforcePercent)
    }
}

/// What decides the mode of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModeRule {
    /// Its annotation.
    Annotation,
    /// The label of its namespace.
    NamespaceLabel,
    /// The list of workloads.
    EnforceWorkloads,
    /// The percentage of workloads.
    EnforcePercent,
    /// The daemon's options, or those of the CNI plugin.
    Default,
    /// Its file in the folder of pods.
    File,
}

/// The mode of a pod, and why. Its names in JSON are stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModeDecision {
    /// The mode.
    pub mode: PodMode,
    /// What decides it.
    pub rule: ModeRule,
    /// The pod's workload, if it is known.
    pub workload: Option<String>,
    /// That of the workload, from 0 to 99.
    pub percentile: Option<u8>,
    /// Workloads of a lower percentile are enforced.
    pub enforce_percent: u8,
}

/// What is said of a pod's mode.
#[derive(Clone, Copy, Debug)]
pub struct ModeClaims<'a> {
    /// The pod's annotation.
    pub annotation: Option<&'a str>,
    /// The label of its namespace.
    pub label: Option<&'a str>,
    /// Its workload, if it is known.
    pub workload: Option<&'a WorkloadRef>,
    /// Which workloads are enforced.
    pub enforced: &'a EnforcedWorkloads,
}

impl ModeClaims<'_> {
    /// The mode that is asked for, and by what. `None` leaves it to the options.
    pub fn asked(self) -> Result<Option<(PodMode, ModeRule)>, AnnotationError> {
        let problem = |value: &str| format!("`{value}` is no mode; give shadow or enforce");
        match (self.annotation, self.label) {
            (Some(value), _) => match PodMode::read(value) {
                None => Err(AnnotationError::new(NAME, problem(value))),
                Some(mode) => Ok(Some((mode, ModeRule::Annotation))),
            },
            (None, Some(value)) => match PodMode::read(value) {
                None => Err(AnnotationError::of_namespace(NAME, problem(value))),
                Some(mode) => Ok(Some((mode, ModeRule::NamespaceLabel))),
            },
            (None, None) => Ok(self.enforced.rule(self.workload).map(|rule| (PodMode::Enforce, rule))),
        }
    }

    /// The mode, with these options for every pod.
    pub fn decide(self, defaults: &CaptureArgs) -> Result<ModeDecision, AnnotationError> {
        let (mode, rule) = match self.asked()? {
            Some(asked) => asked,
            None => (PodMode::of(defaults), ModeRule::Default),
        };
        Ok(ModeDecision {
            mode,
            rule,
            workload: self.workload.map(ToString::to_string),
            percentile: self.workload.map(WorkloadRef::percentile),
            enforce_percent: self.enforced.percent,
        })
    }

    /// Adds the mode to the arguments of a pod that is captured.
    pub fn apply(
        self,
        mut verdict: PodVerdict,
        defaults: &CaptureArgs,
    ) -> Result<PodVerdict, AnnotationError> {
        if let PodVerdict::Capture(args) = &mut verdict {
            let decision = self.decide(defaults)?;
            if decision.rule != ModeRule::Default {
                // Last, so that it takes precedence.
                args.given.arguments.push(format!("--shadow={}", decision.mode == PodMode::Shadow));
            }
            args.mode = Some(decision);
        }
        Ok(verdict)
    }
}

impl PodMode {
    fn read(value: &str) -> Option<Self> {
        match value.trim() {
            "enforce" => Some(Self::Enforce),
            "shadow" => Some(Self::Shadow),
            _ => None,
        }
    }

    /// That of options.
    pub fn of(given: &CaptureArgs) -> Self {
        if given.is_shadow() { Self::Shadow } else { Self::Enforce }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Shadow => "shadow",
        }
    }
}

impl ModeDecision {
    /// That of options that nothing else changes.
    pub fn of_options(mode: PodMode, rule: ModeRule) -> Self {
        Self { mode, rule, workload: None, percentile: None, enforce_percent: 0 }
    }
}

impl fmt::Display for ModeDecision {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, rule, workload, percentile, enforce_percent } = self;
        write!(out, "{}, ", mode.as_str())?;
        match rule {
            ModeRule::Annotation => write!(out, "by its annotation {NAME}")?,
            ModeRule::NamespaceLabel => write!(out, "by the label {NAME} of its namespace")?,
            ModeRule::EnforceWorkloads => write!(out, "by --enforce-workloads")?,
            ModeRule::EnforcePercent => write!(out, "by --enforce-percent {enforce_percent}")?,
            ModeRule::Default if *enforce_percent > 0 => {
                write!(out, "by default, with --enforce-percent {enforce_percent}")?;
            }
            ModeRule::Default => write!(out, "by default")?,
            ModeRule::File => return write!(out, "by its file"),
        }
        match (workload, percentile) {
            (Some(workload), Some(percentile)) => {
                write!(out, " (workload {workload}, percentile {percentile})")
            }
            _ => write!(out, " (only the Kubernetes API tells its workload)"),
        }
    }
}

#[cfg(test)]
mod tests;
