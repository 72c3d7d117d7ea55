//! The one place where what is wanted meets what is in force.
//!
//! A pod has at most one job with the worker. What happens to it meanwhile is noted and looked at when the job is
//! done. A pod that fails is tried again later and later; none waits for another.

mod claims;
mod message;
mod pod;
mod watch;

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};

pub use message::{JobOutcome, Message};
pub use pod::{PodFailure, PodReport, PodResult, PodState};

use self::pod::Pod;
use super::{
    capture::{self, AppliedPod, CaptureError, Captured, Liveness, Prepared},
    desired::{DesiredPod, Key},
    events::PodEvent,
    metrics::Metrics,
    retry,
    view::PodView,
    worker::{Access, Priority, Worker, WorkerFailed},
};
use crate::{
    node::{Attached, NodeError},
    store::Record,
};

/// How often pods are looked at: a pod that is gone is to be gone within a second.
const POLL_INTERVAL: Duration = Duration::from_millis(400);
/// How often the whole state is compared with what should be in force.
const RESYNC_INTERVAL: Duration = Duration::from_secs(10);

/// A failure that passes by itself within this time gets no event on the pod.
const EVENT_AFTER: Duration = Duration::from_secs(5);
/// How many looks at a pod with processes confirm its ids, if it had none when it was attached.
const CONFIRMATIONS: u8 = 2;
/// How often at least a pod is tried whose first process is awaited.
const START_RETRY: Duration = Duration::from_millis(500);

/// The loop.
pub struct Reconciler {
    pods: BTreeMap<Key, Pod>,
    worker: Worker,
    metrics: Metrics,
    messages: mpsc::UnboundedSender<Message>,
    inbox: mpsc::UnboundedReceiver<Message>,
    runtime: Handle,
    events: Option<mpsc::UnboundedSender<PodEvent>>,
    /// How long a sandbox waits for the API; there is none to wait for if none.
    api_wait: Option<Duration>,
    uninstalling: bool,
}

impl Reconciler {
    /// A loop without pods, and the way to tell it things. To be called within the runtime.
    pub fn new(worker: Worker, metrics: Metrics) -> (Self, mpsc::UnboundedSender<Message>) {
        let (messages, inbox) = mpsc::unbounded_channel();
        let runtime = Handle::current();
        let reconciler = Self {
            pods: BTreeMap::new(),
            worker,
            metrics,
            messages: messages.clone(),
            inbox,
            runtime,
            events: None,
            api_wait: None,
            uninstalling: false,
        };
        (reconciler, messages)
    }

    /// Have somebody else told of pods of the API that could not be captured.
    pub fn publish_events_to(&mut self, events: mpsc::UnboundedSender<PodEvent>) {
        self.events = Some(events);
    }

    /// The API is watched: have a sandbox wait for its word for so long.
    pub fn await_api(&mut self, patience: Duration) {
        self.api_wait = Some(patience);
    }

    /// Once for failures of one kind in a row, which may be many.
    fn publish_event(&mut self, key: &Key) {
        let (Some(events), Key::Pod(uid), Some(pod)) = (&self.events, key, self.pods.get_mut(key)) else {
            return;
        };
        let Some(text) = pod.failure.as_ref().map(|problem| problem.text.clone()) else { return };
        if pod.last_event.as_ref() != Some(&text) {
            pod.last_event = Some(text.clone());
            // The object of a static pod has another UID than the pod.
            let uid = pod.view.speaker().map_or(uid, |object| &object.id.uid.0).clone();
            drop(events.send(PodEvent { uid, name: pod.name.clone(), text }));
        }
    }

    /// Take over what is in force, after sweeping what is dead.
    pub async fn adopt(&mut self) -> Result<usize, CaptureError> {
        let records = self.worker.run(Priority::Urgent, capture::sweep).await??;
        let adopted = records.len();
        for record in records {
            self.adopt_record(&record);
        }
        Ok(adopted)
    }

    fn adopt_record(&mut self, record: &Record) {
        let key = Key::of_record(record);
        let pod = self.pods.entry(key.clone()).or_default();
        pod.applied = Some(AppliedPod::of_record(record));
        pod.last_verified = Some(Instant::now());
        if pod.view.is_empty() {
            pod.view.set_applied_before(DesiredPod::of_record(record));
            self.resolve_claims(&key);
        } else {
            // Routes may have changed while nobody followed them.
            self.reconcile(&key);
        }
    }

