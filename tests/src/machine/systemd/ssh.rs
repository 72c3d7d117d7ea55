//! The whole machine is captured by an operator who is logged in over SSH.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};

use super::{DOCUMENT, OWN, SERVICE, SystemdCase, SystemdMachine, WORLD, logged, shell, until};

pub(super) const CASES: [(&str, SystemdCase); 4] = [
    ("sshd, Envoy and a service run", start),
    ("what is not confirmed is taken off, though its SSH session was closed", not_confirmed),
    ("a session stays, and a new one confirms", confirmed),
    ("the machine is released and as before", release),
];

const LOG: &str = "journalctl -u envoy -o cat --no-pager";
const OPTIONS: [&str; 8] = [
    "-q",
    "-i",
    "/run/operator",
    "-o",
    "StrictHostKeyChecking=no",
    "-o",
    "UserKnownHostsFile=/dev/null",
    "root@10.66.0.2",
];
/// sshd of Debian, without PAM, which is not configured here.
const START: &str = r#"
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
ssh-keygen -q -t ed25519 -N '' -f /run/operator
mkdir -p /root/.ssh
cp /run/operator.pub /root/.ssh/authorized_keys
printf 'UsePAM no\nHostKey /etc/ssh/ssh_host_ed25519_key\n' > /etc/ssh/sshd_config
systemctl start ssh
id istio-proxy > /dev/null 2>&1 || useradd --system --user-group --no-create-home istio-proxy
systemd-run --quiet --unit=envoy -p User=istio-proxy -p Group=istio-proxy envoy -c /run/envoy.yaml --log-level warning --file-flush-interval-msec 1000
systemd-run --quiet --unit=served -p User=nobody python3 -m http.server 8080 --bind ::
"#;

fn start(machine: &mut SystemdMachine) -> Result<()> {
    shell("cp deploy/systemd/envoy.yaml /run/envoy.yaml; chmod 644 /run/envoy.yaml")?;
    shell(START)?;
    until("the services listen", || {
        let listening = shell("ss -Hltn")?;
        Ok(["22", "8080", "15001", "15006"]
            .iter()
            .all(|port| listening.contains(&format!(":{port} ")))
            .then_some(()))
    })?;
    let session = Session::open(machine)?;
    drop(session);
    machine.before = machine.state()?;
    Ok(())
}

/// The documented command, with so many seconds.
fn attach(seconds: u64) -> Result<String> {
    let line = DOCUMENT.lines().find(|line| line.contains("attach --machine") && line.contains("-b '*'"));
    let line = line.context("the document does not capture the whole machine")?;
    ensure!(line.contains("--confirm 60 "), "{line} is not confirmed");
    Ok(line.replace("--confirm 60 ", &format!("--confirm {seconds} ")))
}

fn not_confirmed(machine: &mut SystemdMachine) -> Result<()> {
    // What is done before it expires must take a small part of the time.
    let start = Instant::now();
    let mut other = Session::open(machine)?;
    ensure!(call()? == "world", "the machine calls the world");
    let seconds = 30 + 4 * start.elapsed().as_secs();
    let mut session = Session::open(machine)?;
    let read = super::connections(LOG)?.len();
    let said = session.run(&attach(seconds)?)?;
    ensure!(said.contains("attached"), "{said}");
    drop(session);
    ensure!(call()? == "world", "the machine calls the world");
    logged(LOG, read, "the machine calls", &[outbound()])?;
    ensure!(other.run("echo here")? == "here", "a session was cut");
    until("nothing is attached", || Ok(shell("ls /sys/fs/bpf")?.is_empty().then_some(())))?;
    direct(machine)?;
    ensure!(other.run("echo here")? == "here", "a session was cut");
    machine.restored("not confirmed")
}

fn confirmed(machine: &mut SystemdMachine) -> Result<()> {
    let read = super::connections(LOG)?.len();
    let mut session = Session::open(machine)?;
    let said = session.run(&attach(600)?)?;
    ensure!(said.contains("attached") && said.contains("22"), "{said}");
    let mut new = Session::open(machine)?;
    let said = new.run("intercept-agent confirm")?;
    ensure!(said.contains("confirmed"), "{said}");
    ensure!(session.run("echo here")? == "here", "the session was cut");
    ensure!(call()? == "world", "the machine calls the world");
    ensure!(called(machine)? == "machine\n", "the world calls the service");
    let lines = [outbound(), format!("inbound {} to {}:8080", WORLD[0], OWN[0])];
    logged(LOG, read, "the machine calls and is called", &lines).map(drop)
}

/// What Envoy logs of [`call`].
fn outbound() -> String {
    format!("outbound {} to {}:80", OWN[0], SERVICE[0])
}

fn release(machine: &mut SystemdMachine) -> Result<()> {
    let mut session = Session::open(machine)?;
    session.run("intercept-agent detach --machine")?;
    ensure!(session.run("echo here")? == "here", "the session was cut");
    direct(machine)?;
    machine.restored("released")?;
    shell("systemctl stop ssh envoy served").map(drop)
}

fn call() -> Result<String> {
    shell(&format!(
        "systemd-run --quiet --wait --pipe --collect -p User=nobody curl -sS -m 120 http://{}/",
        SERVICE[0]
    ))
}

fn called(machine: &SystemdMachine) -> Result<String> {
    machine.world_gets(&format!("http://{}:8080/etc/hostname", OWN[0]))
}

/// Nothing goes through Envoy.
fn direct(machine: &SystemdMachine) -> Result<()> {
    let before = super::connections(LOG)?;
    ensure!(call()? == "world", "the machine calls the world");
    ensure!(called(machine)? == "machine\n", "the world calls the service");
    // Envoy writes its log once a second.
    shell("sleep 2")?;
    ensure!(super::connections(LOG)? == before, "a connection went through Envoy");
    Ok(())
}

/// A shell of the operator, over SSH from outside.
struct Session {
    client: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Session {
    fn open(machine: &SystemdMachine) -> Result<Self> {
        let mut ssh = machine.neighbour.command("ssh")?;
        ssh.args(OPTIONS).arg("sh").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut client = ssh.spawn().context("starting ssh")?;
        let input = client.stdin.take().context("ssh has no input")?;
        let output = BufReader::new(client.stdout.take().context("ssh has no output")?);
        let mut session = Self { client, input, output };
        ensure!(session.run("echo here")? == "here", "no session");
        Ok(session)
    }

    /// Runs a command. Returns what it prints.
    fn run(&mut self, command: &str) -> Result<String> {
        writeln!(self.input, "{{ {command}; }} 2>&1; echo; echo :end").context("writing to a session")?;
        let mut lines: Vec<String> = Vec::new();
        loop {
            let mut line = String::new();
            let read = self.output.read_line(&mut line).context("reading from a session")?;
            ensure!(read > 0, "the session ended after {lines:?}");
            if line == ":end\n" {
                return Ok(lines.concat().trim().to_owned());
            }
            lines.push(line);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.client.kill());
        drop(self.client.wait());
    }
}
