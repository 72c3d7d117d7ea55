//! What happens to the agent itself: its daemon and commands are killed, the API is cut off, policies are replaced.

use std::{process::Stdio, time::Duration};

use anyhow::{Result, ensure};
use intercept_agent::facade::daemon::PodState;

use super::{
    dice::Dice,
    ledger::{Kind, Ledger},
    node::{ApiPod, EXCLUDED, SoakNode},
    steady::SteadyPod,
};
use crate::{agent::finish, daemon::get, testbed::Sandbox};

/// Options of the well-behaved pods that are not the API's.
pub const OPTIONS: [&str; 6] = ["-i", "*", "-b", "*", "-u", "1337"];
/// The well-behaved pod that the folder names.
pub const FILE: &str = "steady";

/// A port that no other list has.
const MARK: &str = "19999";

/// The well-behaved pods, one for each way of capture.
#[derive(Debug)]
pub struct Steady<'a> {
    /// Named by a file.
    pub folder: &'a SteadyPod,
    /// Told of by the API and the plugin.
    pub api: &'a SteadyPod,
    /// Attached by a command.
    pub command: &'a SteadyPod,
    /// The object of the second.
    pub object: ApiPod,
}

impl Steady<'_> {
    /// Captures all three.
    pub fn capture(&self, node: &SoakNode<'_>) -> Result<()> {
        node.daemon().put(FILE, self.folder.pod(), &OPTIONS)?;
        node.daemon().wait_for(FILE, PodState::Captured)?;
        node.tell("ADDED", &self.object);
        node.call_until_done("ADD", &self.object, self.api.pod())?.map_err(anyhow::Error::msg)?;
        node.agent().attach(self.command.pod(), &OPTIONS)?;
        Ok(())
    }

    /// Replaces the options of all three by the first ones.
    pub fn restore(&mut self, node: &SoakNode<'_>) -> Result<()> {
        self.object.annotate(EXCLUDED, "15020");
        node.tell("MODIFIED", &self.object);
        node.daemon().put(FILE, self.folder.pod(), &OPTIONS)?;
        node.agent().attach(self.command.pod(), &OPTIONS)?;
        Ok(())
    }

    /// Has the daemon do once what it does now and then, so that it has open what it keeps open.
    pub fn exercise(&self, node: &SoakNode<'_>) -> Result<()> {
        let pod = self.folder.pod();
        for (options, named) in [([&OPTIONS[..], &["-o", MARK]].concat(), true), (OPTIONS.to_vec(), false)] {
            node.daemon().put(FILE, pod, &options)?;
            node.daemon()
                .wait("the options are replaced", |_| node.mentions(pod, MARK).is_ok_and(|is| is == named))?;
        }
        let fresh = Sandbox::new("exercised")?;
        node.daemon().put("exercised", &fresh, &OPTIONS)?;
        node.daemon().wait_for("exercised", PodState::Captured)?;
        node.daemon().remove("exercised")?;
        node.daemon().wait("it is released", |daemon| {
            daemon.report("exercised").is_ok_and(|report| report.is_none())
        })?;
        let (status, text) = get(node.metrics(), "/metrics");
        ensure!(status == 200, "/metrics: {text}");
        Ok(())
    }

    fn replace(&mut self, node: &SoakNode<'_>, dice: &mut Dice) -> Result<()> {
        let port = dice.number(20_000..30_000).to_string();
        let options = [&OPTIONS[..], &["-o", &port]].concat();
        match dice.number(0..3) {
            0 => node.daemon().put(FILE, self.folder.pod(), &options)?,
            1 => {
                self.object.annotate(EXCLUDED, &port);
                node.tell("MODIFIED", &self.object);
            }
            _ => drop(node.agent().attach(self.command.pod(), &options)?),
        }
        Ok(())
    }
}

/// Disturbs until the run ends. The daemon is killed in the first half only, so that growth shows in the second.
pub fn disturb(
    node: &SoakNode<'_>,
    steady: &mut Steady<'_>,
    mut dice: Dice,
    half: Duration,
    ledger: &Ledger,
) -> Result<()> {
    while !ledger.stopped() {
        let may_end = ledger.elapsed() < half;
        match dice.number(0..12) {
            0..2 if may_end => {
                ledger.act("daemons killed");
                node.kill_daemon(dice.millis(0..1500))?;
            }
            2 if may_end => {
                ledger.act("daemons terminated");
                node.terminate_daemon(dice.millis(0..1500))?;
            }
            3 => {
                ledger.act("API cuts");
                node.cut_api()?;
            }
            4 | 5 => {
                ledger.act("replacements");
                steady.replace(node, &mut dice)?;
            }
            6 | 7 => {
                ledger.act("proxy restarts");
                dice.one_of(&[steady.folder, steady.api, steady.command])
                    .restart_proxy(dice.millis(0..500))?;
            }
            8 => read(node, &mut dice, ledger)?,
            _ => kill_commands(node, &mut dice, ledger)?,
        }
        ledger.pause(dice.millis(50..1000));
    }
    Ok(())
}

/// Commands that only read must succeed whatever others do.
fn read(node: &SoakNode<'_>, dice: &mut Dice, ledger: &Ledger) -> Result<()> {
    ledger.act("status and check");
    let mut command = node.agent().command(dice.one_of(&["status", "status", "check"]));
    let output = finish(&mut command)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        ledger.find(Kind::Refused, &format_args!("{command:?}: {}: {said}", output.status));
    }
    Ok(())
}

/// Kills an attach, a replacement or a detach at some moment; then the pod is attached and detached, or vanishes as it is.
fn kill_commands(node: &SoakNode<'_>, dice: &mut Dice, ledger: &Ledger) -> Result<()> {
    let place = Sandbox::new("killed")?;
    for _ in 0..dice.number(1..4) {
        ledger.act("commands killed");
        let port = dice.number(1..60_000).to_string();
        let (subcommand, more) = match dice.number(0..4) {
            0 => ("detach", vec![]),
            _ => ("attach", [&OPTIONS[..], &["-o", &port]].concat()),
        };
        let mut command = node.agent().for_pod(subcommand, &place, &more);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(dice.millis(0..80));
        child.kill()?;
        child.wait()?;
    }
    if dice.once_in(2) {
        for (subcommand, options) in [("attach", &OPTIONS[..]), ("detach", &[])] {
            let output = finish(&mut node.agent().for_pod(subcommand, &place, options))?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr);
                ledger.find(Kind::Refused, &format_args!("{subcommand} after kills: {said}"));
            }
        }
    }
    Ok(())
}
