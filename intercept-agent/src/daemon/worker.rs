//! Changes the node, one job after the other, so that nothing that waits for the kernel holds up the rest of the daemon. A
//! thread carries the jobs out, except those that another thread finds nothing ahead of.

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use crate::{
    cutover::{self, CutoverError},
    node::{Node, NodeError, Paused},
    store::{Lock, may_pass},
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
    schedule: Mutex<Schedule>,
    more: Condvar,
    /// Of the thread that has begun a step.
    access: Mutex<Access>,
}

/// Which step comes next. Of all threads, one at a time has begun a step.
#[derive(Default)]
struct Schedule {
    urgent: VecDeque<Job>,
    normal: VecDeque<Job>,
    has_begun: bool,
    /// When the last step ended, if something is to be prepared.
    idle_since: Option<Instant>,
    closed: bool,
}

/// What the worker's thread does next.
enum WorkerStep {
    Job(Job),
    Prepare,
    End,
}

/// A step, or how long to wait until there is one.
enum Next {
    Step(WorkerStep),
    Wait,
    WaitFor(Duration),
}

impl Schedule {
    fn is_empty(&self) -> bool {
        self.urgent.is_empty() && self.normal.is_empty()
    }

    fn push(&mut self, priority: Priority, job: Job) {
        match priority {
            Priority::Urgent => self.urgent.push_back(job),
            Priority::Normal => self.normal.push_back(job),
        }
    }

    /// What the worker's thread does now. A step that is returned has begun.
    fn next(&mut self, now: Instant) -> Next {
        if self.has_begun {
            return Next::Wait;
        }
        let step = match self.urgent.pop_front().or_else(|| self.normal.pop_front()) {
            Some(job) => WorkerStep::Job(job),
            None if self.closed => WorkerStep::End,
            None => {
                let Some(since) = self.idle_since else { return Next::Wait };
                let left = PREPARE_AFTER.saturating_sub(now.saturating_duration_since(since));
                if !left.is_zero() {
                    return Next::WaitFor(left);
                }
                WorkerStep::Prepare
            }
        };
        self.has_begun = true;
        Next::Step(step)
    }

    /// Begins a job on the calling thread, if nothing is ahead of it.
    fn begin(&mut self) -> bool {
        let is_free = !self.has_begun && self.is_empty();
        self.has_begun |= is_free;
        is_free
    }

    /// The step has ended.
    fn end(&mut self, now: Instant, preparation: Preparation) {
        self.has_begun = false;
        self.idle_since = (preparation == Preparation::Pending).then_some(now);
    }
}

/// Whether something is still to be made ahead that the next attach needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Preparation {
    Pending,
    Done,
}

