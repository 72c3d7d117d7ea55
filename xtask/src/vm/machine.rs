//! One run of the emulator.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};

use super::kernel::Kernel;
use crate::{architecture::Architecture, run};

/// How much of the log is shown when a machine fails before it runs anything.
const TAIL: usize = 40;

/// A command that ran in the machine.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct VmStep {
    /// What the script calls it.
    pub(super) name: String,
    /// Its exit status; none if the machine stopped before.
    pub(super) status: Option<u8>,
    /// The last line that it printed.
    pub(super) last: String,
}

/// Kills the emulator whatever happens.
struct Emulator(Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        // Fails if it has ended, which is the usual case.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What a machine boots.
pub(super) struct Boot<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) initramfs: &'a Path,
    /// Parameters of the kernel.
    pub(super) parameters: &'a str,
    /// A disk, /dev/vda.
    pub(super) disk: Option<&'a Path>,
}

/// Boots, shows what the steps print, and returns them. Ends if nothing is printed for a time: how long all of it takes depends
/// on the machine and what else it does.
pub(super) fn run(what: &Boot<'_>, log: &Path, limit: Duration) -> Result<Vec<VmStep>> {
    let mut file = File::create(log).with_context(|| format!("making {}", log.display()))?;
    let (_emulator, lines) = boot(what)?;
    let mut transcript = Transcript::default();
    let problem = loop {
        let line = match lines.recv_timeout(limit) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => break format!("no output for {} s", limit.as_secs()),
            Err(RecvTimeoutError::Disconnected) => break "it stopped before it was done".to_owned(),
        };
        writeln!(file, "{line}").with_context(|| format!("writing {}", log.display()))?;
        match transcript.read(line) {
            Read::Done => return Ok(transcript.steps),
            Read::Printed(line) => println!("  {line}"),
            Read::Other => {}
        }
    };
    for line in transcript.before.iter().skip(transcript.before.len().saturating_sub(TAIL)) {
        eprintln!("  {line}");
    }
    bail!("running in a virtual machine: {problem}; its log is {}", log.display())
}

/// Starts the emulator; what comes from the console comes line by line.
fn boot(what: &Boot<'_>) -> Result<(Emulator, Receiver<String>)> {
    let mut command = command(what)?;
    let mut emulator = Emulator(command.spawn().with_context(|| format!("starting {command:?}"))?);
    let console = emulator.0.stdout.take().context("the emulator has no output")?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned()).is_err() {
                break;
            }
        }
    });
    Ok((emulator, lines))
}

fn command(boot: &Boot<'_>) -> Result<Command> {
    let Boot { kernel, initramfs, parameters, disk } = boot;
    // Of arm64 a processor of servers; "max" has features that take long to emulate. On a busy machine x86's timer seems
    // broken to the kernel, which panics.
    let (program, machine, console) = match kernel.architecture {
        Architecture::Amd64 => {
            ("qemu-system-x86_64", ["-machine", "pc", "-cpu", "max"], "ttyS0 no_timer_check")
        }
        Architecture::Arm64 => {
            ("qemu-system-aarch64", ["-machine", "virt", "-cpu", "neoverse-n1"], "ttyAMA0")
        }
    };
    let path = run::which(program).with_context(|| format!("there is no {program}"))?;
    let mut qemu = Command::new(path);
    qemu.args(machine).args([
        "-accel",
        "tcg",
        "-smp",
        "2",
        "-m",
        if disk.is_some() { "2048" } else { "1024" },
    ]);
    qemu.args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initramfs);
    if let Some(disk) = disk {
        qemu.arg("-drive").arg(format!("file={},if=virtio,format=raw,cache=unsafe", disk.display()));
    }
    // A panic ends the emulator, because of -no-reboot.
    qemu.arg("-append").arg(format!("console={console} panic=-1 loglevel=4 {parameters}"));
    qemu.stdin(Stdio::null()).stdout(Stdio::piped());
    Ok(qemu)
}

/// What the console says, as far as it was read.
#[derive(Default)]
struct Transcript {
    steps: Vec<VmStep>,
    /// Lines before the first step.
    before: Vec<String>,
}

/// What a line of the console is.
#[derive(PartialEq, Eq, Debug)]
enum Read {
    /// A step printed it.
    Printed(String),
    /// The machine is done.
    Done,
    /// Anything else.
    Other,
}

impl Transcript {
    fn read(&mut self, line: String) -> Read {
        let Some(message) = line.strip_prefix("xtask: ") else { return self.text(line) };
        let mut words = message.split(' ');
        match (words.next(), words.next(), words.next()) {
            (Some("begin"), Some(name), None) => {
                self.steps.push(VmStep { name: name.to_owned(), ..VmStep::default() });
            }
            (Some("end"), Some(_), Some(status)) => {
                if let Some(step) = self.steps.last_mut() {
                    step.status = status.parse().ok();
                }
            }
            (Some("done"), None, None) => return Read::Done,
            _ => return self.text(line),
        }
        Read::Other
    }

    fn text(&mut self, line: String) -> Read {
        let Some(step) = self.steps.last_mut() else {
            self.before.push(line);
            return Read::Other;
        };
        if !line.trim().is_empty() {
            step.last.clone_from(&line);
        }
        Read::Printed(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_from_the_console() {
        let mut transcript = Transcript::default();
        let lines = [
            ("Booting", Read::Other),
            ("xtask: begin check", Read::Other),
            ("ok      kernel", Read::Printed("ok      kernel".to_owned())),
            ("", Read::Printed(String::new())),
            ("xtask: end check 0", Read::Other),
            ("xtask: begin demo", Read::Other),
            ("xtask: done", Read::Done),
        ];
        for (line, expected) in lines {
            assert_eq!(transcript.read(line.to_owned()), expected, "{line}");
        }
        let step = |name: &str, status, last: &str| VmStep { name: name.into(), status, last: last.into() };
        assert_eq!(transcript.steps, [step("check", Some(0), "ok      kernel"), step("demo", None, "")]);
        assert_eq!(transcript.before, ["Booting"]);
    }
}
