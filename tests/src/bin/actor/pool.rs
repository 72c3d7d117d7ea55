//! One thread for each user and group: credentials belong to the thread, so no flow needs a process of its own.

use std::collections::HashMap;
use std::pin::Pin;

use anyhow::{Context, Result};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tests::testbed::Ids;
use tokio::sync::{mpsc, oneshot};

type MemberTask = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// The threads, and what they keep open.
#[derive(Default)]
pub(crate) struct MemberPool {
    members: HashMap<Ids, Member>,
    open: HashMap<u64, Vec<StopHandle>>,
}

/// A thread that runs tasks as one user.
#[derive(Clone)]
pub(crate) struct Member {
    tasks: mpsc::UnboundedSender<MemberTask>,
}

/// Ends a task of [`Member::run_until_closed`].
pub(crate) struct StopHandle {
    ask: oneshot::Sender<()>,
    ended: std::sync::mpsc::Receiver<()>,
}

impl MemberPool {
    /// The thread of this user.
    pub(crate) fn member(&mut self, ids: Ids) -> Result<Member> {
        if let Some(member) = self.members.get(&ids) {
            return Ok(member.clone());
        }
        let member = Self::hire(ids)?;
        self.members.insert(ids, member.clone());
        Ok(member)
    }

    /// Another thread of this user.
    pub(crate) fn hire(ids: Ids) -> Result<Member> {
        let (tasks, mut inbox) = mpsc::unbounded_channel::<MemberTask>();
        let (ready, is_ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let became = become_user(ids);
            let failed = became.is_err();
            drop(ready.send(became));
            if failed {
                return;
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime needs a few descriptors");
            tokio::task::LocalSet::new().block_on(&runtime, async move {
                while let Some(task) = inbox.recv().await {
                    tokio::task::spawn_local(task());
                }
            });
        });
        is_ready.recv().context("a thread ended early")??;
        Ok(Member { tasks })
    }

    /// Notes what to stop when the request `id` is to be closed.
    pub(crate) fn opened(&mut self, id: u64, stops: Vec<StopHandle>) {
        self.open.insert(id, stops);
    }

    /// Closes what the request `id` opened; false if it opened nothing.
    pub(crate) fn close(&mut self, id: u64) -> bool {
        let Some(stops) = self.open.remove(&id) else { return false };
        for stop in stops {
            // Both fail when the task has ended by itself, which is as good.
            let _ = stop.ask.send(());
            let _ = stop.ended.recv();
        }
        true
    }
}

impl Member {
    /// Runs a task to its end.
    pub(crate) fn run<F: Future<Output = ()> + 'static>(&self, task: impl FnOnce() -> F + Send + 'static) {
        let task: MemberTask = Box::new(move || Box::pin(task()));
        assert!(self.tasks.send(task).is_ok(), "the threads of the pool run as long as the process");
    }

    /// Runs a task to its end or until told to stop, when it is dropped.
    pub(crate) fn run_until_closed<F: Future<Output = ()> + 'static>(
        &self,
        task: impl FnOnce() -> F + Send + 'static,
    ) -> StopHandle {
        let (ask, asked) = oneshot::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        self.run(async move || {
            tokio::select! {
                () = task() => {}
                _ = asked => {}
            }
            drop(end);
        });
        StopHandle { ask, ended }
    }
}

fn become_user(ids: Ids) -> Result<()> {
    if ids == Ids::ROOT {
        return Ok(());
    }
    let gid = rustix::process::Gid::from_raw(ids.gid);
    let uid = rustix::process::Uid::from_raw(ids.uid);
    set_thread_groups(&[]).with_context(|| format!("giving up groups for {ids:?}"))?;
    set_thread_res_gid(gid, gid, gid).with_context(|| format!("becoming group {}", ids.gid))?;
    set_thread_res_uid(uid, uid, uid).with_context(|| format!("becoming user {}", ids.uid))
}