impl Queue {
    fn schedule(&self) -> std::sync::MutexGuard<'_, Schedule> {
        // Jobs run outside the lock, so that a panic leaves the queue whole.
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the step that has begun.
    fn access(&self) -> std::sync::MutexGuard<'_, Access> {
        // A job that panics leaves it whole.
        self.access.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next step of the worker's thread.
    fn next(&self) -> WorkerStep {
        let mut schedule = self.schedule();
        loop {
            schedule = match schedule.next(Instant::now()) {
                Next::Step(step) => return step,
                Next::Wait => self.more.wait(schedule).unwrap_or_else(PoisonError::into_inner),
                Next::WaitFor(time) => {
                    let waited = self.more.wait_timeout(schedule, time);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Carries a job out that has begun.
    fn perform(&self, job: Job) {
        let mut access = self.access();
        job(&mut access);
        let preparation = access.preparation();
        drop(access);
        self.end(preparation);
    }

    /// Ends a step. The worker's thread is woken for jobs alone: what is to be prepared can wait until the caller has its
    /// answer ([`Worker::prepare_soon`]).
    fn end(&self, preparation: Preparation) {
        let mut schedule = self.schedule();
        schedule.end(Instant::now(), preparation);
        let has_next = schedule.closed || !schedule.is_empty();
        drop(schedule);
        if has_next {
            self.more.notify_one();
        }
    }
}

/// Gives jobs to the thread, which ends with the last of these.
#[derive(Clone)]
pub struct Worker(Arc<Handle>);

struct Handle(Arc<Queue>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.schedule().closed = true;
        self.0.more.notify_all();
    }
}

impl Worker {
    /// Start the thread, for the state in this bpffs. It is opened by the first job that wants it.
    pub fn start(bpffs: PathBuf, max_connections: u32) -> io::Result<Self> {
        let access = Access { bpffs, max_connections, paused: None, keep: None, left: false };
        let queue =
            Arc::new(Queue { schedule: Mutex::default(), more: Condvar::new(), access: Mutex::new(access) });
        thread::Builder::new().name("node".to_owned()).spawn({
            let queue = Arc::clone(&queue);
            move || {
                loop {
                    match queue.next() {
                        WorkerStep::Job(job) => queue.perform(job),
                        WorkerStep::Prepare => {
                            let preparation = queue.access().prepare();
                            queue.end(preparation);
                        }
                        WorkerStep::End => return,
                    }
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
        let mut schedule = queue.schedule();
        if schedule.begin() {
            drop(schedule);
            queue.perform(job);
        } else {
            schedule.push(priority, job);
            drop(schedule);
            queue.more.notify_one();
        }
        result
    }

    /// Has the thread prepare what the next attach needs, when there has been no job for a while.
    pub fn prepare_soon(&self) {
        let is_pending = self.0.0.schedule().idle_since.is_some();
        if is_pending {
            self.0.0.more.notify_one();
        }
    }

    /// Have the thread run a job. The receiver gets what it gives, or an error if it panicked.
    fn submit<T: Send + 'static>(
        &self,
        priority: Priority,
        work: impl FnOnce(&mut Access) -> T + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (job, result) = job(work);
        self.0.0.schedule().push(priority, job);
        self.0.0.more.notify_one();
        result
    }

    /// How many jobs wait.
    pub fn waiting(&self) -> usize {
        let schedule = self.0.0.schedule();
        schedule.urgent.len() + schedule.normal.len()
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

    fn preparation(&self) -> Preparation {
        match &self.paused {
            Some(paused) if paused.wants_preparation() => Preparation::Pending,
            _ => Preparation::Done,
        }
    }

    /// Make one thing that the next attach needs. If that fails, the attach makes it, and says why it cannot.
    fn prepare(&self) -> Preparation {
        let Some(paused) = &self.paused else { return Preparation::Done };
        match paused.prepare() {
            Ok(()) => self.preparation(),
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "preparing for the next pod");
                Preparation::Done
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
            Err(error) if may_pass(&error) => Err(error.into()),
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

    fn no_job() -> Job {
        Box::new(|_| ())
    }

    #[test]
    fn something_is_prepared_after_a_time_without_a_job() {
        let mut schedule = Schedule::default();
        assert!(schedule.begin(), "nothing is ahead");
        let answered = Instant::now();
        schedule.end(answered, Preparation::Pending);
        // However soon the thread is woken, it leaves the processor to the answer.
        assert!(matches!(schedule.next(answered), Next::WaitFor(PREPARE_AFTER)));
        let moment = Duration::from_nanos(1);
        let almost = answered + PREPARE_AFTER - moment;
        assert!(matches!(schedule.next(almost), Next::WaitFor(left) if left == moment));
        assert!(matches!(schedule.next(answered + PREPARE_AFTER), Next::Step(WorkerStep::Prepare)));
        assert!(!schedule.begin(), "it would wait for what is prepared");
        // The same again, until there is nothing to prepare.
        let prepared = answered + PREPARE_AFTER * 2;
        schedule.end(prepared, Preparation::Pending);
        assert!(matches!(schedule.next(prepared), Next::WaitFor(PREPARE_AFTER)));
        assert!(matches!(schedule.next(prepared + PREPARE_AFTER), Next::Step(WorkerStep::Prepare)));
        schedule.end(prepared + PREPARE_AFTER, Preparation::Done);
        assert!(matches!(schedule.next(prepared + PREPARE_AFTER * 9), Next::Wait));
    }

    #[test]
    fn nothing_is_prepared_between_the_jobs_of_a_burst() {
        let mut schedule = Schedule::default();
        let mut now = Instant::now();
        for _ in 0..9 {
            // On the thread that asks. However long it takes, the worker's thread does not wait for its end to prepare.
            assert!(schedule.begin(), "nothing is ahead");
            now += PREPARE_AFTER * 3;
            assert!(matches!(schedule.next(now), Next::Wait));
            schedule.end(now, Preparation::Pending);
            now += PREPARE_AFTER / 2;
            assert!(matches!(schedule.next(now), Next::WaitFor(_)));
            // On the worker's, also if it comes to it late.
            schedule.push(Priority::Normal, no_job());
            now += PREPARE_AFTER * 3;
            assert!(matches!(schedule.next(now), Next::Step(WorkerStep::Job(_))));
            schedule.end(now, Preparation::Pending);
            now += PREPARE_AFTER / 2;
            assert!(matches!(schedule.next(now), Next::WaitFor(_)));
        }
        assert!(matches!(schedule.next(now + PREPARE_AFTER), Next::Step(WorkerStep::Prepare)));
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
