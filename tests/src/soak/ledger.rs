//! What a run has seen: counts of what was right, and every finding as it happens.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    net::SocketAddr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::actor::{DialOutcome, Dialled, OriginalDst};

/// How many findings of one kind are kept in full; the rest is counted.
const KEPT: u64 = 10;
/// How many actions are remembered, to be shown beside what they may have caused.
const LATEST: usize = 8;

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A connection of a well-behaved pod failed although its proxy listened.
    Lost,
    /// A connection reached a server other than the pod's proxy.
    Bypassed,
    /// A proxy or client was told a wrong address.
    Misled,
    /// A request to the agent failed that nothing interfered with.
    Refused,
    /// The agent took too long.
    Slow,
    /// Memory or descriptors of the daemon grew.
    Grown,
    /// Something was left that had to be gone.
    Left,
    /// The soak itself could not go on.
    Harness,
}

/// Shared by all threads of a run.
#[derive(Debug)]
pub struct Ledger {
    started: Instant,
    stopped: AtomicBool,
    right: AtomicU64,
    without_proxy: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    counts: BTreeMap<Kind, u64>,
    findings: Vec<String>,
    actions: BTreeMap<&'static str, u64>,
    latest: VecDeque<(Duration, &'static str)>,
}

/// Which server a connection must reach.
#[derive(Debug, Clone, Copy)]
pub enum Expected {
    /// The pod's proxy, which is told the destination.
    SeenProxy(SocketAddr),
    /// This server, without redirection.
    Direct(&'static str, SocketAddr),
}

/// Whether the proxy listened all the while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeenProxy {
    /// It did.
    Listening,
    /// It was restarted: a connection may be refused or cut off, and nothing else.
    Restarted,
}

impl Ledger {
    /// An empty one; time counts from now.
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            stopped: AtomicBool::new(false),
            right: AtomicU64::new(0),
            without_proxy: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }

    /// Judges a connection by what both its ends saw.
    pub fn judge(&self, who: &str, expected: Expected, proxy: SeenProxy, dialled: &Dialled) {
        let (Expected::SeenProxy(to) | Expected::Direct(_, to)) = expected;
        let answer = match &dialled.outcome {
            DialOutcome::Answered(answer) => answer,
            DialOutcome::Refused | DialOutcome::Dropped(_) if proxy == SeenProxy::Restarted => {
                self.without_proxy.fetch_add(1, Ordering::Relaxed);
                return;
            }
            other => return self.find(Kind::Lost, &format_args!("{who}: {to}: {other:?}")),
        };
        match expected {
            Expected::SeenProxy(_) if answer.server != "proxy" => {
                self.find(Kind::Bypassed, &format_args!("{who}: {to}: reached {}", answer.server));
            }
            Expected::Direct(server, _) if answer.server != server => {
                self.find(Kind::Misled, &format_args!("{who}: {to}: reached {}", answer.server));
            }
            Expected::SeenProxy(_) if answer.original_dst != Some(OriginalDst::Addr(to)) => {
                self.find(Kind::Misled, &format_args!("{who}: {to}: told {:?}", answer.original_dst));
            }
            _ if [dialled.peername, dialled.peername_after] != [Some(to); 2] => {
                let names = (dialled.peername, dialled.peername_after);
                self.find(Kind::Misled, &format_args!("{who}: {to}: getpeername {names:?}"));
            }
            _ => self.right(1),
        }
    }

    /// Counts connections on which all was right.
    pub fn right(&self, count: u64) {
        self.right.fetch_add(count, Ordering::Relaxed);
    }

    /// Records what went wrong, and prints it.
    pub fn find(&self, kind: Kind, what: &dyn fmt::Display) {
        let mut state = self.state();
        let count = state.counts.entry(kind).or_default();
        *count += 1;
        if *count > KEPT {
            return;
        }
        let line = format!("{:.3} s: {kind:?}: {what}", self.started.elapsed().as_secs_f64());
        eprintln!("FOUND {line}");
        state.findings.push(line);
    }

    /// Counts an action, so that a report says what a run has done.
    pub fn act(&self, what: &'static str) {
        let mut state = self.state();
        *state.actions.entry(what).or_default() += 1;
        state.latest.push_back((self.started.elapsed(), what));
        if state.latest.len() > LATEST {
            state.latest.pop_front();
        }
    }

    /// Prints what is no finding by itself, with what was done just before.
    pub fn note(&self, what: &dyn fmt::Display) {
        let now = self.started.elapsed();
        let ago = |(at, what): &(Duration, &str)| format!("{what} {} ms ago", (now - *at).as_millis());
        let latest: Vec<_> = self.state().latest.iter().rev().map(ago).collect();
        println!("soak: {:.3} s: {what}; {}", now.as_secs_f64(), latest.join(", "));
    }

    /// Tells all threads to end.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Whether threads are to end.
    pub fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Sleeps in slices, so that a thread ends soon after [`Ledger::stop`].
    pub fn pause(&self, time: Duration) {
        let deadline = Instant::now() + time;
        while !self.stopped() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(Duration::from_millis(100)));
        }
    }

    /// How long the run has lasted.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// How many connections were right.
    pub fn connections(&self) -> u64 {
        self.right.load(Ordering::Relaxed)
    }

    /// How many findings there are of a kind.
    pub fn count(&self, kind: Kind) -> u64 {
        self.state().counts.get(&kind).copied().unwrap_or(0)
    }

    /// The findings, the first of each kind in full.
    pub fn findings(&self) -> Vec<String> {
        self.state().findings.clone()
    }

    /// One line on all counts.
    pub fn summary(&self) -> String {
        let state = self.state();
        let count = |kind| state.counts.get(&kind).copied().unwrap_or(0);
        let actions: Vec<_> = state.actions.iter().map(|(what, count)| format!("{what} {count}")).collect();
        format!(
            "{} connections right, {} while a proxy restarted; {} lost, {} bypassed, {} misled, {} other findings; {}",
            self.connections(),
            self.without_proxy.load(Ordering::Relaxed),
            count(Kind::Lost),
            count(Kind::Bypassed),
            count(Kind::Misled),
            state
                .counts
                .iter()
                .filter(|(kind, _)| **kind > Kind::Misled)
                .map(|(_, count)| count)
                .sum::<u64>(),
            actions.join(", ")
        )
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Ledger {
    fn default() -> Self {
        Self::new()
    }
}
