//! Looking at what is in force: is it still there, and is it all?

use std::{
    collections::{BTreeMap, HashSet},
    time::Instant,
};

use super::{JobOutcome, Message, PodState, Reconciler};
use crate::{
    daemon::{
        capture::{self, AppliedPod, Liveness},
        desired::Key,
        retry,
        worker::Priority,
    },
    store::Record,
};

impl Reconciler {
    /// Look at every pod: is it there, and is it due?
    pub(super) fn poll(&mut self) {
        let mut gone = Vec::new();
        let mut unsure = Vec::new();
        let mut due = Vec::new();
        let now = Instant::now();
        for (key, pod) in &mut self.pods {
            if pod.in_flight {
                continue;
            }
            let seen = pod.applied.as_ref().map(AppliedPod::liveness);
            match seen {
                Some(Liveness::Gone) => gone.push(key.clone()),
                Some(Liveness::Unknown) => unsure.push(key.clone()),
                // Processes lead to the namespace again: follow it again.
                Some(Liveness::Alive) if pod.follow.is_none() && pod.failure.is_none() => {
                    due.push(key.clone())
                }
                Some(Liveness::Alive) if pod.confirms_ids() => due.push(key.clone()),
                _ => {}
            }
            if pod.retry_at.is_some_and(|due| due <= now) {
                due.push(key.clone());
            }
        }
        for key in gone {
            self.on_gone(&key);
        }
        for key in unsure {
            self.check_liveness(&key);
        }
        for key in due {
            if let Some(pod) = self.pods.get_mut(&key) {
                pod.retry_at = None;
            }
            self.reconcile(&key);
        }
        let count = |state| self.pods.values().filter(|pod| pod.state() == state).count();
        self.metrics.pods(PodState::ALL.map(|state| (state.as_str(), count(state))));
        let mut reasons = BTreeMap::<&'static str, usize>::new();
        for why in self.pods.values().filter_map(|pod| pod.ignored) {
            *reasons.entry(why).or_default() += 1;
        }
        self.metrics.left_alone(&reasons);
        self.metrics.preexisting_connections(
            self.pods.values().filter(|pod| pod.applied.is_some() && pod.preexisting_connections > 0).count(),
        );
        self.metrics.heartbeat();
    }

    /// Nothing leads to the namespace: let go of it, and ask the kernel whether it is there without us.
    fn check_liveness(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        pod.stop_following();
        if let Some(applied) = &pod.applied {
            pod.in_flight = true;
            let cookie = applied.cookie;
            self.spawn(key, Priority::Normal, JobOutcome::Alive, move |access| {
                Ok(capture::is_alive(access, cookie)?)
            });
        }
    }

    pub(super) fn on_gone(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        tracing::info!(pod = %key, name = pod.name, "the pod is gone");
        pod.stop_following();
        let Some(applied) = pod.applied.clone() else { return };
        if pod.view.on_gone() {
            // Nobody else will say that these are not wanted any more.
            pod.clear_desired();
        } else {
            pod.failures = 1;
            pod.retry_at = Some(Instant::now() + retry::delay(1));
        }
        pod.in_flight = true;
        self.spawn(key, Priority::Normal, JobOutcome::Released, move |access| {
            Ok(capture::release(access, &applied)?)
        });
    }

    pub(super) fn start_resync(&self) {
        if self.uninstalling {
            return;
        }
        let known: Vec<u64> =
            self.pods.values().filter_map(|pod| pod.applied.as_ref()).map(|h| h.cookie).collect();
        let (worker, messages) = (self.worker.clone(), self.messages.clone());
        tokio::spawn(async move {
            match worker.run(Priority::Normal, move |access| capture::resync(access, &known)).await {
                Ok(Ok((active, new))) => drop(messages.send(Message::Resynced(active, new))),
                Ok(Err(error)) => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "comparing with what is in force"
                    );
                }
                Err(failed) => tracing::error!("{failed}"),
            }
        });
    }

    pub(super) fn resynced(&mut self, active: &[u64], new: &[Record]) {
        if self.uninstalling {
            return;
        }
        let known: HashSet<u64> =
            self.pods.values().filter_map(|p| p.applied.as_ref()).map(|h| h.cookie).collect();
        for record in new.iter().filter(|record| !known.contains(&record.cookie)) {
            let key = Key::of_record(record);
            if !self.pods.get(&key).is_some_and(|pod| pod.in_flight) {
                self.adopt_record(record);
            }
        }
        let now = Instant::now();
        for pod in self.pods.values_mut() {
            if pod.applied.as_ref().is_some_and(|applied| active.contains(&applied.cookie)) {
                pod.last_verified = Some(now);
            }
        }
        let lost: Vec<Key> = self
            .pods
            .iter()
            .filter(|(_, pod)| !pod.in_flight)
            .filter(|(_, pod)| pod.applied.as_ref().is_some_and(|applied| !active.contains(&applied.cookie)))
            .map(|(key, _)| key.clone())
            .collect();
        for key in lost {
            if !matches!(key, Key::Command(_)) {
                tracing::warn!(pod = %key, "somebody took it out of force: putting it back");
            }
            self.reconcile(&key);
        }
    }
}
