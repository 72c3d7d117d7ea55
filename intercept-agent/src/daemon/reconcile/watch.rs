//! Checks that the applied pods exist, and compares them with the maps.

use std::{
    collections::{BTreeMap, HashSet},
    time::Instant,
};

use super::{
    Message, Reconciler,
    machine::{Aftermath, MachineEvent},
    pod::TrackedPod,
};
use crate::{
    acceleration::self_test,
    daemon::{
        capture::{self, AppliedPod, Liveness},
        cutover::CutoverState,
        desired::Key,
        report::PodState,
        worker::Priority,
    },
    ids::NetnsCookie,
    record::Record,
};

impl Reconciler {
    /// Checks for each pod whether it exists and whether it is time to retry it.
    pub(super) fn poll(&mut self) {
        let mut gone = Vec::new();
        let mut unreachable = Vec::new();
        let mut due = Vec::new();
        let mut unfinished = Vec::new();
        let now = Instant::now();
        for (key, pod) in &mut self.pods {
            if pod.machine.phase.is_in_flight() {
                continue;
            }
            match pod.applied().map(AppliedPod::liveness) {
                Some(Liveness::Gone) => gone.push(key.clone()),
                Some(Liveness::Unknown) => unreachable.push(key.clone()),
                // The pod has processes in the namespace again, so follow it again.
                Some(Liveness::Alive) if pod.followed().is_none() && pod.machine.failure.is_none() => {
                    due.push(key.clone())
                }
                Some(Liveness::Alive) if pod.confirms_ids() || pod.confirms_containers() => {
                    due.push(key.clone())
                }
                _ => {}
            }
            if pod.awaits_self_test && self_test::has_ended() {
                pod.awaits_self_test = false;
                due.push(key.clone());
            }
            if pod.machine.is_retry_due(now) {
                due.push(key.clone());
            }
            if pod.cutover.is_retry_due(now) {
                unfinished.push(key.clone());
            }
        }
        for key in gone {
            self.on_gone(&key);
        }
        for key in unreachable {
            self.on(&key, MachineEvent::Unreachable);
        }
        for key in due {
            self.on(&key, MachineEvent::RetryDue);
        }
        for key in unfinished {
            self.ask_for_cutover(&key);
        }
        self.measure();
        self.start_proofs(now);
    }

    fn measure(&self) {
        let count = |state| self.pods.values().filter(|pod| pod.machine.state() == state).count();
        self.metrics.pods(PodState::ALL.map(|state| (state.as_str(), count(state))));
        let cutovers: Vec<CutoverState> =
            self.pods.values().filter_map(|pod| Some(pod.cutover.progress()?.state)).collect();
        let of = |state| cutovers.iter().filter(|found| **found == state).count();
        self.metrics.cutovers(CutoverState::ALL.map(|state| (state.as_str(), of(state))));
        let mut reasons = BTreeMap::<&'static str, usize>::new();
        for why in self.pods.values().filter_map(|pod| pod.machine.ignored()) {
            *reasons.entry(why.as_str()).or_default() += 1;
        }
        self.metrics.left_alone(&reasons);
        let had_connections = |pod: &&TrackedPod| pod.applied().is_some() && pod.preexisting_connections > 0;
        self.metrics.preexisting_connections(self.pods.values().filter(had_connections).count());
        self.metrics.heartbeat();
    }

    pub(super) fn on_gone(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        tracing::info!(pod = %key, name = pod.name, "the pod is gone");
        let is_over = pod.applied().is_some() && pod.view.on_gone();
        self.on(key, MachineEvent::Gone(if is_over { Aftermath::Over } else { Aftermath::MayReturn }));
    }

    fn applied_cookies(&self) -> impl Iterator<Item = NetnsCookie> {
        self.pods.values().filter_map(TrackedPod::applied).map(|applied| applied.cookie)
    }

    pub(super) fn start_resync(&self) {
        if self.uninstalling {
            return;
        }
        let known: Vec<NetnsCookie> = self.applied_cookies().collect();
        let (worker, messages) = (self.worker.clone(), self.messages.clone());
        tokio::spawn(async move {
            match worker.run(Priority::Normal, move |access| capture::resync(access, &known)).await {
                Ok(Ok(result)) => drop(messages.send(Message::Resynced(Box::new(result)))),
                Ok(Err(error)) => {
                    tracing::error!(error = &error as &dyn std::error::Error, "reading the applied pods");
                }
                Err(failed) => tracing::error!("{failed}"),
            }
        });
    }

    pub(super) fn resynced(&mut self, active: &[NetnsCookie], new: &[Record]) {
        if self.uninstalling {
            return;
        }
        let known: HashSet<NetnsCookie> = self.applied_cookies().collect();
        for record in new.iter().filter(|record| !known.contains(&record.cookie)) {
            let key = Key::of_record(record);
            if !self.pods.get(&key).is_some_and(|pod| pod.machine.phase.is_in_flight())
                && let Err(error) = self.adopt_record(record)
            {
                // The next comparison finds it again.
                tracing::error!(pod = %key, error = &error as &dyn std::error::Error, "reading an applied pod");
            }
        }
        let now = Instant::now();
        let mut lost = Vec::new();
        for (key, pod) in &mut self.pods {
            match pod.machine.phase.applied() {
                Some(applied) if active.contains(&applied.cookie) => pod.last_verified = Some(now),
                Some(_) if !pod.machine.phase.is_in_flight() => lost.push(key.clone()),
                _ => {}
            }
        }
        for key in lost {
            if !matches!(key, Key::Command(_)) {
                tracing::warn!(pod = %key, "the pod was detached by another program; capturing it again");
            }
            self.on(&key, MachineEvent::Recheck);
        }
    }
}
