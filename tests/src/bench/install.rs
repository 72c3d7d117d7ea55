//! How long it takes to put one more pod in force, and to take it out.

use std::time::Duration;

use anyhow::Result;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::capture::Capture;
use super::crew::Crew;
use super::interrupt;
use super::mode::{Lists, Mode};
use crate::testbed::Place;

/// One pod put in force and taken out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Installed {
    /// Together with the others of the round.
    pub round: usize,
    /// By what.
    pub mode: Mode,
    /// With which flags.
    pub lists: Lists,
    /// From the start of the first program to the end of the last.
    pub install: Duration,
    /// The same for taking it out.
    pub remove: Duration,
}

/// Puts fresh pods in force in random order. Another pod stays in force meanwhile, as on a node that is in use.
pub fn run(
    modes: &[Mode],
    rounds: usize,
    crew: &Crew,
    random: &mut StdRng,
    mut after_each: impl FnMut(),
) -> Result<Vec<Installed>> {
    let mut cases: Vec<(Mode, Lists)> = Vec::new();
    for &mode in modes.iter().filter(|mode| mode.captures()) {
        cases.extend([Lists::Injected, Lists::Cidrs(10_000)].map(|lists| (mode, lists)));
    }
    let neighbours = cases.iter().map(|_| Place::new("neighbour")).collect::<Result<Vec<_>>>()?;
    let mut captures = Vec::new();
    for (&(mode, _), place) in cases.iter().zip(&neighbours).step_by(2) {
        let mut capture = Capture::prepare(mode, &Lists::Injected.options(), place, crew)?;
        capture.install()?;
        captures.push(capture);
    }
    let mut installed = Vec::new();
    for round in 0..rounds {
        cases.shuffle(random);
        for &(mode, lists) in &cases {
            interrupt::check()?;
            let place = Place::new(&mode.to_string())?;
            let mut capture = Capture::prepare(mode, &lists.options(), &place, crew)?;
            let install = capture.install()?;
            let remove = capture.remove()?;
            installed.push(Installed { round, mode, lists, install, remove });
            after_each();
        }
    }
    Ok(installed)
}
