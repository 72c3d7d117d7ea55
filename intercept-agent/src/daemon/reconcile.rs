//! Compares the desired pods with the applied ones, and changes the latter.
//!
//! Each pod has a state machine ([`machine`]), which is pure: an event leads to the next state and to commands, which
//! the reconciler carries out ([`perform`]). A pod has at most one job in flight. Events that arrive meanwhile are
//! handled when the job is done. A pod that fails is retried with a growing delay, and delays no other.

mod claims;
mod cutover;
mod machine;
mod message;
mod perform;
mod pod;
mod proof;
mod shadow;
mod watch;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

pub use message::Message;

use self::{
    machine::{Intent, MachineEvent},
    pod::TrackedPod,
};
use super::{
    capture::{self, AppliedPod, CaptureError, Liveness, ReleasedPod},
    cutover::Cutovers,
    desired::{DesiredPod, Key},
    events::PodEvent,
    metrics::Metrics,
    protocol::Refusal,
    prove::ProofSettings,
    report::{PodFailure, PodResult},
    view::PodView,
    worker::{Priority, Worker},
};
use crate::{cutover::CutoverError, node::NodeError, record::Record, store::may_pass};

/// How often pods are checked. The state of a pod that is gone is removed within a second.
const POLL_INTERVAL: Duration = Duration::from_millis(400);
/// How often all applied pods are compared with the maps.
const RESYNC_INTERVAL: Duration = Duration::from_secs(10);

/// A failure that lasts no longer than this gets no event on the pod.
const EVENT_AFTER: Duration = Duration::from_secs(5);
/// How many checks confirm the ids of a pod that had no process when it was attached.
const CONFIRMATIONS: u8 = 2;
/// Longest delay between attempts on a pod that has no process yet.
const START_RETRY: Duration = Duration::from_millis(500);

/// The reconciler.
pub struct Reconciler {
    pods: BTreeMap<Key, TrackedPod>,
    worker: Worker,
    cutovers: Cutovers,
    metrics: Metrics,
    messages: mpsc::UnboundedSender<Message>,
    inbox: mpsc::UnboundedReceiver<Message>,
    events: Option<mpsc::UnboundedSender<PodEvent>>,
    /// How long a sandbox waits for the API. `None` if the API is not watched.
    api_wait: Option<Duration>,
    /// How pods are probed; `None` if they are not.
    proofs: Option<ProofSettings>,
    uninstalling: bool,
}

impl Reconciler {
    /// Creates one without pods, and the sender of its messages.
    pub fn new(
        worker: Worker,
        cutovers: Cutovers,
        metrics: Metrics,
    ) -> (Self, mpsc::UnboundedSender<Message>) {
        let (messages, inbox) = mpsc::unbounded_channel();
        let reconciler = Self {
            pods: BTreeMap::new(),
            worker,
            cutovers,
            metrics,
            messages: messages.clone(),
            inbox,
            events: None,
            api_wait: None,
            proofs: None,
            uninstalling: false,
        };
        (reconciler, messages)
    }

    /// Sends an event for each pod of the API that cannot be captured.
    pub fn publish_events_to(&mut self, events: mpsc::UnboundedSender<PodEvent>) {
        self.events = Some(events);
    }

    /// Probes the captured pods.
    pub fn prove(&mut self, settings: ProofSettings) {
        self.proofs = Some(settings);
    }

    /// The API is watched: the ADD of a sandbox waits for it at most this long.
    pub fn await_api(&mut self, patience: Duration) {
        self.api_wait = Some(patience);
    }

    /// Reads the applied pods, after the state of pods that are gone is removed.
    pub async fn adopt(&mut self) -> Result<usize, CaptureError> {
        let records = self.worker.run(Priority::Urgent, capture::sweep).await??;
        let adopted = records.len();
        for record in records {
            self.adopt_record(&record)?;
        }
        Ok(adopted)
    }

    fn adopt_record(&mut self, record: &Record) -> Result<(), NodeError> {
        if record.cookie.is_workload() {
            // Not a pod: it stays as it is.
            return Ok(());
        }
        let (key, applied) = (Key::of_record(record), AppliedPod::of_record(record));
        let rules = match self.cutovers.rules(&applied) {
            Err(error) if may_pass(&error) => return Err(error),
            // What cannot be read for good is told when the pod is captured again or released.
            read => read.ok().flatten(),
        };
        let pod = self.pods.entry(key.clone()).or_default();
        pod.cutover.rules = rules;
        pod.last_verified = Some(Instant::now());
        let is_unclaimed = pod.view.is_empty();
        if is_unclaimed {
            pod.view.set_applied_before(DesiredPod::of_record(record));
        }
        self.on(&key, MachineEvent::Adopted(applied));
        if is_unclaimed {
            self.resolve_claims(&key);
        } else {
            // Routes may have changed while no daemon followed them.
            self.on(&key, MachineEvent::Recheck);
        }
        Ok(())
    }

    /// Runs until the last sender of messages is gone.
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
                drop(reply.send(self.pods.iter().map(|(key, pod)| pod.report(key)).collect()));
            }
            Message::Collect(valid, reply) => drop(reply.send(self.collect(&valid))),
            Message::Leave(reply) => self.uninstall(reply),
            Message::Changed(key, cookie) => {
                let applied = self.pods.get(&key).and_then(TrackedPod::applied);
                if applied.is_some_and(|applied| applied.cookie == cookie) {
                    self.on(&key, MachineEvent::NamespaceChanged);
                }
            }
            Message::Done(key, outcome) => self.done(&key, *outcome),
            Message::CutoverEnded(key, attempt) => self.cutover_ended(&key, *attempt),
            Message::Probed(key, cookie, result) => self.probed(&key, cookie, *result),
            Message::Resynced(result) => {
                self.resynced(&result.active, &result.new);
                self.compared(&result.shadows);
                self.start_cutovers(&result.shadows);
            }
        }
    }

    fn check(&self, key: &Key) -> PodResult {
        let absent = PodFailure::refusal(Refusal::Absent, "the pod is not captured");
        let Some(pod) = self.pods.get(key) else { return Err(absent) };
        match (&pod.machine.intent, &pod.machine.failure, pod.applied()) {
            (Intent::Ignored(_), ..) => Ok("left_alone"),
            (_, Some(failure), _) => Err(failure.clone()),
            (_, None, Some(applied)) if applied.liveness() == Liveness::Alive => Ok("captured"),
            _ => Err(absent),
        }
    }

    fn uninstall(&mut self, reply: oneshot::Sender<Result<(), CutoverError>>) {
        self.uninstalling = true;
        tracing::info!("removing everything from this node");
        let mut applied = Vec::new();
        for pod in std::mem::take(&mut self.pods).values_mut() {
            pod.stop_following();
            applied.extend(pod.applied().cloned());
        }
        let (worker, cutovers) = (self.worker.clone(), self.cutovers.clone());
        tokio::spawn(async move {
            cutovers.all_back(&applied).await;
            let removed = worker.run(Priority::Urgent, move |access| {
                for applied in applied {
                    // The rest is removed below. Only changes of the namespace may stay.
                    if let Err(error) = capture::release(access, &applied, ReleasedPod::Lives) {
                        tracing::warn!(
                            cookie = applied.cookie.0,
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
}
