//! Runs iptables-save and iptables-restore in a pod's namespace.

use std::{
    env, fs,
    io::{self, Write as _},
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, getppid, kill_process_group, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};

use super::{
    CutoverError,
    rules::{SavedTable, Transaction},
};
use crate::netns::Netns;

/// Folders that are searched besides those of PATH.
const FOLDERS: &str = "/usr/sbin:/sbin:/usr/bin:/bin";

/// A program that takes longer is killed. Its changes of a table are made at once or not at all.
const LONGEST: Duration = Duration::from_secs(15);

/// An implementation of iptables for a family: what its programs' names begin with, such as `ip6tables-nft`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tool(String);

impl Tool {
    /// The implementations that show all rules of a namespace, for each family those of nft and of the older tables.
    pub(super) fn all(netns: &Netns) -> Result<Vec<Self>, CutoverError> {
        let mut tools = Vec::new();
        for (plain, list) in [("iptables", "ip_tables_names"), ("ip6tables", "ip6_tables_names")] {
            let path = format!("/proc/thread-self/net/{list}");
            let has_legacy = netns.run(|| fs::read_to_string(path).is_ok_and(|names| !names.is_empty()))?;
            let of =
                |kind: &str| Some(Self(format!("{plain}-{kind}"))).filter(|tool| tool.find("save").is_ok());
            let (nft, legacy) = (of("nft"), of("legacy"));
            if has_legacy && legacy.is_none() {
                return Err(CutoverError::Missing { program: format!("{plain}-legacy-save") });
            }
            if nft.is_none() && legacy.is_none() {
                let plain = Self(plain.to_owned());
                plain.find("save")?;
                tools.push(plain);
            }
            // Without older tables the program would make them.
            tools.extend(nft.into_iter().chain(legacy.filter(|_| has_legacy)));
        }
        Ok(tools)
    }

    /// Whether it is for IPv6.
    pub(super) fn is_v6(&self) -> bool {
        self.0.starts_with("ip6")
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }

    fn find(&self, action: &str) -> Result<PathBuf, CutoverError> {
        let program = format!("{}-{action}", self.0);
        let path = env::var_os("PATH").unwrap_or_default();
        let mut folders = env::split_paths(&path).chain(env::split_paths(FOLDERS));
        let found = folders.find_map(|folder| Some(folder.join(&program)).filter(|path| path.is_file()));
        found.ok_or(CutoverError::Missing { program })
    }

    /// The tables.
    pub(super) fn save(&self, netns: &Netns) -> Result<Vec<SavedTable>, CutoverError> {
        let output = self.run(netns, "save", &[], "")?;
        SavedTable::parse_all(&String::from_utf8_lossy(&output.stdout)).map_err(|source| {
            CutoverError::Rules { tool: self.0.clone(), netns: netns.name().to_owned(), source }
        })
    }

    /// Makes changes, of each table all or none.
    pub(super) fn change(&self, netns: &Netns, changes: &Transaction) -> Result<(), CutoverError> {
        if changes.is_empty() {
            return Ok(());
        }
        // Another program may hold the lock of the older tables.
        self.run(netns, "restore", &["--noflush", "--wait", "10"], &changes.text()).map(drop)
    }

    fn run(
        &self,
        netns: &Netns,
        action: &str,
        arguments: &[&str],
        input: &str,
    ) -> Result<Output, CutoverError> {
        let path = self.find(action)?;
        let failed = |what: String| CutoverError::Iptables {
            program: path.display().to_string(),
            netns: netns.name().to_owned(),
            what,
        };
        // The child inherits the namespace of the thread that starts it.
        let ended = netns.run(|| -> io::Result<Ended> {
            let mut command = Command::new(&path);
            command.args(arguments).process_group(0);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            end_with_this_thread(&mut command);
            wait(command.spawn()?, input)
        })?;
        let output = match ended.map_err(|error| failed(error.to_string()))? {
            Ended::Itself(output) => output,
            Ended::Killed => {
                let (program, netns) = (path.display().to_string(), netns.name().to_owned());
                return Err(CutoverError::Slow { program, netns, limit: LONGEST });
            }
        };
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(failed(format!("{}: {}", output.status, said.trim())));
        }
        Ok(output)
    }
}

/// Has the kernel kill a program when the thread that starts it ends, which waits for it. Otherwise the program of an agent that was
/// killed could change the rules after the next agent has read them.
fn end_with_this_thread(command: &mut Command) {
    let parent = rustix::process::getpid();
    let set = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have ended before.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: the closure makes two system calls and allocates nothing, as is required between fork() and exec().
    unsafe { command.pre_exec(set) };
}

/// How a program has ended.
enum Ended {
    Itself(Output),
    Killed,
}

/// Gives a program its input and waits for it. If that takes too long, kills it with all that it has started.
fn wait(mut child: Child, input: &str) -> io::Result<Ended> {
    let group = Pid::from_child(&child);
    let (end, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = scope.spawn(move || {
            // It is not reaped before it has ended, so that the number is still its own.
            let is_slow = ended.recv_timeout(LONGEST) == Err(RecvTimeoutError::Timeout);
            is_slow && kill_process_group(group, Signal::KILL).is_ok()
        });
        // It reads all of its input before it writes.
        let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output();
        drop(end);
        if watch.join().unwrap_or_default() {
            return Ok(Ended::Killed);
        }
        let output = output?;
        // If it failed before it read all, its error says more.
        if output.status.success() {
            written.map(|()| Ended::Itself(output))
        } else {
            Ok(Ended::Itself(output))
        }
    })
}
