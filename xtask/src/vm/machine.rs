//! One run of the emulator.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::run;

/// How much of the log is shown when a machine fails before it runs anything.
const TAIL: usize = 40;

/// Kills the emulator whatever happens.
struct Emulator(Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        // Fails if it has ended, which is the usual case.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Boots, shows what the command prints, and returns how many seconds it took if its exit status is 0.
pub(super) fn run(kernel: &Path, initramfs: &Path, log: &Path, limit: Duration) -> Result<u64> {
    let start = Instant::now();
    let mut file = File::create(log).with_context(|| format!("making {}", log.display()))?;
    let mut emulator = Emulator(command(kernel, initramfs)?.spawn().context("starting qemu-system-x86_64")?);
    let console = emulator.0.stdout.take().context("the emulator has no output")?;

    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned()).is_err() {
                break;
            }
        }
    });

    let mut begun = false;
    let mut recent: Vec<String> = Vec::new();
    let problem = loop {
        let line = match lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => break format!("not done after {} s", limit.as_secs()),
            Err(RecvTimeoutError::Disconnected) => break "it stopped without an exit status".to_owned(),
        };
        writeln!(file, "{line}").with_context(|| format!("writing {}", log.display()))?;
        match line.strip_prefix("xtask: ") {
            Some("begin") => begun = true,
            Some("status 0") => return Ok(start.elapsed().as_secs()),
            Some(status) => break status.to_owned(),
            None if begun => println!("  {line}"),
            None => recent.push(line),
        }
    };
    if !begun {
        for line in recent.iter().skip(recent.len().saturating_sub(TAIL)) {
            eprintln!("  {line}");
        }
    }
    bail!("running in a virtual machine: {problem}; its log is {}", log.display())
}

fn command(kernel: &Path, initramfs: &Path) -> Result<Command> {
    let program = run::which("qemu-system-x86_64").context("there is no qemu-system-x86_64")?;
    let mut qemu = Command::new(program);
    qemu.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "1024"]);
    qemu.args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    // A panic ends the emulator, because of -no-reboot.
    qemu.args(["-append", "console=ttyS0 panic=-1 loglevel=4"]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped());
    Ok(qemu)
}
