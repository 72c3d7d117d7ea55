//! How far the benchmark is, on standard error.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How often a log gets a line, if it is no terminal.
const LOG_EVERY: Duration = Duration::from_secs(15);

/// Counts planned seconds.
#[derive(Debug)]
pub struct Progress {
    planned: f64,
    done: f64,
    begun: Instant,
    said: Option<Instant>,
}

impl Progress {
    /// Of work that should take so many seconds.
    pub fn new(planned: f64) -> Self {
        Self { planned, done: 0.0, begun: Instant::now(), said: None }
    }

    /// What is being done now.
    pub fn at(&mut self, what: &str) {
        let terminal = std::io::stderr().is_terminal();
        if !terminal && self.said.is_some_and(|said| said.elapsed() < LOG_EVERY) {
            return;
        }
        self.said = Some(Instant::now());
        let part = (self.done / self.planned).min(1.0);
        // The plan is a guess; what it took so far corrects it.
        let pace = if self.done > 5.0 { self.begun.elapsed().as_secs_f64() / self.done } else { 1.0 };
        let left = ((self.planned - self.done) * pace).max(0.0);
        let line = format!(
            "{:3.0} %  {:2.0} min {:02.0} s left  {what}",
            part * 100.0,
            (left / 60.0).floor(),
            left % 60.0
        );
        let mut error = std::io::stderr().lock();
        // Nobody is left to tell if this fails.
        drop(if terminal { write!(error, "\r\x1b[K{line}") } else { writeln!(error, "{line}") });
        drop(error.flush());
    }

    /// So many of the planned seconds are over.
    pub fn advance(&mut self, seconds: f64) {
        self.done += seconds;
    }

    /// The end.
    pub fn finish(&self) {
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
        eprintln!("measured for {} s", self.begun.elapsed().as_secs());
    }
}
