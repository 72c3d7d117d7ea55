//! How long a plain pod's CNI ADD takes meanwhile, as its runtime sees it.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::process::setpriority_process;

use super::{
    PRIORITY,
    dice::Dice,
    ledger::{Kind, Ledger},
    node::SoakNode,
};
use crate::testbed::Sandbox;

/// What another pod's ADD may take at the 99th percentile.
pub const LIMIT: Duration = Duration::from_millis(50);

/// Times of ADD.
#[derive(Debug, Default)]
pub struct Admissions {
    adds: Mutex<Vec<Duration>>,
    /// The plugin's own start, without a daemon: what a busy machine adds to each.
    starts: Mutex<Vec<Duration>>,
}

/// Some percentiles.
#[derive(Debug, Clone, Copy)]
pub struct Percentiles {
    /// How many were measured.
    pub count: usize,
    /// The median.
    pub p50: Duration,
    /// The 99th.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
}

impl Admissions {
    /// Adds and deletes pods until the run ends.
    pub fn measure(&self, node: &SoakNode<'_>, mut dice: Dice, ledger: &Ledger) -> Result<()> {
        // Of this thread alone, and of the plugin that it starts.
        setpriority_process(None, PRIORITY).context("raising the runtime's priority")?;
        let mut number = 0_u32;
        while !ledger.stopped() {
            number += 1;
            let place = Sandbox::new("admitted")?;
            let pod =
                node.api_pod(&format!("admitted-{number}"), format!("00000000-0000-4000-8002-{number:012}"))?;
            node.tell("ADDED", &pod);
            {
                // What restarts the daemon waits for these.
                let _daemon = node.daemon();
                let started = Instant::now();
                drop(node.call("VERSION", &pod, &place, "10.66.0.2/24")?);
                push(&self.starts, started.elapsed());
                let started = Instant::now();
                match node.call("ADD", &pod, &place, "10.66.0.2/24")? {
                    Ok(()) => {
                        let took = started.elapsed();
                        push(&self.adds, took);
                        if took > LIMIT {
                            ledger.note(&format_args!("ADD of a plain pod took {took:.1?}"));
                        }
                    }
                    Err(said) => ledger.find(Kind::Refused, &format_args!("ADD of a plain pod: {said}")),
                }
            }
            if let Err(said) = node.call_until_done("DEL", &pod, &place)? {
                ledger.find(Kind::Refused, &format_args!("DEL of a plain pod: {said}"));
            }
            node.tell("DELETED", &pod);
            ledger.pause(dice.millis(0..200));
        }
        Ok(())
    }

    /// Of ADD; none if none was made.
    pub fn adds(&self) -> Option<Percentiles> {
        Percentiles::of(&copy(&self.adds))
    }

    /// Of the plugin's start.
    pub fn starts(&self) -> Option<Percentiles> {
        Percentiles::of(&copy(&self.starts))
    }
}

impl Percentiles {
    /// Of some times; none of none.
    pub fn of(times: &[Duration]) -> Option<Self> {
        let mut times = times.to_vec();
        times.sort_unstable();
        let at = |percent: usize| times.get((times.len() * percent / 100).min(times.len() - 1)).copied();
        let max = *times.last()?;
        Some(Self { count: times.len(), p50: at(50)?, p99: at(99)?, max })
    }
}

impl std::fmt::Display for Percentiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        let Self { count, p50, p99, max } = *self;
        write!(f, "p50 {:.1} p99 {:.1} max {:.1} ms of {count}", millis(p50), millis(p99), millis(max))
    }
}

fn copy(times: &Mutex<Vec<Duration>>) -> Vec<Duration> {
    times.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn push(times: &Mutex<Vec<Duration>>, time: Duration) {
    times.lock().unwrap_or_else(PoisonError::into_inner).push(time);
}
