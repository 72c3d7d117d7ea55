//! Whether the programs act for a pod or only compare (docs/shadow.md).
//!
//! The first that says something decides: the pod's annotation, the label of its namespace, the daemon's options.

use super::{
    desired::CaptureArgs,
    sidecar::{AnnotationError, PodVerdict},
};

/// The annotation of pods, and the label of namespaces. Of this project.
pub const NAME: &str = "intercept/mode";

/// What the programs do for a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodMode {
    /// They act.
    Enforce,
    /// They decide, compare and change nothing.
    Shadow,
}

/// What is said of a pod's mode.
#[derive(Clone, Copy, Debug, Default)]
pub struct ModeClaims<'a> {
    /// The pod's annotation.
    pub annotation: Option<&'a str>,
    /// The label of its namespace.
    pub label: Option<&'a str>,
}

impl ModeClaims<'_> {
    /// The mode that the annotation, else the label, asks for.
    pub fn asked(self) -> Result<Option<PodMode>, AnnotationError> {
        let problem = |value: &str| format!("`{value}` is no mode; give shadow or enforce");
        match (self.annotation, self.label) {
            (Some(value), _) => match PodMode::read(value) {
                None => Err(AnnotationError::new(NAME, problem(value))),
                mode => Ok(mode),
            },
            (None, Some(value)) => match PodMode::read(value) {
                None => Err(AnnotationError::of_namespace(NAME, problem(value))),
                mode => Ok(mode),
            },
            (None, None) => Ok(None),
        }
    }

    /// The mode, with these options for every pod.
    pub fn mode(self, defaults: &CaptureArgs) -> Result<PodMode, AnnotationError> {
        let default = if defaults.is_shadow() { PodMode::Shadow } else { PodMode::Enforce };
        Ok(self.asked()?.unwrap_or(default))
    }

    /// Adds the mode to the arguments of a pod that is captured.
    pub fn apply(self, mut verdict: PodVerdict) -> Result<PodVerdict, AnnotationError> {
        if let PodVerdict::Capture(args) = &mut verdict
            && let Some(mode) = self.asked()?
        {
            // Last, so that it takes precedence.
            args.given.arguments.push(format!("--shadow={}", mode == PodMode::Shadow));
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
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::daemon::{
        mesh::Mesh,
        sidecar::{self, Container, PodMetadata, Selection},
        takeover::Takeover,
    };

    fn defaults(arguments: &[&str]) -> CaptureArgs {
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        CaptureArgs { arguments, ..CaptureArgs::default() }
    }

    #[test]
    fn the_annotation_decides_before_the_label_and_that_before_the_options() {
        use PodMode::{Enforce, Shadow};
        for (annotation, label, options, expected) in [
            (None, None, &[][..], Enforce),
            (None, None, &["--shadow"], Shadow),
            (None, None, &["--shadow=false"], Enforce),
            (None, Some("shadow"), &[], Shadow),
            (None, Some("enforce"), &["--shadow"], Enforce),
            (Some("shadow"), None, &[], Shadow),
            (Some(" enforce "), None, &["--shadow"], Enforce),
            (Some("shadow"), Some("enforce"), &[], Shadow),
            (Some("enforce"), Some("shadow"), &["--shadow"], Enforce),
            // Nothing depends on the label then.
            (Some("shadow"), Some("wrong"), &[], Shadow),
        ] {
            let mode = ModeClaims { annotation, label }.mode(&defaults(options));
            assert_eq!(mode, Ok(expected), "{annotation:?} {label:?} {options:?}");
        }
    }

    #[test]
    fn a_wrong_value_names_its_place_and_the_values() {
        let text = |annotation, label| {
            let asked = ModeClaims { annotation, label }.asked();
            asked.expect_err("wrong").to_string()
        };
        let said = "intercept/mode: `yes` is no mode; give shadow or enforce";
        assert_eq!(text(Some("yes"), Some("shadow")), format!("annotation {said}"));
        assert_eq!(text(None, Some("yes")), format!("label of the namespace {said}"));
    }

    #[test]
    fn with_every_mesh_an_init_container_and_shadow_mode_go_together() {
        for (mesh, proxy, init, injected) in [
            (Mesh::Istio, "istio-proxy", "istio-init", ("sidecar.istio.io/status", "{}")),
            (Mesh::Linkerd, "linkerd-proxy", "linkerd-init", ("linkerd.io/proxy-version", "1")),
            (Mesh::Kuma, "kuma-sidecar", "kuma-init", ("kuma.io/sidecar-injected", "true")),
        ] {
            let container = |name: &str, init| Container { name: name.into(), init, ..Container::default() };
            let pod = |mode: Option<&str>| PodMetadata {
                namespace: "shop".into(),
                annotations: [Some(injected), mode.map(|mode| (NAME, mode))]
                    .into_iter()
                    .flatten()
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .collect::<BTreeMap<_, _>>(),
                containers: vec![container("app", false), container(proxy, false), container(init, true)],
                ..PodMetadata::default()
            };
            let selection = Selection { mesh, ..Selection::default() };
            let decide =
                |mode, options: &[&str]| match sidecar::decide(&pod(mode), &selection, &defaults(options))
                    .expect("sound")
                {
                    PodVerdict::Capture(args) if args.given.is_shadow() => "shadow",
                    PodVerdict::Capture(args) if args.takeover == Takeover::Agreed => "cut over",
                    PodVerdict::Capture(_) => "captured",
                    PodVerdict::CaptureIfKept(args) if args.takeover == Takeover::Agreed => "captures itself",
                    PodVerdict::CaptureIfKept(_) => "kept",
                    PodVerdict::Ignore(why) => why.as_str(),
                };
            assert_eq!(decide(None, &[]), "captures itself", "{mesh:?}");
            assert_eq!(decide(Some("enforce"), &[]), "cut over", "{mesh:?}");
            assert_eq!(decide(Some("enforce"), &["--shadow"]), "cut over", "{mesh:?}");
            assert_eq!(decide(Some("shadow"), &[]), "shadow", "{mesh:?}");
            assert_eq!(decide(None, &["--shadow"]), "shadow", "{mesh:?}");
        }
    }
}
