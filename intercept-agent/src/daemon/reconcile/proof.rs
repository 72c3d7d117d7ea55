//! When the pods are probed, and what becomes of the results.

use std::{collections::BTreeMap, time::Instant};

use super::{Message, Reconciler};
use crate::{
    daemon::{
        desired::Key,
        events::EventKind,
        prove::{self, ProbeResult, ProofNews, ProofRecord},
        report::PodState,
    },
    ids::NetnsCookie,
};

/// Most probes at once.
const PARALLEL: usize = 4;

impl Reconciler {
    /// Starts the probes that are due, a few at once.
    pub(super) fn start_proofs(&mut self, now: Instant) {
        let Some(settings) = self.proofs.clone().filter(|_| !self.uninstalling) else { return };
        let mut running = self.pods.values().filter(|pod| pod.proof.is_in_flight()).count();
        for (key, pod) in &mut self.pods {
            if pod.machine.state() != PodState::Captured || pod.machine.phase.is_in_flight() {
                continue;
            }
            let Some(applied) = pod.machine.phase.applied().cloned() else { continue };
            if !pod.proof.is_due(now, settings.interval) || running == PARALLEL {
                continue;
            }
            running += 1;
            pod.proof.begin();
            let (messages, key, bpffs) = (self.messages.clone(), key.clone(), settings.bpffs.clone());
            tokio::spawn(async move {
                let cookie = applied.cookie;
                let result = prove::probe(bpffs, applied).await;
                drop(messages.send(Message::Probed(key, cookie, Box::new(result))));
            });
        }
        self.measure_proofs();
    }

    fn measure_proofs(&self) {
        let mut bypasses = BTreeMap::<&'static str, usize>::new();
        let mut failed = Vec::new();
        for pod in self.pods.values().filter(|pod| pod.applied().is_some()) {
            for (cause, count) in &pod.proof.bypasses {
                *bypasses.entry(cause).or_default() += count;
            }
            failed.extend(
                pod.proof.reported_failure().map(|failure| (pod.name.clone(), failure.cause.clone())),
            );
        }
        self.metrics.proofs_failed(failed);
        self.metrics.bypasses(&bypasses);
    }

    /// A probe has ended.
    pub(super) fn probed(&mut self, key: &Key, cookie: NetnsCookie, result: ProbeResult) {
        let Some(settings) = &self.proofs else { return };
        let Some(pod) = self.pods.get_mut(key) else { return };
        if pod.applied().is_none_or(|applied| applied.cookie != cookie) {
            // Of a sandbox that is gone.
            pod.proof = ProofRecord::default();
            return;
        }
        self.metrics.proof(match &result.proof {
            Ok(state) => state.as_str(),
            Err(failure) => &failure.cause,
        });
        let news = pod.proof.end(result, Instant::now(), settings.interval);
        let name = pod.name.clone();
        match news {
            Some(ProofNews::Failed(failure)) => {
                tracing::error!(
                    pod = %key, name, cause = failure.cause,
                    "the pod's connections do not reach its proxy: {}", failure.text
                );
                self.publish(key, EventKind::NotProven, format!("{}: {}", failure.cause, failure.text));
            }
            Some(ProofNews::Recovered) => {
                tracing::info!(pod = %key, name, "the pod's connections reach its proxy again");
                let text = "the pod's connections reach its proxy again".to_owned();
                self.publish(key, EventKind::Proven, text);
            }
            None => {}
        }
    }
}