    /// Until the last sender of messages is gone.
    pub async fn run(mut self) {
        let mut look = tokio::time::interval(POLL_INTERVAL);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut audit = tokio::time::interval(RESYNC_INTERVAL);
        loop {
            tokio::select! {
                message = self.inbox.recv() => match message {
                    Some(message) => self.take(message),
                    None => return,
                },
                _ = look.tick() => self.poll(),
                _ = audit.tick() => self.start_resync(),
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::File(key, file) => self.update(&key, |view| view.set_file(*file)),
            Message::FileRemoved(key) => self.update_known(&key, PodView::remove_file),
            Message::FilesListed(keys) => self.files_listed(&keys),
            Message::Object(key, claim) => self.update(&key, |view| view.set_object(*claim)),
            Message::ObjectDeleted(key, id) => self.update_known(&key, |view| view.remove_object(&id)),
            Message::ObjectsListed(uids) => self.objects_listed(&uids),
            Message::Sandbox(key, claim, reply) => self.add(&key, *claim, reply),
            Message::ApiTimeout(key, sandbox) => self.api_timeout(&key, &sandbox),
            Message::Delete { key, sandbox, reply } => self.delete(&key, &sandbox, reply),
            Message::Check(key, reply) => drop(reply.send(self.check(&key))),
            Message::Report(reply) => {
                drop(reply.send(self.pods.iter().map(|(key, pod)| PodReport::of(key, pod)).collect()));
            }
            Message::Collect(valid, reply) => drop(reply.send(self.collect(&valid))),
            Message::Leave(reply) => self.uninstall(reply),
            Message::Changed(key, cookie) => {
                let pod = self.pods.get_mut(&key);
                let of_it =
                    |pod: &&mut Pod| pod.applied.as_ref().is_some_and(|applied| applied.cookie == cookie);
                if pod.filter(of_it).is_some_and(Pod::changed) {
                    self.reconcile(&key);
                }
            }
            Message::Done(key, outcome) => self.done(&key, *outcome),
            Message::Resynced(active, new) => self.resynced(&active, &new),
        }
    }

    /// Release pods whose sandbox is gone without a word. One that is asked for now may be newer than the list.
    fn collect(&mut self, valid: &HashSet<String>) -> usize {
        let is_gone = |pod: &Pod| {
            let sandbox = pod.view.sandbox_id();
            sandbox.is_some_and(|sandbox| !valid.contains(sandbox))
                && !pod.in_flight
                && pod.waiting.is_empty()
        };
        let gone: Vec<Key> =
            self.pods.iter().filter(|(_, pod)| is_gone(pod)).map(|(key, _)| key.clone()).collect();
        for key in &gone {
            tracing::info!(pod = %key, "the runtime has its sandbox no more");
            if let Some(pod) = self.pods.get_mut(key)
                && let Some(sandbox) = pod.view.sandbox_id().map(str::to_owned)
            {
                pod.view.end_sandbox(&sandbox);
                pod.clear_desired();
                self.resolve_claims(key);
            }
        }
        gone.len()
    }

    fn check(&self, key: &Key) -> PodResult {
        match self.pods.get(key) {
            Some(pod) if pod.ignored.is_some() => Ok("left_alone"),
            Some(Pod { applied: Some(applied), failure: None, .. })
                if applied.liveness() == Liveness::Alive =>
            {
                Ok("captured")
            }
            Some(Pod { failure: Some(problem), .. }) => Err(problem.clone()),
            _ => Err(PodFailure { cause: "absent".into(), text: "the pod is not captured".into() }),
        }
    }

    fn uninstall(&mut self, reply: oneshot::Sender<Result<(), NodeError>>) {
        self.uninstalling = true;
        tracing::info!("removing everything from this node");
        let mut applied = Vec::new();
        for pod in std::mem::take(&mut self.pods).values_mut() {
            pod.stop_following();
            applied.extend(pod.applied.take());
        }
        let worker = self.worker.clone();
        tokio::spawn(async move {
            let removed = worker.run(Priority::Urgent, move |access| {
                for applied in applied {
                    // What stays is removed below; only the namespace's own settings may be left as they are.
                    if let Err(error) = capture::release(access, &applied) {
                        tracing::warn!(
                            cookie = applied.cookie,
                            error = &error as &dyn std::error::Error,
                            "detaching"
                        );
                    }
                }
                access.remove_everything()
            });
            if let Ok(removed) = removed.await {
                drop(reply.send(removed));
            }
        });
    }

    /// Have the worker do what is to be done for a pod, if anything.
    fn reconcile(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        if pod.in_flight {
            pod.dirty = true;
            return;
        }
        if pod.retry_at.is_some_and(|due| due > Instant::now()) {
            return;
        }
        let nobody_waits = pod.waiting.is_empty() && pod.releasing.is_empty();
        let priority = if nobody_waits { Priority::Normal } else { Priority::Urgent };
        match (&pod.desired, &pod.applied) {
            (Some(desired), applied) => {
                pod.in_flight = true;
                let (desired, applied) = (desired.clone(), applied.clone());
                let followed = pod.follow.as_ref().map(|(cookie, _)| *cookie);
                let runtime = self.runtime.clone();
                let before = applied.clone();
                let prepare = move || capture::prepare(&runtime, &desired, before.as_ref(), followed);
                let capture =
                    move |access: &mut Access, prepared| capture::capture(access, prepared, applied.as_ref());
                self.spawn_prepared(key, priority, prepare, capture);
            }
            (None, Some(applied)) => {
                let applied = applied.clone();
                pod.in_flight = true;
                pod.stop_following();
                self.spawn(key, priority, JobOutcome::Released, move |access| {
                    Ok(capture::release(access, &applied)?)
                });
            }
            (None, None) => {
                pod.stop_following();
                if let Some(why) = pod.ignored {
                    pod.answer(&Ok(why));
                }
                pod.answer_released(&Ok("released"));
                if pod.view.is_empty() {
                    self.pods.remove(key);
                }
            }
        }
    }

    /// Observe a pod on a thread of its own, then attach it on the worker.
    fn spawn_prepared(
        &self,
        key: &Key,
        priority: Priority,
        prepare: impl FnOnce() -> Result<Prepared, CaptureError> + Send + 'static,
        capture: impl FnOnce(&mut Access, Prepared) -> Result<Captured, CaptureError> + Send + 'static,
    ) {
        let (worker, messages, key) = (self.worker.clone(), self.messages.clone(), key.clone());
        tokio::spawn(async move {
            let result = match tokio::task::spawn_blocking(prepare).await {
                Ok(Ok(prepared)) => worker
                    .run(priority, move |access| capture(access, prepared))
                    .await
                    .unwrap_or_else(|failed| Err(failed.into())),
                Ok(Err(error)) => Err(error),
                // It panicked, which its log says.
                Err(_) => Err(WorkerFailed.into()),
            };
            // The loop is gone when the daemon ends.
            drop(messages.send(Message::Done(key, Box::new(JobOutcome::Captured(result)))));
        });
    }

    fn spawn<T: Send + 'static>(
        &self,
        key: &Key,
        priority: Priority,
        outcome: fn(Result<T, CaptureError>) -> JobOutcome,
        work: impl FnOnce(&mut super::worker::Access) -> Result<T, CaptureError> + Send + 'static,
    ) {
        let (worker, messages, key) = (self.worker.clone(), self.messages.clone(), key.clone());
        tokio::spawn(async move {
            let result = worker.run(priority, work).await.unwrap_or_else(|failed| Err(failed.into()));
            // The loop is gone when the daemon ends.
            drop(messages.send(Message::Done(key, Box::new(outcome(result)))));
        });
    }

