//! A folder of pods: one small JSON file each, whose name ends in `.json`. For nodes without Kubernetes, and for
//! other managers of pods.
//!
//! ```json
//! { "cgroup": "/sys/fs/cgroup/machine.slice/a", "netns": "/run/netns/a",
//!   "arguments": ["-i", "*", "-b", "*"], "environment": { "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "4242" } }
//! ```
//!
//! `netns` may be left out when processes run in the cgroup. `arguments` and `environment` are those of `attach`;
//! `config` may stand in their place, with the policy as `attach --dry-run` prints it. Write a file elsewhere and
//! rename it into the folder, or write it in one go: it is read when it is closed. Names that begin with a dot do
//! not count. Removing a file takes the pod out of force.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};
use serde::Deserialize;
use tokio::{io::unix::AsyncFd, sync::mpsc::UnboundedSender};

use super::{
    reconcile::Message,
    wanted::{Given, Key, Options, Wanted},
};
use crate::{options::Config, store::Origin};

/// More than any description of a pod has.
const MAX_FILE: u64 = 1 << 20;
/// How long after the folder is gone it is looked for again.
const ABSENT: Duration = Duration::from_secs(1);

/// A file of the folder.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct PodFile {
    cgroup: PathBuf,
    netns: Option<PathBuf>,
    #[serde(default)]
    arguments: Vec<String>,
    #[serde(default)]
    environment: BTreeMap<String, String>,
    config: Option<Box<Config>>,
}

/// Why a file does not describe a pod.
#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error("reading {path}: {source}")]
    Read { path: String, source: io::Error },
    #[error("reading {path}: it is longer than {MAX_FILE} bytes")]
    Long { path: String },
    #[error("reading {path}: {source}")]
    Json { path: String, source: serde_json::Error },
    #[error("reading {path}: give either config or arguments and environment, not both")]
    Both { path: String },
}

/// The folder cannot be watched.
#[derive(Debug, thiserror::Error)]
#[error("watching the folder of pods {path}; it must be there when the daemon starts")]
pub struct FolderError {
    path: String,
    #[source]
    source: io::Error,
}

/// A watched folder.
pub struct Folder {
    path: PathBuf,
    events: AsyncFd<OwnedFd>,
}

/// What to look at after events.
enum Changed {
    Names(HashSet<String>),
    Everything,
    Gone,
}

impl Folder {
    /// Watch it. To be called within a tokio runtime with io enabled.
    pub fn open(path: PathBuf) -> Result<Self, FolderError> {
        let watch = || {
            let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            let what = WatchFlags::CLOSE_WRITE
                | WatchFlags::MOVED_TO
                | WatchFlags::MOVED_FROM
                | WatchFlags::DELETE
                | WatchFlags::DELETE_SELF
                | WatchFlags::MOVE_SELF
                | WatchFlags::ONLYDIR;
            inotify::add_watch(&events, &path, what)?;
            // SAFETY: an OwnedFd keeps its descriptor open, and always the same one, until it is dropped.
            unsafe { AsyncFd::register(events) }.map_err(io::Error::from)
        };
        match watch() {
            Ok(events) => Ok(Self { path, events }),
            Err(source) => Err(FolderError { path: path.display().to_string(), source }),
        }
    }

    /// Tell of every file, then of every change, for ever.
    pub async fn follow(mut self, messages: UnboundedSender<Message>) {
        self.tell_all(&messages);
        loop {
            match self.changed().await {
                Ok(Changed::Names(names)) => names.iter().for_each(|name| {
                    self.tell(name, &messages);
                }),
                Ok(Changed::Everything) => self.tell_all(&messages),
                Ok(Changed::Gone) => self.reopen(&messages).await,
                Err(error) => {
                    tracing::error!(folder = %self.path.display(), %error, "watching the folder of pods");
                    self.reopen(&messages).await;
                }
            }
            if messages.is_closed() {
                return;
            }
        }
    }

    async fn changed(&self) -> io::Result<Changed> {
        let mut names = HashSet::new();
        loop {
            let mut ready = self.events.readable().await?;
            let mut space = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(ready.get_inner(), &mut space);
            loop {
                match reader.next() {
                    Ok(event) => {
                        let flags = event.events();
                        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                            return Ok(Changed::Everything);
                        }
                        if flags
                            .intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::IGNORED)
                        {
                            return Ok(Changed::Gone);
                        }
                        names
                            .extend(event.file_name().and_then(|name| name.to_str().ok()).map(str::to_owned));
                    }
                    Err(Errno::AGAIN) => break,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
            if !names.is_empty() {
                return Ok(Changed::Names(names));
            }
        }
    }

    /// The folder was removed or renamed: what it said holds until another is there.
    async fn reopen(&mut self, messages: &UnboundedSender<Message>) {
        tracing::error!(folder = %self.path.display(), "the folder of pods is gone: its pods stay as they are until it is back");
        loop {
            tokio::time::sleep(ABSENT).await;
            if let Ok(again) = Self::open(self.path.clone()) {
                *self = again;
                self.tell_all(messages);
                return;
            }
        }
    }

