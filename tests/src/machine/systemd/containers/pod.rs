//! An application and its proxy in containers that share a network.

use anyhow::{Context as _, Result, ensure};

use super::{Runtime, pins};
use crate::machine::systemd::{OWN, SERVICE, SystemdMachine, connections, logged, shell, until};

/// The source of what the proxy passes on to the application.
const PASSED_ON: [&str; 2] = ["127.0.0.6", "::6"];

pub(super) struct RuntimePod {
    runtime: &'static Runtime,
    /// A process in its network.
    pid: String,
    /// One for each of the runtime's families, as in URLs.
    addresses: Vec<String>,
    /// Lines of Envoy's log that were compared.
    read: usize,
}

impl RuntimePod {
    /// `owner` prints the container that has the network.
    pub(super) fn of(runtime: &'static Runtime, owner: &str) -> Result<Self> {
        let mut pod = Self { runtime, pid: String::new(), addresses: Vec::new(), read: 0 };
        pod.look_again(owner)?;
        Ok(pod)
    }

    /// Reads what a restart changes.
    pub(super) fn look_again(&mut self, owner: &str) -> Result<()> {
        let command = self.runtime.command;
        let pid = shell(&format!("{command} inspect --format '{{{{.State.Pid}}}}' $({owner})"))?;
        pid.trim().clone_into(&mut self.pid);
        until("an advertised route", || {
            // slirp4netns, whose interface is tap0, is a router.
            let advertises = self.inside("ip -o link show")?.contains("tap0");
            let routes = self.inside("ip -6 route show default")?;
            Ok((!advertises || !routes.trim().is_empty()).then_some(()))
        })?;
        until("addresses without a duplicate", || {
            Ok(self.inside("ip -6 addr show tentative")?.trim().is_empty().then_some(()))
        })?;
        let of_lo = |line: &&str| line.split_whitespace().nth(1) == Some("lo");
        self.addresses.clear();
        for v6 in [false, true].into_iter().take(self.runtime.clients.len()) {
            let family = if v6 { "-6" } else { "-4" };
            let said = self.inside(&format!("ip {family} -o addr show scope global"))?;
            let line =
                said.lines().find(|line| !of_lo(line)).with_context(|| format!("no {family}: {said}"))?;
            let net = line.split_whitespace().nth(3).with_context(|| format!("no address in {line}"))?;
            let address = net.split('/').next().unwrap_or(net);
            self.addresses.push(if v6 { format!("[{address}]") } else { address.to_owned() });
        }
        Ok(())
    }

    /// Runs a command in the pod's network.
    fn inside(&self, command: &str) -> Result<String> {
        shell(&format!("nsenter --net=/proc/{}/ns/net {command}", self.pid))
    }

    /// What a capture may change in its network, and pins and links.
    pub(super) fn state(&self) -> Result<Vec<String>> {
        let mut lines = pins()?;
        let routes = ["-4 route show table all", "-6 route show table all"];
        for what in ["addr", "link", "-4 rule", "-6 rule"].iter().chain(&routes) {
            let said = self.inside(&format!("ip {what}"))?;
            let lasting = said.lines().filter(|line| !line.contains("valid_lft"));
            lines.extend(lasting.map(|line| format!("{what}: {}", without_time(line))));
        }
        Ok(lines)
    }

    /// Makes a request from the application's container.
    fn call(&self, user: &str, service: &str) -> Result<()> {
        // busybox's wget crashes in an emulator.
        let script = format!(
            "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | {} exec -i {user} app-main busybox nc -w 60 {} 80",
            self.runtime.command,
            service.trim_matches(['[', ']'])
        );
        let said = shell(&script)?;
        ensure!(said.ends_with("\r\n\r\nworld"), "{script}: got {said:?}");
        Ok(())
    }

    /// Calls the application from outside, where its port is published.
    fn called(&self, machine: &SystemdMachine, own: &str) -> Result<()> {
        let page = machine.world_gets(&format!("http://{own}:8080/"))?;
        ensure!(page == "app", "the application answered {page:?} at {own}");
        Ok(())
    }

    /// Prints Envoy's log.
    fn log(&self) -> String {
        // Docker and Podman print what a container writes to stderr to theirs.
        format!("{} logs app-proxy 2>&1", self.runtime.command)
    }

    fn logged(&mut self, what: &str, line: String) -> Result<()> {
        self.read += logged(&self.log(), self.read, what, &[line])?;
        Ok(())
    }

    /// The last request that the application logged came from this address.
    fn served(&self, client: &str) -> Result<()> {
        until(&format!("a request of {client}"), || {
            let log = shell(&format!("{} logs app-main 2>&1", self.runtime.command))?;
            let last = log.lines().rfind(|line| line.contains("response:"));
            Ok(last.filter(|line| line.contains(&format!("{client}]:"))).map(drop))
        })
    }

    /// Waits for what listens.
    fn started(&self) -> Result<()> {
        for port in [15001, 15006, 8080] {
            until(&format!("a listener on {port}"), || {
                let listening = self.inside("ss -Hltn")?;
                Ok(listening.contains(&format!(":{port} ")).then_some(()))
            })?;
        }
        Ok(())
    }

    /// Everything goes through the proxy.
    pub(super) fn flows(&mut self, machine: &SystemdMachine) -> Result<()> {
        self.started()?;
        // What was logged before is of an earlier start.
        self.read = connections(&self.log())?.len();
        for (at, address) in self.addresses.clone().into_iter().enumerate() {
            let outbound = format!("outbound {address} to {}:80", SERVICE[at]);
            self.call("", SERVICE[at])?;
            self.logged("the application calls", outbound.clone())?;
            self.called(machine, OWN[at])?;
            let client = self.runtime.clients[at];
            self.logged("the world calls", format!("inbound {client} to {address}:8080"))?;
            self.served(PASSED_ON[at])?;
            // What Envoy logs next is of the application, not of the proxy's user.
            self.call("--user 1337", SERVICE[at])?;
            self.call("", SERVICE[at])?;
            self.logged("the proxy's user and the application call", outbound)?;
        }
        Ok(())
    }

    /// Nothing goes through the proxy.
    pub(super) fn direct(&self, machine: &SystemdMachine) -> Result<()> {
        self.started()?;
        let before = connections(&self.log())?.len();
        ensure!(
            self.read == 0 || before == self.read,
            "Envoy logged {before} connections, {} before",
            self.read
        );
        for at in 0..self.addresses.len() {
            self.call("", SERVICE[at])?;
            self.called(machine, OWN[at])?;
            self.served(self.runtime.clients[at].trim_matches(['[', ']']))?;
        }
        let count = connections(&self.log())?.len();
        ensure!(count == before, "Envoy logged {count} connections, {before} before");
        Ok(())
    }
}

/// A line of `ip` without what changes meanwhile: duplicate address detection ends, and an advertised route expires.
fn without_time(line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        match word {
            "tentative" => {}
            "expires" => {
                words.next();
            }
            word => kept.push(word),
        }
    }
    kept.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_meanwhile_is_left_out() {
        let route =
            "default via fe80::2 dev tap0 proto ra metric 1024 expires 1515sec hoplimit 64 pref medium";
        assert_eq!(
            without_time(route),
            "default via fe80::2 dev tap0 proto ra metric 1024 hoplimit 64 pref medium"
        );
        assert_eq!(
            without_time("    inet6 fd66::2/64 scope global tentative "),
            "inet6 fd66::2/64 scope global"
        );
    }
}