    fn done(&mut self, key: &Key, outcome: JobOutcome) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        pod.in_flight = false;
        let mut again = std::mem::take(&mut pod.dirty);
        match outcome {
            JobOutcome::Captured(Ok(captured)) => self.captured(key, captured, !again),
            JobOutcome::Captured(Err(CaptureError::Detached)) => {
                pod.view.forget_applied_before();
                pod.desired = None;
                pod.applied = None;
                again = true;
            }
            JobOutcome::Captured(Err(error)) => self.failed(key, &error, !again),
            JobOutcome::Released(Err(error)) => {
                pod.release_failed = true;
                self.failed(key, &error, !again);
            }
            JobOutcome::Released(Ok(())) => {
                tracing::info!(pod = %key, name = pod.name, "released");
                pod.applied = None;
                if std::mem::take(&mut pod.release_failed) || pod.desired.is_none() {
                    // Of an attempt to release it.
                    pod.failure = None;
                    pod.failures = 0;
                    pod.retry_at = None;
                }
                // Answers whoever waits for that, if nothing is wanted again by now.
                again = true;
            }
            JobOutcome::Alive(Ok(true)) => {}
            JobOutcome::Alive(Ok(false)) => self.on_gone(key),
            JobOutcome::Alive(Err(error)) => tracing::warn!(pod = %key, "{}", error.text()),
        }
        let changed = self
            .pods
            .get_mut(key)
            .is_some_and(|pod| std::mem::take(&mut pod.changed_in_flight) && pod.changed());
        if again || changed {
            self.reconcile(key);
        }
    }

    /// `latest` unless something else is wanted by now.
    fn captured(&mut self, key: &Key, captured: Captured, latest: bool) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        let Captured { done, applied, follower, preexisting_connections, took, cost, idle } = captured;
        self.metrics.captured(done, took);
        if done != Attached::Unchanged {
            tracing::info!(
                pod = %key, name = pod.name, cookie = applied.cookie, cgroup = %applied.cgroup.display(),
                took = ?took, "{}", done.as_str()
            );
        }
        if done == Attached::New {
            pod.preexisting_connections = preexisting_connections;
            if preexisting_connections > 0 {
                tracing::warn!(
                    pod = %key, name = pod.name, connections = preexisting_connections,
                    "the pod had connections before it was captured: they go on past the proxy until they are closed"
                );
            }
        }
        if let Some(mut follower) = follower {
            pod.stop_following();
            let (messages, key, cookie) = (self.messages.clone(), key.clone(), applied.cookie);
            let task = tokio::spawn(async move {
                loop {
                    if let Err(error) = follower.changed().await {
                        tracing::warn!(pod = %key, error = &error as &dyn std::error::Error, "following the namespace");
                        // The next call reads the state anew, at once.
                        tokio::time::sleep(retry::delay(4)).await;
                    }
                    if messages.send(Message::Changed(key.clone(), cookie)).is_err() {
                        return;
                    }
                }
            });
            pod.follow = Some((applied.cookie, task));
        }
        pod.rest_until = Some(Instant::now() + retry::rest(cost));
        if idle {
            pod.ids_to_confirm = CONFIRMATIONS;
        }
        pod.applied = Some(applied);
        pod.last_verified = Some(Instant::now());
        if latest {
            pod.up_to_date = true;
            pod.failure = None;
            pod.last_event = None;
            pod.failures = 0;
            pod.failing_since = None;
            pod.retry_at = None;
            pod.answer(&Ok("captured"));
            pod.answer_released(&Ok("released"));
        }
    }

    fn failed(&mut self, key: &Key, error: &CaptureError, latest: bool) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        if !latest {
            self.metrics.error(error.cause());
            return;
        }
        pod.failures = pod.failures.saturating_add(1);
        let delay = retry::delay(pod.failures);
        let since = *pod.failing_since.get_or_insert_with(Instant::now);
        if error.is_of_a_start() && pod.is_starting(since) {
            tracing::debug!(pod = %key, name = pod.name, "waiting for its first process: {}", error.text());
            pod.retry_at = Some(Instant::now() + delay.min(START_RETRY));
            return;
        }
        self.metrics.error(error.cause());
        let problem = PodFailure::from(error);
        // The same again and again is said once.
        if pod.failure.as_ref() != Some(&problem) {
            tracing::error!(
                pod = %key, name = pod.name, cause = error.cause(), failures = pod.failures,
                retry_in = ?delay, "{}", problem.text
            );
        }
        pod.retry_at = Some(Instant::now() + delay);
        pod.answer_released(&Err(problem.clone()));
        let asked = pod.answer(&Err(problem.clone()));
        pod.failure = Some(problem);
        if asked || error.is_about_options() || since.elapsed() >= EVENT_AFTER {
            self.publish_event(key);
        }
        if asked {
            self.add_failed(key);
        }
    }
}
