//! Changes the node, one job after the other, so that nothing that waits for the kernel holds up the rest of the daemon. A
//! thread carries the jobs out, except those that another thread finds nothing ahead of.

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tokio::sync::oneshot;

use crate::{
    cutover::{self, CutoverError},
    node::{Node, NodeError, Paused},
    store::Lock,
};

/// How long there must be no job before something is prepared, so that a processor is left for the answer to the last one.
const PREPARE_AFTER: Duration = Duration::from_millis(2);

type Job = Box<dyn FnOnce(&mut Access) + Send>;

/// Which jobs go first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Priority {
    /// Somebody waits for it: a pod that is being started.
    Urgent,
    /// What keeps the state right.
    Normal,
}

/// The job panicked, or the thread is gone.
#[derive(Debug, thiserror::Error)]
#[error("the daemon's worker failed on this; its log says where")]
pub struct WorkerFailed;

struct Queue {
    queues: Mutex<PriorityQueues>,
    more: Condvar,
    /// Locked by a job.
    access: Mutex<Access>,
}

#[derive(Default)]
struct PriorityQueues {
    urgent: VecDeque<Job>,
    normal: VecDeque<Job>,
    /// Another thread has carried a job out, after which there may be something to prepare.
    was_used: bool,
    closed: bool,
}

impl PriorityQueues {
    fn is_empty(&self) -> bool {
        self.urgent.is_empty() && self.normal.is_empty()
    }

    fn push(&mut self, priority: Priority, job: Job) {
        match priority {
            Priority::Urgent => self.urgent.push_back(job),
            Priority::Normal => self.normal.push_back(job),
        }
    }
}

impl Queue {
    fn queues(&self) -> std::sync::MutexGuard<'_, PriorityQueues> {
        // Jobs run outside the lock, so that a panic leaves the queue whole.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no other job runs.
    fn access(&self) -> std::sync::MutexGuard<'_, Access> {
        // A job that panics leaves it whole.
        self.access.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a job, unless there is something else to do.
    fn next(&self, otherwise: Otherwise) -> Next {
        let mut queues = self.queues();
        loop {
            if let Some(job) = queues.urgent.pop_front().or_else(|| queues.normal.pop_front()) {
                return Next::Job(job);
            }
            if queues.closed {
                return Next::End;
            }
            if otherwise == Otherwise::Wait && !queues.was_used {
                queues = self.more.wait(queues).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let waited = self.more.wait_timeout(queues, PREPARE_AFTER);
            let (after, time) = waited.unwrap_or_else(PoisonError::into_inner);
            queues = after;
            if time.timed_out() && queues.is_empty() && !queues.closed {
                queues.was_used = false;
                return Next::Nothing;
            }
        }
    }
}

/// What the thread does while there is no job.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Otherwise {
    Wait,
    Prepare,
}

/// What the thread does next.
enum Next {
    Job(Job),
    Nothing,
    End,
}

/// Gives jobs to the thread, which ends with the last of these.
#[derive(Clone)]
pub struct Worker(Arc<Handle>);

struct Handle(Arc<Queue>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.queues().closed = true;
        self.0.more.notify_all();
    }
}

impl Worker {
    /// Start the thread, for the state in this bpffs. It is opened by the first job that wants it.
    pub fn start(bpffs: PathBuf, max_connections: u32) -> io::Result<Self> {
        let access = Access { bpffs, max_connections, paused: None, keep: None, left: false };
        let queue =
            Arc::new(Queue { queues: Mutex::default(), more: Condvar::new(), access: Mutex::new(access) });
        thread::Builder::new().name("node".to_owned()).spawn({
            let queue = Arc::clone(&queue);
            move || {
                let mut otherwise = Otherwise::Wait;
                loop {
                    otherwise = match queue.next(otherwise) {
                        Next::Job(job) => {
                            let mut access = queue.access();
                            job(&mut access);
                            access.otherwise()
                        }
                        Next::Nothing => queue.access().prepare(),
                        Next::End => return,
                    };
                }
            }
        })?;
        Ok(Self(Arc::new(Handle(queue))))
    }

    /// Run a job and wait for what it gives.
    pub async fn run<T: Send + 'static>(
        &self,
        priority: Priority,
        work: impl FnOnce(&mut Access) -> T + Send + 'static,
    ) -> Result<T, WorkerFailed> {
        self.submit(priority, work).await.map_err(|_| WorkerFailed)
    }

    /// Run a job, on the calling thread if no other runs or waits, so that the caller waits for no other thread. The receiver gets
    /// what it gives, or an error if it panicked.
    pub fn perform<T: Send + 'static>(
        &self,
        priority: Priority,
        work: impl FnOnce(&mut Access) -> T + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (job, result) = job(work);
        let queue = &self.0.0;
        let mut queues = queue.queues();
        match queue.access.try_lock() {
            Ok(mut access) if queues.is_empty() => {
                drop(queues);
                job(&mut access);
                drop(access);
                queue.queues().was_used = true;
            }
            _ => queues.push(priority, job),
        }
        queue.more.notify_one();
        result
    }

    /// Have the thread run a job. The receiver gets what it gives, or an error if it panicked.
    fn submit<T: Send + 'static>(
        &self,
        priority: Priority,
        work: impl FnOnce(&mut Access) -> T + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (job, result) = job(work);
        self.0.0.queues().push(priority, job);
        self.0.0.more.notify_one();
        result
    }

    /// How many jobs wait.
    pub fn waiting(&self) -> usize {
        let queues = self.0.0.queues();
        queues.urgent.len() + queues.normal.len()
    }
}

