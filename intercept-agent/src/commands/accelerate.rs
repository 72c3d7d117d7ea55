//! `check --accelerate`, and what `--accelerate` comes to.

use anyhow::{Context as _, Result, bail};
use intercept_agent::acceleration::{self, Finding};

use super::say;

/// What every refusal ends with.
const WITHOUT: &str = "leave --accelerate out: connections are plain TCP then";

fn findings() -> Result<Vec<Finding>> {
    acceleration::self_test().context("trying out joined connections")
}

fn failed(findings: &[Finding]) -> Vec<&'static str> {
    findings.iter().filter(|finding| !finding.ok).map(|finding| finding.what).collect()
}

/// Tell what each check of the self-test saw.
pub(super) fn check(json: bool) -> Result<()> {
    let findings = findings()?;
    if json {
        say!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        for Finding { what, ok, plain_ok, joined, plain } in &findings {
            let word = if *ok { "ok    " } else { "FAILED" };
            let fault = if *plain_ok { "" } else { ", which is a fault of this check" };
            say!("{word} {what}: {joined} (plain TCP: {plain}{fault})");
        }
    }
    let failed = failed(&findings);
    if !failed.is_empty() {
        bail!("{} of {} checks failed: {}", failed.len(), findings.len(), failed.join(", "));
    }
    Ok(())
}

/// Refuse `--accelerate` where joined connections do not behave like TCP, before anything is changed.
pub(super) fn admit(asked_for: bool) -> Result<()> {
    if !asked_for {
        return Ok(());
    }
    let failed = failed(&findings().with_context(|| format!("refusing --accelerate ({WITHOUT})"))?);
    if !failed.is_empty() {
        bail!(
            "refusing --accelerate: on this kernel, joined connections failed {}; `intercept-agent check \
             --accelerate` says what was seen; {WITHOUT}",
            failed.join(", ")
        );
    }
    bail!(
        "refusing --accelerate: joined connections behave like TCP on this kernel, but this build has no programs that \
         join a pod's; {WITHOUT}"
    );
}
