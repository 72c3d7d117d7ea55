//! When pods are cut over from their rules of iptables, and what is said of it.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::{Message, Reconciler, machine::MachineEvent, pod::TrackedPod};
use crate::{
    cutover::{self, CutoverError, CutoverOutcome, Keeper},
    daemon::{
        capture::{AppliedPod, CaptureError, Captured},
        cutover::{CutoverAttempt, Cutovers},
        desired::Key,
        events::EventKind,
        view::Stage,
    },
    shadow::ShadowReport,
};

impl TrackedPod {
    /// Whether the pod may be cut over now: its init containers have ended, and no job is in flight.
    fn may_be_cut_over(&self, now: Instant) -> bool {
        let is_starting = self.view.speaker().is_some_and(|object| object.stage == Stage::Pending);
        self.cutover.is_pending()
            && self.cutover.may_try(now)
            && !is_starting
            && !self.machine.phase.is_in_flight()
    }
}

impl Reconciler {
    /// Has pods cut over of which enough was compared.
    pub(super) fn start_cutovers(&mut self, reports: &[ShadowReport]) {
        let now = Instant::now();
        let mut judged = Vec::new();
        for (key, pod) in &self.pods {
            let Some(applied) = pod.applied().filter(|_| pod.may_be_cut_over(now)) else { continue };
            let Some(report) = reports.iter().find(|report| report.netns_cookie == applied.cookie) else {
                continue;
            };
            let caution = self.cutovers.caution(pod.cutover.takeover);
            judged.push((
                key.clone(),
                cutover::refuse_disagreement(Some(report), &applied.cgroup, Keeper::Daemon, caution),
            ));
        }
        for (key, result) in judged {
            match result {
                Ok(()) => self.ask_for_cutover(&key),
                Err(error) => self.cutover_refused(&key, &error),
            }
        }
    }

    /// Makes an attempt with the next capture of the pod, which begins now.
    pub(super) fn ask_for_cutover(&mut self, key: &Key) {
        if let Some(pod) = self.pods.get_mut(key) {
            pod.cutover.ask();
            self.on(key, MachineEvent::Recheck);
        }
    }

    /// An attempt has ended, there or back.
    pub(super) fn cutover_ended(&mut self, key: &Key, attempt: CutoverAttempt) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        let report = match attempt.result {
            Ok(report) => report,
            Err(error) => {
                pod.cutover.failed(attempt.took);
                return self.cutover_refused(key, &error);
            }
        };
        pod.cutover.succeeded();
        pod.proof.on_change(Instant::now());
        let (name, took, rules) = (pod.name.clone(), attempt.took, report.rules.len());
        for line in &report.differences {
            tracing::warn!(pod = %key, name, "the rules of iptables are not as before: {line}");
        }
        match report.outcome {
            CutoverOutcome::CutOver => {
                tracing::info!(pod = %key, name, rules, took = ?took, "cut over from iptables to the agent");
                let text = format!(
                    "the agent captures the pod, and {rules} rules of iptables are out; the annotation intercept/mode: shadow \
                     puts them in again"
                );
                self.publish(key, EventKind::CutOver, text);
            }
            CutoverOutcome::Back => {
                tracing::info!(pod = %key, name, rules, took = ?took, "went back from the agent to iptables");
                let text = format!("{rules} rules of iptables capture the pod again, and the agent compares");
                self.publish(key, EventKind::CutBack, text);
            }
            CutoverOutcome::Unchanged => {}
        }
    }

    /// Says once why a pod is not cut over.
    fn cutover_refused(&mut self, key: &Key, error: &CutoverError) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        let Some(failure) = pod.cutover.refused(error) else { return };
        let name = pod.name.clone();
        let text = format!("cutting the pod over from its rules of iptables to the agent: {}", failure.text);
        if failure.cause == CutoverError::COMPARED_TOO_FEW {
            tracing::info!(pod = %key, name, cause = failure.cause, "{text}");
        } else {
            tracing::warn!(pod = %key, name, cause = failure.cause, "{text}");
        }
        self.publish(key, EventKind::NotCutOver, text);
    }
}

/// Moves the rules of one pod within its jobs, and reports it.
pub(super) struct RulesMover {
    cutovers: Cutovers,
    messages: UnboundedSender<Message>,
    key: Key,
}

impl RulesMover {
    /// Puts the rules in again, if some are saved.
    pub(super) async fn back(&self, applied: &AppliedPod) -> Result<(), CaptureError> {
        if !self.cutovers.is_cut_over(applied)? {
            return Ok(());
        }
        let CutoverAttempt { result, took } = self.cutovers.back(applied.clone()).await?;
        self.report(CutoverAttempt { result: Ok(result?), took });
        Ok(())
    }

    /// Cuts the pod over. That it fails does not fail the capture.
    pub(super) async fn there(&self, captured: &mut Captured) -> Result<(), CaptureError> {
        let attempt = self.cutovers.there(captured.applied.clone(), captured.takeover).await?;
        self.report(attempt);
        match self.cutovers.rules(&captured.applied) {
            Ok(rules) => captured.rules = rules,
            Err(error) => {
                // The cut-over has ended all the same, and the state from before it is shown until the next capture.
                tracing::warn!(pod = %self.key, error = &error as &dyn std::error::Error, "reading the saved rules");
            }
        }
        Ok(())
    }

    fn report(&self, attempt: CutoverAttempt) {
        // The reconciler is gone when the daemon ends.
        drop(self.messages.send(Message::CutoverEnded(self.key.clone(), Box::new(attempt))));
    }
}

impl Reconciler {
    /// What moves the rules of this pod.
    pub(super) fn rules_mover(&self, key: &Key) -> RulesMover {
        RulesMover { cutovers: self.cutovers.clone(), messages: self.messages.clone(), key: key.clone() }
    }
}