fn job<T: Send + 'static>(
    work: impl FnOnce(&mut Access) -> T + Send + 'static,
) -> (Job, oneshot::Receiver<T>) {
    let (reply, result) = oneshot::channel();
    let job: Job = Box::new(move |access| {
        match catch_unwind(AssertUnwindSafe(|| work(access))) {
            // The caller waits no more: what was to be changed is changed all the same.
            Ok(result) => drop(reply.send(result)),
            Err(_) => access.paused = None,
        }
    });
    (job, result)
}

/// The node, for a job.
pub struct Access {
    bpffs: PathBuf,
    max_connections: u32,
    paused: Option<Paused>,
    keep: Option<Lock>,
    left: bool,
}

impl Access {
    /// Lock the node for as long as `work` takes. Between jobs other agents may use it.
    pub fn with<T, E: From<NodeError>>(
        &mut self,
        work: impl FnOnce(&mut Node) -> Result<T, E>,
    ) -> Result<T, E> {
        if self.left {
            return Err(NodeError::Left.into());
        }
        let resumed = match self.paused.take() {
            Some(paused) => paused.resume()?,
            None => None,
        };
        let mut node = match resumed {
            Some(node) => node,
            None => {
                let node = Node::open(&self.bpffs, self.max_connections)?;
                // What was kept may be the same folder, which a second lock of ours could not have.
                self.keep = None;
                self.keep = Some(node.store().keep().map_err(NodeError::from)?);
                node
            }
        };
        let result = work(&mut node);
        self.paused = Some(node.pause());
        result
    }

    fn otherwise(&self) -> Otherwise {
        match &self.paused {
            Some(paused) if paused.wants_preparation() => Otherwise::Prepare,
            _ => Otherwise::Wait,
        }
    }

    /// Make one thing that the next attach needs. If that fails, the attach makes it, and says why it cannot.
    fn prepare(&self) -> Otherwise {
        if self.otherwise() == Otherwise::Wait {
            return Otherwise::Wait;
        }
        let Some(paused) = &self.paused else { return Otherwise::Wait };
        match paused.prepare() {
            Ok(()) => self.otherwise(),
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "preparing for the next pod");
                Otherwise::Wait
            }
        }
    }

    /// Remove everything from the node, whoever attached it. Jobs that come after find nothing, and make nothing.
    pub fn remove_everything(&mut self) -> Result<(), CutoverError> {
        self.left = true;
        self.paused = None;
        self.keep = None;
        match Node::find(&self.bpffs) {
            Ok(Some(node)) => Ok(node.remove_everything()?),
            // What cannot be read can be removed.
            Ok(None) | Err(_) => cutover::remove_unreadable(&self.bpffs).map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
    }

    #[test]
    fn a_panic_in_a_job_fails_that_job_alone() {
        let worker = Worker::start("/nonexistent".into(), 1).expect("a thread");
        runtime().block_on(async {
            let failed = worker.run(Priority::Normal, |_| panic!("on purpose")).await;
            assert!(matches!(failed, Err(WorkerFailed)), "{failed:?}");
            assert_eq!(worker.run(Priority::Normal, |_| 7).await.expect("still there"), 7);
        });
    }

    #[test]
    fn a_job_runs_on_the_calling_thread_if_nothing_is_ahead_of_it() {
        let worker = Worker::start("/nonexistent".into(), 1).expect("a thread");
        let here = |_: &mut Access| thread::current().id();
        runtime().block_on(async {
            assert_eq!(worker.perform(Priority::Urgent, here).await, Ok(thread::current().id()));
            let failed = worker.perform(Priority::Urgent, |_| panic!("on purpose")).await;
            assert!(failed.is_err());
            let (go, wait) = std::sync::mpsc::channel::<()>();
            let (begun, begins) = std::sync::mpsc::channel::<()>();
            let ahead = worker.submit(Priority::Normal, move |_| {
                begun.send(()).expect("it is awaited");
                wait.recv().expect("a word");
            });
            begins.recv().expect("it runs");
            let behind = worker.perform(Priority::Urgent, here);
            go.send(()).expect("the worker waits");
            ahead.await.expect("done");
            assert_ne!(behind.await, Ok(thread::current().id()));
        });
    }

    #[test]
    fn urgent_jobs_overtake() {
        let worker = Worker::start("/nonexistent".into(), 1).expect("a thread");
        let order = Arc::new(Mutex::new(Vec::new()));
        runtime().block_on(async {
            let (go, wait) = std::sync::mpsc::channel::<()>();
            let first = worker.run(Priority::Normal, move |_| wait.recv().expect("a word"));
            let note = |what: &'static str| {
                let order = Arc::clone(&order);
                move |_: &mut Access| order.lock().expect("whole").push(what)
            };
            let normal = worker.run(Priority::Normal, note("normal"));
            let urgent = worker.run(Priority::Urgent, note("urgent"));
            let (first, normal, urgent, ()) = tokio::join!(first, normal, urgent, async {
                go.send(()).expect("the worker waits");
            });
            first.and(normal).and(urgent).expect("all done");
        });
        assert_eq!(*order.lock().expect("whole"), ["urgent", "normal"]);
    }
}
