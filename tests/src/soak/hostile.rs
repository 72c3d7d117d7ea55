//! Pods, and users of the node, that do what hurts. None of it may be noticed by any other pod.

pub mod process;

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    os::unix::fs::{chown, symlink},
    path::Path,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;

use self::process::{HostileProcess, Program};
use super::{
    dice::Dice,
    ledger::{Kind, Ledger},
    node::{EXCLUDED, SoakNode},
    steady::World,
};
use crate::{
    actor::{Actor, Bind, Listen, Transport},
    agent::finish,
    testbed::{Ids, Pod, Sandbox},
};

/// Options of hostile pods.
const OPTIONS: [&str; 6] = ["-i", "*", "-b", "*", "-u", "1337"];

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Mirror,
    AllPorts,
    ManyPorts,
    Routes,
    Interfaces,
    Descriptors,
    Fuse,
    HalfRequests,
    UserNamespaces,
    Nested,
    ManyConnections,
    HalfOpen,
    Files,
    Annotations,
}

const ACTS: [Act; 14] = [
    Act::Mirror,
    Act::AllPorts,
    Act::ManyPorts,
    Act::Routes,
    Act::Interfaces,
    Act::Descriptors,
    Act::Fuse,
    Act::HalfRequests,
    Act::UserNamespaces,
    Act::Nested,
    Act::ManyConnections,
    Act::HalfOpen,
    Act::Files,
    Act::Annotations,
];

/// One after the other until the run ends.
struct Hostile<'a, 'b> {
    node: &'a SoakNode<'b>,
    world: &'a World,
    ledger: &'a Ledger,
    dice: Dice,
    /// The UID of a well-behaved pod.
    victim: &'a str,
    name: String,
    uid: String,
}

/// Does harm until the run ends. Several threads may; each has its own number.
pub fn harm(
    node: &SoakNode<'_>,
    world: &World,
    thread: u32,
    mut dice: Dice,
    victim: &str,
    ledger: &Ledger,
) -> Result<()> {
    let mut number = 0_u32;
    let mut acts = Vec::new();
    while !ledger.stopped() {
        number += 1;
        if acts.is_empty() {
            // Each comes before one comes again.
            acts = ACTS.to_vec();
        }
        let act = acts.swap_remove(usize::try_from(dice.number(0..u32::try_from(acts.len())?))?);
        let seed = u64::from(dice.number(0..u32::MAX));
        let mut hostile = Hostile {
            node,
            world,
            ledger,
            dice: Dice::new(seed, 0),
            victim,
            name: format!("hostile-{thread}-{number}"),
            uid: format!("00000000-0000-4000-8{:03}-{number:012}", 100 + thread),
        };
        hostile.perform(act).with_context(|| format!("{act:?}"))?;
        ledger.pause(dice.millis(0..500));
    }
    Ok(())
}

impl Hostile<'_, '_> {
    fn perform(&mut self, act: Act) -> Result<()> {
        match act {
            Act::Mirror => self.mirror(),
            Act::AllPorts => self.by_file("ranges of all ports", &["-o", "1:65535", "-d", "2:65534"]),
            Act::ManyPorts => {
                let ports: Vec<_> = (0..5000).map(|n| (2 * n + 1).to_string()).collect();
                self.by_file("lists beyond the budget", &["-o", &ports.join(",")])
            }
            Act::Routes => self.routes(),
            Act::Interfaces => self.interfaces(),
            Act::Descriptors => self.process("queues of descriptors", Program::Descriptors, &[]),
            Act::Fuse => self.process("silent files", Program::Fuse, &["-u", "proxy-user", "--redirect-dns"]),
            Act::HalfRequests => self.half_requests(),
            Act::UserNamespaces => self.user_namespaces(),
            Act::Nested => self.nested(),
            Act::ManyConnections => self.many_connections(),
            Act::HalfOpen => self.process("half-open connections", Program::HalfOpen, &[]),
            Act::Files => self.files(),
            Act::Annotations => self.annotations(),
        }
    }

    fn wait(&mut self) {
        let time = self.dice.millis(500..4000);
        self.ledger.pause(time);
    }

    /// A pod that a file names, for a while.
    fn by_file(&mut self, what: &'static str, more: &[&str]) -> Result<()> {
        self.ledger.act(what);
        let pod = self.world.pod(&self.name)?;
        self.claimed(&pod, more, |_| Ok(()))
    }

