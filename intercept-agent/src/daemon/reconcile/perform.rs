//! Carries out the commands of a pod's machine, and reports the results to it.

use super::{
    CONFIRMATIONS, Message, Reconciler,
    machine::{FailedAttempt, MachineCommand, MachineEvent},
    message::JobOutcome,
};
use crate::{
    daemon::{
        capture::{self, AppliedPod, CaptureError, Captured, Liveness, ReleasedPod},
        cutover::CutoverRecord,
        desired::{DesiredPod, Key},
        events::{EventKind, PodEvent},
        retry,
        worker::{Access, Priority, WorkerFailed},
    },
    ids::NetnsCookie,
    node::Attached,
    routes::{RoutesError, Subscription},
};

impl Reconciler {
    /// Passes an event to the machine of a pod and carries out its commands.
    pub(super) fn on(&mut self, key: &Key, event: MachineEvent) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        for command in pod.on(event) {
            self.perform(key, command);
        }
    }

    fn perform(&mut self, key: &Key, command: MachineCommand) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        let name = &pod.name;
        match command {
            MachineCommand::Capture { desired, before, priority } => {
                self.capture(key, *desired, before, priority)
            }
            MachineCommand::Release { applied, priority } => {
                let ends = !pod.releasing.is_empty() || applied.liveness() != Liveness::Alive;
                let released = if ends { ReleasedPod::Ends } else { ReleasedPod::Lives };
                self.release(key, applied, priority, released);
            }
            MachineCommand::Check(AppliedPod { cookie, .. }) => {
                self.spawn(key, Priority::Normal, JobOutcome::Alive, move |access| {
                    Ok(capture::is_alive(access, cookie)?)
                });
            }
            MachineCommand::StopFollowing => pod.stop_following(),
            MachineCommand::Answer(answer) => pod.answer(&answer),
            MachineCommand::AnswerReleased(answer) => pod.answer_released(&answer),
            MachineCommand::CountFailure(cause) => self.metrics.error(cause),
            MachineCommand::LogIgnored(why) => {
                tracing::debug!(pod = %key, name, why = why.as_str(), "left alone");
            }
            MachineCommand::LogStarting(failure) => {
                tracing::debug!(pod = %key, name, "waiting for its first process: {}", failure.text);
            }
            MachineCommand::LogFailed { failure, failures, retry_in } => tracing::error!(
                pod = %key, name, cause = failure.cause, failures, retry_in = ?retry_in, "{}", failure.text
            ),
            MachineCommand::LogRefused(failure) => {
                tracing::error!(pod = %key, name, cause = failure.cause, "{}", failure.text);
            }
            MachineCommand::Publish(text) => self.publish(key, EventKind::NotCaptured, text),
            MachineCommand::EndFailedAdd => self.end_failed_add(key),
            MachineCommand::ForgetIfUnclaimed => {
                if pod.view.is_empty() {
                    self.pods.remove(key);
                }
            }
        }
    }

    pub(super) fn publish(&self, key: &Key, kind: EventKind, text: String) {
        if let (Some(events), Key::Pod(uid), Some(pod)) = (&self.events, key, self.pods.get(key)) {
            // The object of a static pod has another UID than the pod.
            let uid = pod.view.speaker().map_or(&uid.0, |object| &object.id.uid.0).clone();
            drop(events.send(PodEvent { uid, name: pod.name.clone(), kind, text }));
        }
    }

    /// Observes a pod on a thread of its own, then attaches it on the worker. Its rules of iptables are put in again before
    /// that if it goes back into shadow mode, and taken out after it if it is time for its cut-over.
    fn capture(&mut self, key: &Key, desired: DesiredPod, before: Option<AppliedPod>, priority: Priority) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        let followed = pod.followed();
        // The start of a pod waits for no cut-over.
        let cuts_over = priority == Priority::Normal && pod.cutover.take_due();
        let (rules, worker, key) = (self.rules_mover(key), self.worker.clone(), key.clone());
        let messages = self.messages.clone();
        let into_shadow = before.clone().filter(|_| desired.options.is_shadow());
        // The thread goes on with the attach if it can, so that the pod waits for no other thread.
        let prepare = move || {
            let prepared = capture::prepare(&desired, before.as_ref(), followed)?;
            let attach = move |access: &mut Access| capture::capture(access, prepared, before.as_ref());
            Ok::<_, CaptureError>(worker.perform(priority, attach))
        };
        let job = async move {
            if let Some(applied) = &into_shadow {
                rules.back(applied).await?;
            }
            // If it panicked, that was logged.
            let attached = tokio::task::spawn_blocking(prepare).await.map_err(|_| WorkerFailed)??;
            let mut captured = attached.await.map_err(|_| WorkerFailed)??;
            if cuts_over {
                rules.there(&mut captured).await?;
            }
            Ok(captured)
        };
        tokio::spawn(async move {
            let result = job.await;
            // The reconciler is gone when the daemon ends.
            drop(messages.send(Message::Done(key, Box::new(JobOutcome::Captured(result)))));
        });
    }

    fn release(&self, key: &Key, applied: AppliedPod, priority: Priority, released: ReleasedPod) {
        let (rules, worker, key) = (self.rules_mover(key), self.worker.clone(), key.clone());
        let messages = self.messages.clone();
        let job = async move {
            if released == ReleasedPod::Lives {
                rules.back(&applied).await?;
            }
            let release = move |access: &mut Access| capture::release(access, &applied, released);
            Ok(worker.run(priority, release).await??)
        };
        tokio::spawn(async move {
            let result = job.await;
            // The reconciler is gone when the daemon ends.
            drop(messages.send(Message::Done(key, Box::new(JobOutcome::Released(result)))));
        });
    }

    fn spawn<T: Send + 'static>(
        &self,
        key: &Key,
        priority: Priority,
        outcome: fn(Result<T, CaptureError>) -> JobOutcome,
        work: impl FnOnce(&mut Access) -> Result<T, CaptureError> + Send + 'static,
    ) {
        let (worker, messages, key) = (self.worker.clone(), self.messages.clone(), key.clone());
        tokio::spawn(async move {
            let result = worker.run(priority, work).await.unwrap_or_else(|failed| Err(failed.into()));
            // The reconciler is gone when the daemon ends.
            drop(messages.send(Message::Done(key, Box::new(outcome(result)))));
        });
    }

    /// The worker is done with a pod.
    pub(super) fn done(&mut self, key: &Key, outcome: JobOutcome) {
        let worker = self.worker.clone();
        after_the_answer(move || worker.prepare_soon());
        let Some(pod) = self.pods.get_mut(key) else { return };
        let event = match outcome {
            JobOutcome::Captured(Ok(captured)) => return self.captured(key, captured),
            JobOutcome::Captured(Err(CaptureError::Detached)) => {
                pod.view.forget_applied_before();
                MachineEvent::Detached
            }
            JobOutcome::Captured(Err(error)) => MachineEvent::CaptureFailed(FailedAttempt::from(&error)),
            JobOutcome::Released(Err(error)) => MachineEvent::ReleaseFailed(FailedAttempt::from(&error)),
            JobOutcome::Released(Ok(())) => {
                tracing::info!(pod = %key, name = pod.name, "released");
                pod.cutover = CutoverRecord::default();
                MachineEvent::Released
            }
            JobOutcome::Alive(Ok(true)) => MachineEvent::StillThere,
            JobOutcome::Alive(Ok(false)) => return self.on_gone(key),
            JobOutcome::Alive(Err(error)) => {
                tracing::warn!(pod = %key, "{}", error.text());
                MachineEvent::StillThere
            }
        };
        self.on(key, event);
    }

    fn captured(&mut self, key: &Key, captured: Captured) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        let Captured {
            done,
            applied,
            changes,
            preexisting_connections,
            took,
            cost,
            idle,
            containers,
            awaits_self_test,
            rules,
            takeover,
        } = captured;
        pod.cutover.captured(takeover, rules);
        self.metrics.captured(done, took);
        if done != Attached::Unchanged {
            let (key, name, applied) = (key.clone(), pod.name.clone(), applied.clone());
            // A write to the log may take as long as several steps of the capture.
            after_the_answer(move || {
                tracing::info!(
                    pod = %key, name, cookie = applied.cookie.0, cgroup = %applied.cgroup.display(), took = ?took,
                    "{}", done.as_str()
                );
            });
            pod.proof.on_change(std::time::Instant::now());
        }
        if done == Attached::New {
            pod.preexisting_connections = preexisting_connections;
            if preexisting_connections > 0 {
                tracing::warn!(
                    pod = %key, name = pod.name, connections = preexisting_connections,
                    "the pod has connections from before the capture, which bypass the proxy until they close"
                );
            }
        }
        pod.watch_containers(containers);
        pod.awaits_self_test = awaits_self_test;
        if awaits_self_test {
            tracing::info!(pod = %key, name = pod.name, "its connections are joined after the self-test");
        }
        if idle {
            pod.ids_to_confirm = CONFIRMATIONS;
        }
        pod.last_verified = Some(std::time::Instant::now());
        if let Some(changes) = changes {
            self.follow(key, applied.cookie, changes);
        }
        self.on(key, MachineEvent::Rest(retry::rest(cost)));
        self.on(key, MachineEvent::Captured(applied));
    }

    /// Sends a message when the namespace of a pod changes.
    fn follow(&mut self, key: &Key, cookie: NetnsCookie, changes: Subscription) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        pod.stop_following();
        let (messages, key) = (self.messages.clone(), key.clone());
        let task = tokio::spawn(async move {
            // After the answer to the request for the pod.
            tokio::task::yield_now().await;
            let failed = |error: RoutesError| {
                tracing::warn!(pod = %key, error = &error as &dyn std::error::Error, "following the namespace");
            };
            let mut follower = match changes.follow() {
                Ok(follower) => follower,
                Err(error) => {
                    failed(error);
                    tokio::time::sleep(retry::delay(4)).await;
                    // As this task has ended, the pod is captured again with another subscription.
                    drop(messages.send(Message::Changed(key.clone(), cookie)));
                    return;
                }
            };
            loop {
                if let Err(error) = follower.changed().await {
                    failed(error);
                    // The next call reads the whole state again.
                    tokio::time::sleep(retry::delay(4)).await;
                }
                if messages.send(Message::Changed(key.clone(), cookie)).is_err() {
                    return;
                }
            }
        });
        pod.follow = Some((cookie, task));
    }
}

/// Does this once the requests have been answered that wait for the message that is being handled.
fn after_the_answer(work: impl FnOnce() + Send + 'static) {
    tokio::spawn(async move {
        tokio::task::yield_now().await;
        work();
    });
}
