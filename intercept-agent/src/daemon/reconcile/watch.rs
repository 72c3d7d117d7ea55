//! Looking at what is in force: is it still there, and is it all?

use std::{
    collections::{BTreeMap, HashSet},
    time::Instant,
};

use super::{Message, Outcome, Reconciler, State};
use crate::{
    daemon::{
        capture::{self, Held, Seen},
        retry,
        wanted::Key,
        worker::Lane,
    },
    store::Record,
};

impl Reconciler {
    /// Look at every pod: is it there, and is it due?
    pub(super) fn look(&mut self) {
        let mut gone = Vec::new();
        let mut unsure = Vec::new();
        let mut due = Vec::new();
        let now = Instant::now();
        for (key, pod) in &self.pods {
            if pod.busy {
                continue;
            }
            let seen = pod.held.as_ref().map(Held::look);
            match seen {
                Some(Seen::Gone) => gone.push(key.clone()),
                Some(Seen::Unsure) => unsure.push(key.clone()),
                // Processes lead to the namespace again: follow it again.
                Some(Seen::Here) if pod.follow.is_none() && pod.problem.is_none() => due.push(key.clone()),
                _ => {}
            }
            if pod.due.is_some_and(|due| due <= now) {
                due.push(key.clone());
            }
        }
        for key in gone {
            self.vanished(&key);
        }
        for key in unsure {
            self.doubt(&key);
        }
        for key in due {
            if let Some(pod) = self.pods.get_mut(&key) {
                pod.due = None;
            }
            self.step(&key);
        }
        let count = |state| self.pods.values().filter(|pod| pod.state() == state).count();
        self.metrics.pods(State::ALL.map(|state| (state.word(), count(state))));
        let mut reasons = BTreeMap::<&'static str, usize>::new();
        for why in self.pods.values().filter_map(|pod| pod.left_alone) {
            *reasons.entry(why).or_default() += 1;
        }
        self.metrics.left_alone(&reasons);
        self.metrics.earlier(self.pods.values().filter(|pod| pod.held.is_some() && pod.earlier > 0).count());
        self.metrics.beat();
    }

    /// Nothing leads to the namespace: let go of it, and ask the kernel whether it is there without us.
    fn doubt(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        pod.stop_following();
        if let Some(held) = &pod.held {
            pod.busy = true;
            let cookie = held.cookie;
            self.spawn(key, Lane::Normal, Outcome::Alive, move |access| {
                Ok(capture::is_alive(access, cookie)?)
            });
        }
    }

    pub(super) fn vanished(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        tracing::info!(pod = %key, name = pod.name, "the pod is gone");
        pod.stop_following();
        let Some(held) = pod.held.clone() else { return };
        if pod.view.on_gone() {
            // Nobody else will say that these are not wanted any more.
            pod.unwant();
        } else {
            pod.failures = 1;
            pod.due = Some(Instant::now() + retry::delay(1));
        }
        pod.busy = true;
        self.spawn(key, Lane::Normal, Outcome::Released, move |access| Ok(capture::release(access, &held)?));
    }

    pub(super) fn start_audit(&self) {
        if self.leaving {
            return;
        }
        let known: Vec<u64> =
            self.pods.values().filter_map(|pod| pod.held.as_ref()).map(|h| h.cookie).collect();
        let (worker, messages) = (self.worker.clone(), self.messages.clone());
        tokio::spawn(async move {
            match worker.run(Lane::Normal, move |access| capture::audit(access, &known)).await {
                Ok(Ok((in_force, new))) => drop(messages.send(Message::Audited(in_force, new))),
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

    pub(super) fn audited(&mut self, in_force: &[u64], new: &[Record]) {
        if self.leaving {
            return;
        }
        let known: HashSet<u64> =
            self.pods.values().filter_map(|p| p.held.as_ref()).map(|h| h.cookie).collect();
        for record in new.iter().filter(|record| !known.contains(&record.cookie)) {
            let key = Key::of_record(record);
            if !self.pods.get(&key).is_some_and(|pod| pod.busy) {
                self.adopt_one(record);
            }
        }
        let now = Instant::now();
        for pod in self.pods.values_mut() {
            if pod.held.as_ref().is_some_and(|held| in_force.contains(&held.cookie)) {
                pod.proven = Some(now);
            }
        }
        let lost: Vec<Key> = self
            .pods
            .iter()
            .filter(|(_, pod)| !pod.busy)
            .filter(|(_, pod)| pod.held.as_ref().is_some_and(|held| !in_force.contains(&held.cookie)))
            .map(|(key, _)| key.clone())
            .collect();
        for key in lost {
            if !matches!(key, Key::Command(_)) {
                tracing::warn!(pod = %key, "somebody took it out of force: putting it back");
            }
            self.step(&key);
        }
    }
}
