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

pub use message::{Message, Outcome};
pub use pod::{Answer, Problem, Report, State};

use self::pod::Pod;
use super::{
    capture::{self, CaptureError, Captured, Held, Prepared, Seen},
    complaints::Complaint,
    metrics::Metrics,
    retry,
    view::PodView,
    wanted::{Key, Wanted},
    worker::{Access, Lane, Worker, WorkerFailed},
};
use crate::{
    node::{Attached, NodeError},
    store::Record,
};

/// How often pods are looked at: a pod that is gone is to be gone within a second.
const LOOK: Duration = Duration::from_millis(400);
/// How often the whole state is compared with what should be in force.
const AUDIT: Duration = Duration::from_secs(10);

/// A failure that passes by itself within this time gets no event on the pod.
const EVENT_AFTER: Duration = Duration::from_secs(5);
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
    complaints: Option<mpsc::UnboundedSender<Complaint>>,
    /// How long a sandbox waits for the API; there is none to wait for if none.
    api_wait: Option<Duration>,
    leaving: bool,
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
            complaints: None,
            api_wait: None,
            leaving: false,
        };
        (reconciler, messages)
    }

    /// Have somebody else told of pods of the API that could not be captured.
    pub fn complain_to(&mut self, complaints: mpsc::UnboundedSender<Complaint>) {
        self.complaints = Some(complaints);
    }

    /// The API is watched: have a sandbox wait for its word for so long.
    pub fn await_api(&mut self, patience: Duration) {
        self.api_wait = Some(patience);
    }

    /// Once for failures of one kind in a row, which may be many.
    fn complain(&mut self, key: &Key) {
        let (Some(complaints), Key::Pod(uid), Some(pod)) = (&self.complaints, key, self.pods.get_mut(key))
        else {
            return;
        };
        let Some(text) = pod.problem.as_ref().map(|problem| problem.text.clone()) else { return };
        if pod.complained.as_ref() != Some(&text) {
            pod.complained = Some(text.clone());
            // The object of a static pod has another UID than the pod.
            let uid = pod.view.speaker().map_or(uid, |object| &object.id.uid.0).clone();
            drop(complaints.send(Complaint { uid, name: pod.name.clone(), text }));
        }
    }

    /// Take over what is in force, after sweeping what is dead.
    pub async fn adopt(&mut self) -> Result<usize, CaptureError> {
        let records = self.worker.run(Lane::Urgent, capture::sweep).await??;
        let adopted = records.len();
        for record in records {
            self.adopt_one(&record);
        }
        Ok(adopted)
    }

    fn adopt_one(&mut self, record: &Record) {
        let key = Key::of_record(record);
        let pod = self.pods.entry(key.clone()).or_default();
        pod.held = Some(Held::of_record(record));
        pod.proven = Some(Instant::now());
        if pod.view.is_empty() {
            pod.view.set_applied_before(Wanted::of_record(record));
            self.reconsider(&key);
        } else {
            // Routes may have changed while nobody followed them.
            self.step(&key);
        }
    }

    /// Until the last sender of messages is gone.
    pub async fn run(mut self) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut audit = tokio::time::interval(AUDIT);
        loop {
            tokio::select! {
                message = self.inbox.recv() => match message {
                    Some(message) => self.take(message),
                    None => return,
                },
                _ = look.tick() => self.look(),
                _ = audit.tick() => self.start_audit(),
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
            Message::ApiSilent(key, sandbox) => self.api_silent(&key, &sandbox),
            Message::Delete { key, sandbox, reply } => self.delete(&key, &sandbox, reply),
            Message::Check(key, reply) => drop(reply.send(self.check(&key))),
            Message::Report(reply) => {
                drop(reply.send(self.pods.iter().map(|(key, pod)| Report::of(key, pod)).collect()));
            }
            Message::Collect(valid, reply) => drop(reply.send(self.collect(&valid))),
            Message::Leave(reply) => self.leave(reply),
            Message::Changed(key, cookie) => {
                if self.pods.get(&key).and_then(|pod| pod.held.as_ref()).is_some_and(|h| h.cookie == cookie) {
                    self.step(&key);
                }
            }
            Message::Done(key, outcome) => self.done(&key, *outcome),
            Message::Audited(in_force, new) => self.audited(&in_force, &new),
        }
    }

    /// Release pods whose sandbox is gone without a word. One that is asked for now may be newer than the list.
    fn collect(&mut self, valid: &HashSet<String>) -> usize {
        let is_gone = |pod: &Pod| {
            let sandbox = pod.view.sandbox_id();
            sandbox.is_some_and(|sandbox| !valid.contains(sandbox)) && !pod.busy && pod.waiting.is_empty()
        };
        let gone: Vec<Key> =
            self.pods.iter().filter(|(_, pod)| is_gone(pod)).map(|(key, _)| key.clone()).collect();
        for key in &gone {
            tracing::info!(pod = %key, "the runtime has its sandbox no more");
            if let Some(pod) = self.pods.get_mut(key)
                && let Some(sandbox) = pod.view.sandbox_id().map(str::to_owned)
            {
                pod.view.end_sandbox(&sandbox);
                pod.unwant();
                self.reconsider(key);
            }
        }
        gone.len()
    }

    fn check(&self, key: &Key) -> Answer {
        match self.pods.get(key) {
            Some(pod) if pod.left_alone.is_some() => Ok("left_alone"),
            Some(Pod { held: Some(held), problem: None, .. }) if held.look() == Seen::Here => Ok("captured"),
            Some(Pod { problem: Some(problem), .. }) => Err(problem.clone()),
            _ => Err(Problem { cause: "absent".into(), text: "the pod is not captured".into() }),
        }
    }

    fn leave(&mut self, reply: oneshot::Sender<Result<(), NodeError>>) {
        self.leaving = true;
        tracing::info!("removing everything from this node");
        let mut held = Vec::new();
        for pod in std::mem::take(&mut self.pods).values_mut() {
            pod.stop_following();
            held.extend(pod.held.take());
        }
        let worker = self.worker.clone();
        tokio::spawn(async move {
            let removed = worker.run(Lane::Urgent, move |access| {
                for held in held {
                    // What stays is removed below; only the namespace's own settings may be left as they are.
                    if let Err(error) = capture::release(access, &held) {
                        tracing::warn!(
                            cookie = held.cookie,
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
    fn step(&mut self, key: &Key) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        if pod.busy {
            pod.again = true;
            return;
        }
        if pod.due.is_some_and(|due| due > Instant::now()) {
            return;
        }
        let nobody_waits = pod.waiting.is_empty() && pod.releasing.is_empty();
        let lane = if nobody_waits { Lane::Normal } else { Lane::Urgent };
        match (&pod.wanted, &pod.held) {
            (Some(wanted), held) => {
                pod.busy = true;
                let (wanted, held) = (wanted.clone(), held.clone());
                let followed = pod.follow.as_ref().map(|(cookie, _)| *cookie);
                let runtime = self.runtime.clone();
                let before = held.clone();
                let prepare = move || capture::prepare(&runtime, &wanted, before.as_ref(), followed);
                let capture =
                    move |access: &mut Access, prepared| capture::capture(access, prepared, held.as_ref());
                self.spawn_prepared(key, lane, prepare, capture);
            }
            (None, Some(held)) => {
                let held = held.clone();
                pod.busy = true;
                pod.stop_following();
                self.spawn(key, lane, Outcome::Released, move |access| Ok(capture::release(access, &held)?));
            }
            (None, None) => {
                pod.stop_following();
                if let Some(why) = pod.left_alone {
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
        lane: Lane,
        prepare: impl FnOnce() -> Result<Prepared, CaptureError> + Send + 'static,
        capture: impl FnOnce(&mut Access, Prepared) -> Result<Captured, CaptureError> + Send + 'static,
    ) {
        let (worker, messages, key) = (self.worker.clone(), self.messages.clone(), key.clone());
        tokio::spawn(async move {
            let result = match tokio::task::spawn_blocking(prepare).await {
                Ok(Ok(prepared)) => worker
                    .run(lane, move |access| capture(access, prepared))
                    .await
                    .unwrap_or_else(|failed| Err(failed.into())),
                Ok(Err(error)) => Err(error),
                // It panicked, which its log says.
                Err(_) => Err(WorkerFailed.into()),
            };
            // The loop is gone when the daemon ends.
            drop(messages.send(Message::Done(key, Box::new(Outcome::Captured(result)))));
        });
    }

    fn spawn<T: Send + 'static>(
        &self,
        key: &Key,
        lane: Lane,
        outcome: fn(Result<T, CaptureError>) -> Outcome,
        work: impl FnOnce(&mut super::worker::Access) -> Result<T, CaptureError> + Send + 'static,
    ) {
        let (worker, messages, key) = (self.worker.clone(), self.messages.clone(), key.clone());
        tokio::spawn(async move {
            let result = worker.run(lane, work).await.unwrap_or_else(|failed| Err(failed.into()));
            // The loop is gone when the daemon ends.
            drop(messages.send(Message::Done(key, Box::new(outcome(result)))));
        });
    }

    fn done(&mut self, key: &Key, outcome: Outcome) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        pod.busy = false;
        let mut again = std::mem::take(&mut pod.again);
        match outcome {
            Outcome::Captured(Ok(captured)) => self.captured(key, captured, !again),
            Outcome::Captured(Err(CaptureError::Detached)) => {
                pod.view.forget_applied_before();
                pod.wanted = None;
                pod.held = None;
                again = true;
            }
            Outcome::Captured(Err(error)) => self.failed(key, &error, !again),
            Outcome::Released(Err(error)) => {
                pod.release_failed = true;
                self.failed(key, &error, !again);
            }
            Outcome::Released(Ok(())) => {
                tracing::info!(pod = %key, name = pod.name, "released");
                pod.held = None;
                if std::mem::take(&mut pod.release_failed) || pod.wanted.is_none() {
                    // Of an attempt to release it.
                    pod.problem = None;
                    pod.failures = 0;
                    pod.due = None;
                }
                // Answers whoever waits for that, if nothing is wanted again by now.
                again = true;
            }
            Outcome::Alive(Ok(true)) => {}
            Outcome::Alive(Ok(false)) => self.vanished(key),
            Outcome::Alive(Err(error)) => tracing::warn!(pod = %key, "{}", error.text()),
        }
        if again {
            self.step(key);
        }
    }

    /// `latest` unless something else is wanted by now.
    fn captured(&mut self, key: &Key, captured: Captured, latest: bool) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        let Captured { done, held, follower, earlier, took } = captured;
        self.metrics.captured(done, took);
        if done != Attached::Unchanged {
            tracing::info!(
                pod = %key, name = pod.name, cookie = held.cookie, cgroup = %held.cgroup.display(),
                took = ?took, "{}", done.word()
            );
        }
        if done == Attached::New {
            pod.earlier = earlier;
            if earlier > 0 {
                tracing::warn!(
                    pod = %key, name = pod.name, connections = earlier,
                    "the pod had connections before it was captured: they go on past the proxy until they are closed"
                );
            }
        }
        if let Some(mut follower) = follower {
            pod.stop_following();
            let (messages, key, cookie) = (self.messages.clone(), key.clone(), held.cookie);
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
            pod.follow = Some((held.cookie, task));
        }
        pod.held = Some(held);
        pod.proven = Some(Instant::now());
        if latest {
            pod.settled = true;
            pod.problem = None;
            pod.complained = None;
            pod.failures = 0;
            pod.failing_since = None;
            pod.due = None;
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
            pod.due = Some(Instant::now() + delay.min(START_RETRY));
            return;
        }
        self.metrics.error(error.cause());
        let problem = Problem::from(error);
        // The same again and again is said once.
        if pod.problem.as_ref() != Some(&problem) {
            tracing::error!(
                pod = %key, name = pod.name, cause = error.cause(), failures = pod.failures,
                retry_in = ?delay, "{}", problem.text
            );
        }
        pod.due = Some(Instant::now() + delay);
        pod.answer_released(&Err(problem.clone()));
        let asked = pod.answer(&Err(problem.clone()));
        pod.problem = Some(problem);
        if asked || error.is_about_options() || since.elapsed() >= EVENT_AFTER {
            self.complain(key);
        }
        if asked {
            self.add_failed(key);
        }
    }
}
