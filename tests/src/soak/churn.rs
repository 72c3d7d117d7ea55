//! Pods that come, change and go, by every way there is: a file of the folder, the API and the plugin, a command.

use std::time::{Duration, Instant};

use anyhow::Result;
use intercept_agent::facade::daemon::PodState;
use rustix::process::{Pid, Signal, kill_process};

use super::{
    dice::Dice,
    ledger::{Kind, Ledger},
    node::{ApiPod, EXCLUDED, SoakNode},
    steady::{SteadyPod, World},
};
use crate::agent::finish;

/// How many there are at most.
const ALIVE: usize = 10;
/// Options of pods that are not the API's.
const OPTIONS: [&str; 6] = ["-i", "*", "-b", "*", "-u", "1337"];
/// How soon a pod of the folder must be captured.
const SOON: Duration = Duration::from_secs(30);

/// One pod that will go again.
struct Passing {
    name: String,
    source: Source,
    pod: SteadyPod,
}

enum Source {
    Folder,
    Api(ApiPod),
    Command,
}

/// How a pod goes.
#[derive(Clone, Copy)]
enum PodEnd {
    /// As its source says it.
    Announced,
    /// Its processes and namespace go first, and its source is told afterwards.
    Vanished,
    /// The same, and its interface went before.
    Unplugged,
}

/// Makes pods, changes and ends them until the run ends. Several threads may; each has its own number.
pub fn churn(node: &SoakNode<'_>, world: &World, thread: u32, mut dice: Dice, ledger: &Ledger) -> Result<()> {
    let mut alive: Vec<Passing> = Vec::new();
    let mut made = thread * 1_000_000;
    while !ledger.stopped() {
        let act = dice.number(0..10);
        if alive.is_empty() || (act < 5 && alive.len() < ALIVE) {
            made += 1;
            let passing = Passing::new(node, world, &mut dice, made)?;
            passing.begin(node, ledger)?;
            if passing.is_captured(node, ledger)? {
                passing.pod.connect(world, &mut dice, ledger)?;
            }
            alive.push(passing);
        } else if act < 8 || alive.len() >= ALIVE {
            let index = dice.number(0..u32::try_from(alive.len())?);
            alive.swap_remove(usize::try_from(index)?).end(node, &mut dice, ledger)?;
        } else {
            let index = dice.number(0..u32::try_from(alive.len())?);
            alive[usize::try_from(index)?].change(node, &mut dice, ledger)?;
        }
        ledger.pause(dice.millis(0..300));
    }
    for passing in alive {
        passing.end(node, &mut dice, ledger)?;
    }
    Ok(())
}

impl Passing {
    fn new(node: &SoakNode<'_>, world: &World, dice: &mut Dice, number: u32) -> Result<Self> {
        let name = format!("passing-{number}");
        let source = match dice.number(0..4) {
            0 => Source::Folder,
            1 => Source::Command,
            _ => {
                let api = node.api_pod(&name, format!("00000000-0000-4000-8001-{number:012}"))?;
                Source::Api(api)
            }
        };
        let api = match &source {
            Source::Api(api) => Some(api),
            Source::Folder | Source::Command => None,
        };
        let pod = SteadyPod::new(&name, world, api)?;
        Ok(Self { name, source, pod })
    }

    fn begin(&self, node: &SoakNode<'_>, ledger: &Ledger) -> Result<()> {
        match &self.source {
            Source::Folder => {
                ledger.act("files put");
                node.daemon().put(&self.name, self.pod.pod(), &OPTIONS)?;
            }
            Source::Api(api) => {
                ledger.act("plugin ADDs");
                node.tell("ADDED", api);
                if let Err(said) = node.call_until_done("ADD", api, self.pod.pod())? {
                    ledger.find(Kind::Refused, &format_args!("ADD of {}: {said}", self.name));
                }
            }
            Source::Command => self.attach(node, &[], ledger)?,
        }
        Ok(())
    }

    fn attach(&self, node: &SoakNode<'_>, more: &[&str], ledger: &Ledger) -> Result<()> {
        ledger.act("attaches");
        let output = finish(&mut node.agent().for_pod("attach", self.pod.pod(), &[&OPTIONS, more].concat()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            ledger.find(Kind::Refused, &format_args!("attach of {}: {said}", self.name));
        }
        Ok(())
    }

    /// Waits for what the daemon does by itself; a finding if it does not.
    fn is_captured(&self, node: &SoakNode<'_>, ledger: &Ledger) -> Result<bool> {
        if !matches!(self.source, Source::Folder) {
            return Ok(true);
        }
        let deadline = Instant::now() + SOON;
        loop {
            if let Ok(Some(report)) = node.daemon().report(&self.name)
                && report.state == PodState::Captured
            {
                return Ok(true);
            }
            if ledger.stopped() {
                return Ok(false);
            }
            if Instant::now() > deadline {
                let report = node.report_of(&format!("file/{}.json", self.name));
                ledger.find(Kind::Refused, &format_args!("{} is not captured: {report}", self.name));
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn change(&mut self, node: &SoakNode<'_>, dice: &mut Dice, ledger: &Ledger) -> Result<()> {
        ledger.act("replacements");
        let port = dice.number(20_000..30_000).to_string();
        match &mut self.source {
            Source::Folder => {
                node.daemon().put(&self.name, self.pod.pod(), &[&OPTIONS[..], &["-o", &port]].concat())?;
            }
            Source::Api(api) => {
                api.annotate(EXCLUDED, &port);
                node.tell("MODIFIED", api);
            }
            Source::Command => self.attach(node, &["-o", &port], ledger)?,
        }
        Ok(())
    }

    fn end(self, node: &SoakNode<'_>, dice: &mut Dice, ledger: &Ledger) -> Result<()> {
        let Self { name, source, pod } = self;
        match dice.one_of(&[PodEnd::Announced, PodEnd::Announced, PodEnd::Vanished, PodEnd::Unplugged]) {
            PodEnd::Announced => {
                ledger.act("pods ended");
                source.forget(node, &name, Some(&pod), ledger)
            }
            end => {
                ledger.act("pods vanished");
                if matches!(end, PodEnd::Unplugged) {
                    let mut ip = pod.pod().command("ip")?;
                    finish(ip.args(["link", "delete", "eth0"]))?;
                }
                if let Some(pid) = i32::try_from(pod.pid()).ok().and_then(Pid::from_raw) {
                    kill_process(pid, Signal::KILL)?;
                }
                drop(pod);
                ledger.pause(dice.millis(0..1500));
                source.forget(node, &name, None, ledger)
            }
        }
    }
}

impl Source {
    /// Takes the pod's claim away.
    fn forget(self, node: &SoakNode<'_>, name: &str, pod: Option<&SteadyPod>, ledger: &Ledger) -> Result<()> {
        match self {
            Self::Folder => node.daemon().remove(name)?,
            Self::Api(api) => {
                if let Some(pod) = pod
                    && let Err(said) = node.call_until_done("DEL", &api, pod.pod())?
                {
                    ledger.find(Kind::Refused, &format_args!("DEL of {name}: {said}"));
                }
                node.tell("DELETED", &api);
            }
            Self::Command => {
                if let Some(pod) = pod {
                    node.agent().detach(pod.pod())?;
                }
            }
        }
        Ok(())
    }
}