    fn claimed(
        &mut self,
        pod: &Pod,
        more: &[&str],
        then: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        self.node.daemon().put(&self.name, pod, &[&OPTIONS[..], more].concat())?;
        self.wait();
        let result = then(self);
        self.node.daemon().remove(&self.name)?;
        result
    }

    /// Another pod's object that names a well-behaved one as its static pod.
    fn mirror(&mut self) -> Result<()> {
        self.ledger.act("mirror annotations");
        let mut evil = self.node.api_pod(&self.name, self.uid.clone())?;
        evil.annotate("kubernetes.io/config.mirror", self.victim);
        evil.annotate(EXCLUDED, "1:65535");
        evil.set_metadata("namespace", json!("evil"));
        let owner =
            json!([{ "apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "n", "controller": true }]);
        evil.set_metadata("ownerReferences", owner);
        self.node.tell("ADDED", &evil);
        self.wait();
        evil.annotate(EXCLUDED, "1:1000");
        self.node.tell("MODIFIED", &evil);
        self.wait();
        self.node.tell("DELETED", &evil);
        Ok(())
    }

    /// More routes than are read, which come and go.
    fn routes(&mut self) -> Result<()> {
        self.ledger.act("floods of routes");
        let pod = self.world.pod(&self.name)?;
        let flood = match self.dice.once_in(2) {
            true => 12_000,
            false => 40_000,
        };
        batch(&pod, (0..flood).map(|n| route("add", n)))?;
        self.claimed(&pod, &[], |this| {
            for _ in 0..this.dice.number(1..6) {
                batch(&pod, (0..2000).map(|n| route("delete", n)))?;
                batch(&pod, (0..2000).map(|n| route("add", n)))?;
            }
            Ok(())
        })
    }

    fn interfaces(&mut self) -> Result<()> {
        self.ledger.act("floods of interfaces");
        let pod = self.world.pod(&self.name)?;
        self.claimed(&pod, &["-c", "v3,v5", "-k", "v7"], |this| {
            batch(&pod, (0..60).map(|n| format!("link add v{n} type veth peer name w{n}")))?;
            this.wait();
            batch(&pod, (0..60).map(|n| format!("link delete v{n}")))
        })
    }

    fn process(&mut self, what: &'static str, program: Program, more: &[&str]) -> Result<()> {
        self.ledger.act(what);
        let pod = self.world.pod(&self.name)?;
        let process = program.start(&pod)?;
        if self.dice.once_in(2) {
            return self.claimed(&pod, more, |_| Ok(()));
        }
        let mut api = self.node.api_pod(&self.name, self.uid.clone())?;
        api.annotate("proxy.istio.io/config", "{proxyMetadata: {ISTIO_META_DNS_CAPTURE: 'true'}}");
        api.take(&[process.pid()])?;
        self.node.tell("ADDED", &api);
        // It may be refused, for what it is.
        drop(self.node.call("ADD", &api, &pod, "10.66.0.2/24")?);
        self.wait();
        self.node.tell("DELETED", &api);
        Ok(())
    }

    /// Half requests of a local user.
    fn half_requests(&mut self) -> Result<()> {
        self.ledger.act("half requests");
        let mut connections = Vec::new();
        for _ in 0..self.dice.number(1..8) {
            for mut stream in self.node.probe_connections(60) {
                // The daemon may have closed it already.
                drop(stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: "));
                connections.push(stream);
            }
            self.ledger.pause(Duration::from_millis(300));
        }
        Ok(())
    }

    /// Processes in user and network namespaces of their own, among a pod's others.
    fn user_namespaces(&mut self) -> Result<()> {
        self.ledger.act("user namespaces");
        let pod = self.world.pod(&self.name)?;
        let api = self.node.api_pod(&self.name, self.uid.clone())?;
        let mut others = Vec::new();
        for _ in 0..4 {
            let mut unshare = pod.command_as("unshare", Ids::APP)?;
            unshare.args(["--user", "--net", "--map-root-user", "sh", "-c", "echo ready; exec sleep 600"]);
            others.push(HostileProcess::start(&mut unshare)?);
        }
        let mut plain = pod.command_as("sh", Ids::APP)?;
        others.push(HostileProcess::start(plain.args(["-c", "echo ready; exec sleep 600"]))?);
        api.take(&others.iter().map(HostileProcess::pid).collect::<Vec<_>>())?;
        self.node.tell("ADDED", &api);
        if let Err(said) = self.node.call_until_done("ADD", &api, &pod)? {
            self.ledger.find(Kind::Refused, &format_args!("ADD of a pod with user namespaces: {said}"));
        }
        self.wait();
        self.node.tell("DELETED", &api);
        Ok(())
    }

    /// A cgroup inside a captured pod's.
    fn nested(&mut self) -> Result<()> {
        self.ledger.act("nested cgroups");
        let (outer, inner) = (self.world.pod(&self.name)?, Sandbox::new("inner")?);
        let below = outer.cgroup.path().join("below");
        fs::create_dir(&below)?;
        let attached = finish(&mut self.node.agent().for_pod("attach", &outer, &OPTIONS))?;
        let mut attach = self.node.agent().command("attach");
        attach.arg("--cgroup-path").arg(&below).arg("--netns").arg(inner.netns.path()).args(OPTIONS);
        if attached.status.success() && finish(&mut attach)?.status.success() {
            self.ledger.find(Kind::Misled, &"a cgroup inside a captured one is captured");
        }
        self.wait();
        self.node.agent().detach(&outer)?;
        Ok(())
    }

    /// More connections than a pod may have.
    fn many_connections(&mut self) -> Result<()> {
        self.ledger.act("floods of connections");
        let pod = self.world.pod(&self.name)?;
        let actor = Actor::start(&pod)?;
        let bind = Bind::new(Ids::PROXY, ([0, 0, 0, 0], 15001).into());
        actor.listen(Listen { name: "proxy".into(), transport: Transport::Tcp, bind })?;
        let line = "sleep 0.$((RANDOM % 9)); for i in $(seq 700); do exec {fd}<>/dev/tcp/10.202.0.1/80; done; \
                    echo done; exec sleep 600";
        let mut bash = pod.command_as("/bin/bash", Ids::APP)?;
        bash.args(["-c", line]).stderr(Stdio::null());
        self.claimed(&pod, &[], |this| {
            let _flood = HostileProcess::start(&mut bash)?;
            this.wait();
            Ok(())
        })
    }

    /// Files in the folder of pods that are none, or not root's.
    fn files(&mut self) -> Result<()> {
        self.ledger.act("odd files");
        let folder = self.node.daemon().pods_dir();
        let path = |kind: &str| folder.join(format!("{}-{kind}.json", self.name));
        let paths = ["fifo", "zero", "huge", "other", "text"].map(path);
        mknodat(CWD, &paths[0], FileType::Fifo, Mode::RWXU, 0)?;
        symlink("/dev/zero", &paths[1])?;
        fs::File::create(&paths[2])?.set_len(4 << 30)?;
        fs::write(&paths[3], "{}")?;
        chown(&paths[3], Some(1000), Some(1000))?;
        fs::write(&paths[4], "\u{1b}[2J{")?;
        self.wait();
        paths.iter().try_for_each(|path: &std::path::PathBuf| fs::remove_file(Path::new(path)))?;
        Ok(())
    }

    /// A plain pod with huge annotations that are no business of the agent.
    fn annotations(&mut self) -> Result<()> {
        self.ledger.act("huge annotations");
        let pod = self.world.pod(&self.name)?;
        let mut api = self.node.api_pod(&self.name, self.uid.clone())?;
        api.annotate("example.com/notes", &"\u{1}".repeat(200_000));
        self.node.tell("ADDED", &api);
        if let Err(said) = self.node.call_until_done("ADD", &api, &pod)? {
            self.ledger.find(Kind::Refused, &format_args!("ADD of a pod with huge annotations: {said}"));
        }
        self.wait();
        self.node.tell("DELETED", &api);
        Ok(())
    }
}

fn route(verb: &str, n: u32) -> String {
    let (a, b, c) = (11 + n / 65_536, n / 256 % 256, n % 256);
    format!("route {verb} {a}.{b}.{c}.0/24 dev eth0")
}

/// Feeds lines to `ip -batch` in a pod. What has meanwhile gone is no error.
fn batch(place: &Sandbox, lines: impl Iterator<Item = String>) -> Result<()> {
    let mut text = String::new();
    for line in lines {
        writeln!(text, "{line}")?;
    }
    let mut ip = place.command("ip")?;
    ip.args(["-force", "-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = ip.spawn().context("starting ip")?;
    child.stdin.take().context("a pipe")?.write_all(text.as_bytes())?;
    child.wait()?;
    Ok(())
}