    fn tell_all(&self, messages: &UnboundedSender<Message>) {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) => {
                // Not the same as an empty folder.
                tracing::error!(folder = %self.path.display(), %error, "listing the folder of pods");
                return;
            }
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let keys = names.filter_map(|name| self.tell(&name, messages)).collect();
        drop(messages.send(Message::FilesListed(keys)));
    }

    /// Tell of one file; its key if it counts.
    fn tell(&self, name: &str, messages: &UnboundedSender<Message>) -> Option<Key> {
        if name.starts_with('.') || !name.ends_with(".json") {
            return None;
        }
        let key = Key::File(name.to_owned());
        let file = match read(&self.path.join(name), name) {
            Ok(wanted) => Ok(wanted),
            Err(FileError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                drop(messages.send(Message::FileRemoved(key)));
                return None;
            }
            Err(error) => Err(error.to_string()),
        };
        drop(messages.send(Message::File(key.clone(), Box::new(file))));
        Some(key)
    }
}

fn read(path: &Path, name: &str) -> Result<Wanted, FileError> {
    let shown = || path.display().to_string();
    let at = |source| FileError::Read { path: shown(), source };
    if fs::metadata(path).map_err(at)?.len() > MAX_FILE {
        return Err(FileError::Long { path: shown() });
    }
    let text = fs::read(path).map_err(at)?;
    let file: PodFile =
        serde_json::from_slice(&text).map_err(|source| FileError::Json { path: shown(), source })?;
    let given = Given { arguments: file.arguments, environment: file.environment };
    let options = match file.config {
        Some(_) if given != Given::default() => return Err(FileError::Both { path: shown() }),
        Some(config) => Options::Config(config),
        None => Options::Given(given),
    };
    let origin = Origin::File { name: name.to_owned() };
    Ok(Wanted { origin, cgroup: file.cgroup, netns: file.netns, options })
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    const POD: &str = r#"{"cgroup": "/c", "netns": "/n", "arguments": ["-b", "*"]}"#;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
    }

    /// What a message says, in a word and a name.
    async fn next(messages: &mut mpsc::UnboundedReceiver<Message>) -> String {
        let message = tokio::time::timeout(Duration::from_secs(5), messages.recv()).await;
        match message.expect("in time").expect("a message") {
            Message::File(key, file) => match *file {
                Ok(wanted) => format!("want {} {}", wanted.name(), wanted.cgroup.display()),
                Err(problem) => format!("refused {key}: {problem}"),
            },
            Message::FileRemoved(key) => format!("removed {key}"),
            Message::FilesListed(keys) => format!("listed {}", keys.len()),
            _ => "other".to_owned(),
        }
    }

    #[test]
    fn files_are_told_of_as_they_come_change_and_go() {
        let dir = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("written");
        write("a.json", POD);
        write(".hidden.json", POD);
        write("notes.txt", "no pod");
        runtime().block_on(async {
            let folder = Folder::open(dir.path().to_owned()).expect("watched");
            let (send, mut messages) = mpsc::unbounded_channel();
            let task = tokio::spawn(folder.follow(send));
            assert_eq!(next(&mut messages).await, "want a.json /c");
            assert_eq!(next(&mut messages).await, "listed 1");

            write(".b.json", &POD.replace("/c", "/d"));
            fs::rename(dir.path().join(".b.json"), dir.path().join("b.json")).expect("renamed");
            assert_eq!(next(&mut messages).await, "want b.json /d");
            write("a.json", &POD.replace("/c", "/e"));
            assert_eq!(next(&mut messages).await, "want a.json /e");
            write("a.json", "{");
            let refused = next(&mut messages).await;
            assert!(
                refused.starts_with("refused file/a.json: reading ") && refused.contains("EOF"),
                "{refused}"
            );
            fs::remove_file(dir.path().join("a.json")).expect("removed");
            assert_eq!(next(&mut messages).await, "removed file/a.json");
            task.abort();
        });
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("p.json");
        let config = serde_json::to_string(&Config::default()).expect("json");
        for (text, why) in [
            (r#"{"netns": "/n"}"#.to_owned(), "missing field `cgroup`"),
            (r#"{"cgroup": "/c", "cgruop": "/d"}"#.to_owned(), "unknown field `cgruop`"),
            (format!(r#"{{"cgroup": "/c", "arguments": ["-b", "*"], "config": {config}}}"#), "not both"),
        ] {
            fs::write(&path, text).expect("written");
            let error = read(&path, "p.json").expect_err("refused").to_string();
            assert!(error.contains(why) && error.contains("p.json"), "{error}");
        }
        fs::write(&path, format!(r#"{{"cgroup": "/c", "config": {config}}}"#)).expect("written");
        let wanted = read(&path, "p.json").expect("a pod");
        assert_eq!(wanted.options, Options::Config(Box::default()));
    }

    #[test]
    fn a_folder_that_comes_back_is_read_again() {
        let dir = tempfile::tempdir().expect("a folder");
        let pods = dir.path().join("pods");
        fs::create_dir(&pods).expect("made");
        runtime().block_on(async {
            let (send, mut messages) = mpsc::unbounded_channel();
            let task = tokio::spawn(Folder::open(pods.clone()).expect("watched").follow(send));
            assert_eq!(next(&mut messages).await, "listed 0");
            fs::remove_dir(&pods).expect("removed");
            fs::create_dir(&pods).expect("made again");
            fs::write(pods.join("a.json"), POD).expect("written");
            assert_eq!(next(&mut messages).await, "want a.json /c");
            task.abort();
        });
    }
}
