//! A folder of pods, with a JSON file per pod whose name ends in `.json`. It is for nodes without Kubernetes, and for
//! other managers of pods.
//!
//! ```json
//! { "cgroup": "/sys/fs/cgroup/machine.slice/a", "netns": "/run/netns/a",
//!   "arguments": ["-i", "*", "-b", "*"], "environment": { "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "4242" } }
//! ```
//!
//! `netns` can be omitted if the cgroup has processes. `arguments` and `environment` are those of `attach`. Instead of
//! them, `config` can contain the policy as `attach --dry-run` prints it. Write a file elsewhere and rename it into the
//! folder, or write it at once: it is read when it is closed. Names that start with a dot are ignored. Removing a file
//! releases the pod.
//!
//! Folder and files must belong to root and be writable only by root. Symbolic links, pipes and long files are refused.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use serde::Deserialize;
use tokio::sync::mpsc::UnboundedSender;

use super::{
    desired::{CaptureArgs, CaptureOptions, DesiredPod, Key},
    inotify::{Changed, FolderWatch},
    reconcile::Message,
    source::{PodSource, SourceContext},
    takeover::Takeover,
};
use crate::{
    options::Config,
    ownership::{OwnedFolder, OwnershipError},
    record::RecordOrigin,
};

/// Most bytes of a file.
const MAX_FILE: u64 = 1 << 20;
/// Interval between attempts to open a missing folder.
const ABSENT: Duration = Duration::from_secs(1);

/// The content of a file.
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

/// Why a file is not a valid description of a pod.
#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error("{0}{cause}", cause = std::error::Error::source(.0).map(|cause| format!(": {cause}")).unwrap_or_default())]
    Ownership(OwnershipError),
    #[error("reading {path}: {source}")]
    Json { path: String, source: serde_json::Error },
    #[error("reading {path}: give either config or arguments and environment, not both")]
    Both { path: String },
}

/// Why the folder cannot be watched.
#[derive(Debug, thiserror::Error)]
#[error(
    "watching the folder of pods {path}; it must exist when the daemon starts, and only root may own it and write to it"
)]
pub struct FolderError {
    path: String,
    #[source]
    source: OwnershipError,
}

/// A watched folder.
pub struct Folder {
    path: PathBuf,
    watch: FolderWatch,
}

/// Which files are read.
enum Files {
    Named(HashSet<String>),
    All,
}

impl Folder {
    /// Watches a folder. Must be called in a tokio runtime with io enabled.
    pub fn open(path: PathBuf) -> Result<Self, FolderError> {
        let watch = || {
            OwnedFolder::open(&path)?;
            FolderWatch::open(&path).map_err(|source| OwnershipError::Io {
                action: "watching folder",
                path: path.display().to_string(),
                source,
            })
        };
        match watch() {
            Ok(watch) => Ok(Self { path, watch }),
            Err(source) => Err(FolderError { path: path.display().to_string(), source }),
        }
    }

    /// Reports every file, and then every change, forever.
    async fn follow(mut self, messages: UnboundedSender<Message>) {
        self.tell(Files::All, &messages).await;
        loop {
            match self.watch.changed().await {
                Ok(Changed::Names(names)) => self.tell(Files::Named(names), &messages).await,
                Ok(Changed::Everything) if self.open_again(&messages).await.is_ok() => {}
                Ok(Changed::Everything | Changed::Gone) => self.reopen(&messages).await,
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

    /// Watches the folder that is at the path now, and reads it.
    async fn open_again(&mut self, messages: &UnboundedSender<Message>) -> Result<(), FolderError> {
        *self = Self::open(self.path.clone())?;
        self.tell(Files::All, messages).await;
        Ok(())
    }

    /// The folder was removed or renamed, or others than root can write to it. Its pods stay as they are until it exists
    /// again and is root's.
    async fn reopen(&mut self, messages: &UnboundedSender<Message>) {
        tracing::error!(folder = %self.path.display(), "the folder of pods is gone or refused: its pods stay captured until it can be read again");
        let mut logged = None;
        loop {
            tokio::time::sleep(ABSENT).await;
            match self.open_again(messages).await {
                Ok(()) => return,
                Err(FolderError { source, .. }) if source.is_not_found() => {}
                Err(FolderError { source, .. }) => {
                    let text = source.to_string();
                    if logged.as_ref() != Some(&text) {
                        tracing::error!(folder = %self.path.display(), "{text}");
                        logged = Some(text);
                    }
                }
            }
        }
    }

    /// Reads files and reports them. They may be on a disk that does not respond, which only delays this source.
    async fn tell(&self, files: Files, messages: &UnboundedSender<Message>) {
        let path = self.path.clone();
        match tokio::task::spawn_blocking(move || read_files(&path, files)).await {
            Ok(Ok(told)) => told.into_iter().for_each(|message| drop(messages.send(message))),
            // An unreadable folder is not an empty one.
            Ok(Err(error)) => tracing::error!(
                error = &error as &dyn std::error::Error,
                "reading the folder of pods: its pods stay captured"
            ),
            Err(error) => tracing::error!(%error, "reading the folder of pods"),
        }
    }
}

impl PodSource for Folder {
    fn name(&self) -> &'static str {
        "folder"
    }

    fn run(self: Box<Self>, context: SourceContext) -> BoxFuture<'static, ()> {
        self.follow(context.messages).boxed()
    }
}

fn read_files(path: &Path, files: Files) -> Result<Vec<Message>, OwnershipError> {
    let folder = OwnedFolder::open(path)?;
    match files {
        Files::Named(names) => Ok(names.iter().filter_map(|name| read_file(&folder, name)).collect()),
        Files::All => {
            let listed = |source| OwnershipError::Io {
                action: "listing folder",
                path: path.display().to_string(),
                source,
            };
            let entries: Vec<_> = fs::read_dir(path).and_then(Iterator::collect).map_err(listed)?;
            let names =
                entries.into_iter().filter_map(|entry: fs::DirEntry| entry.file_name().into_string().ok());
            let mut told: Vec<Message> = names.filter_map(|name| read_file(&folder, &name)).collect();
            let keys = told.iter().filter_map(|message| match message {
                Message::File(key, _) => Some(key.clone()),
                _ => None,
            });
            let keys = keys.collect();
            told.push(Message::FilesListed(keys));
            Ok(told)
        }
    }
}

/// Reads a file. `None` if its name is not that of a description.
fn read_file(folder: &OwnedFolder, name: &str) -> Option<Message> {
    if name.starts_with('.') || !name.ends_with(".json") {
        return None;
    }
    let key = Key::File(name.to_owned());
    Some(match read(folder, name) {
        Ok(desired) => Message::File(key, Box::new(Ok(desired))),
        Err(FileError::Ownership(error)) if error.is_not_found() => Message::FileRemoved(key),
        Err(error) => Message::File(key, Box::new(Err(error.to_string()))),
    })
}

fn read(folder: &OwnedFolder, name: &str) -> Result<DesiredPod, FileError> {
    let shown = || folder.path().join(name).display().to_string();
    let text = folder.read(Path::new(name), MAX_FILE).map_err(FileError::Ownership)?;
    let file: PodFile =
        serde_json::from_slice(&text).map_err(|source| FileError::Json { path: shown(), source })?;
    let given = CaptureArgs { arguments: file.arguments, environment: file.environment };
    let options = match file.config {
        Some(_) if given != CaptureArgs::default() => return Err(FileError::Both { path: shown() }),
        Some(config) => CaptureOptions::Config(config),
        None => CaptureOptions::Args(given),
    };
    let origin = RecordOrigin::File { name: name.to_owned() };
    Ok(DesiredPod { origin, cgroup: file.cgroup, netns: file.netns, options, takeover: Takeover::None })
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::unix::fs::{PermissionsExt as _, chown, symlink},
    };

    use tokio::sync::mpsc;

    use super::*;

    const POD: &str = r#"{"cgroup": "/c", "netns": "/n", "arguments": ["-b", "*"]}"#;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
    }

    /// Returns a short text for a message.
    async fn next(messages: &mut mpsc::UnboundedReceiver<Message>) -> String {
        let message = tokio::time::timeout(Duration::from_secs(5), messages.recv()).await;
        match message.expect("in time").expect("a message") {
            Message::File(key, file) => match *file {
                Ok(desired) => format!("want {} {}", desired.name(), desired.cgroup.display()),
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
        let folder = OwnedFolder::open(dir.path()).expect("opened");
        let config = serde_json::to_string(&Config::default()).expect("json");
        for (text, why) in [
            (r#"{"netns": "/n"}"#.to_owned(), "missing field `cgroup`"),
            (r#"{"cgroup": "/c", "cgruop": "/d"}"#.to_owned(), "unknown field `cgruop`"),
            (format!(r#"{{"cgroup": "/c", "arguments": ["-b", "*"], "config": {config}}}"#), "not both"),
        ] {
            fs::write(&path, text).expect("written");
            let error = read(&folder, "p.json").expect_err("refused").to_string();
            assert!(error.contains(why) && error.contains("p.json"), "{error}");
        }
        fs::write(&path, format!(r#"{{"cgroup": "/c", "config": {config}}}"#)).expect("written");
        let desired = read(&folder, "p.json").expect("a pod");
        assert_eq!(desired.options, CaptureOptions::Config(Box::default()));
    }

    #[test]
    fn files_that_others_could_write_are_refused_and_hold_up_nothing() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = |name: &str| dir.path().join(name);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path("a.json"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .expect("a pipe");
        symlink("/dev/zero", path("b.json")).expect("a link");
        File::create(path("c.json")).and_then(|file| file.set_len(MAX_FILE + 1)).expect("a long file");
        fs::write(path("d.json"), POD).expect("written");
        chown(path("d.json"), Some(65534), None).expect("given away");
        fs::write(path("e.json"), POD).expect("written");
        runtime().block_on(async {
            let folder = Folder::open(dir.path().to_owned()).expect("watched");
            let (send, mut messages) = mpsc::unbounded_channel();
            let task = tokio::spawn(folder.follow(send));
            let mut told = Vec::new();
            for _ in 0..6 {
                told.push(next(&mut messages).await);
            }
            told.sort();
            let expected = [
                "listed 5",
                "refused file/a.json: refusing",
                "refused file/b.json: refusing",
                "refused file/c.json: refusing",
                "refused file/d.json: refusing",
                "want e.json /c",
            ];
            assert!(told.iter().zip(expected).all(|(told, expected)| told.starts_with(expected)), "{told:?}");

            // A folder that others can write to is not read, and its pods are kept.
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("opened");
            fs::remove_file(path("e.json")).expect("removed");
            assert!(read_files(dir.path(), Files::All).is_err());
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).expect("closed");
            task.abort();
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o770)).expect("opened");
            let error = Folder::open(dir.path().to_owned()).err().expect("refused");
            assert!(error.source.to_string().contains("chmod go-w"), "{}", error.source);
        });
    }

    #[test]
    fn what_is_given_back_to_root_is_read() {
        let dir = tempfile::tempdir().expect("a folder");
        let write = |name: &str| fs::write(dir.path().join(name), POD).expect("written");
        let set_mode =
            |mode| fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).expect("changed");
        write("a.json");
        chown(dir.path().join("a.json"), Some(65534), None).expect("given away");
        runtime().block_on(async {
            let (send, mut messages) = mpsc::unbounded_channel();
            let folder = Folder::open(dir.path().to_owned()).expect("watched");
            let task = tokio::spawn(folder.follow(send));
            let refused = next(&mut messages).await;
            assert!(refused.starts_with("refused file/a.json: refusing"), "{refused}");
            assert_eq!(next(&mut messages).await, "listed 1");
            chown(dir.path().join("a.json"), Some(0), None).expect("given back");
            assert_eq!(next(&mut messages).await, "want a.json /c");

            // Nothing is read from a folder that others can write to, until they cannot.
            set_mode(0o777);
            write("b.json");
            let silent = tokio::time::timeout(Duration::from_millis(200), messages.recv()).await;
            assert!(silent.is_err(), "read from a folder of others");
            set_mode(0o700);
            let mut told = [(); 3].map(|()| String::new());
            for told in &mut told {
                *told = next(&mut messages).await;
            }
            told.sort();
            assert_eq!(told, ["listed 2", "want a.json /c", "want b.json /c"]);
            task.abort();
        });
    }

    #[test]
    fn a_folder_that_is_replaced_while_the_kernel_drops_events_is_watched() {
        let dir = tempfile::tempdir().expect("a folder");
        let pods = dir.path().join("pods");
        fs::create_dir(&pods).expect("made");
        let queued = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("read");
        let queued: usize = queued.trim().parse().expect("a number");
        runtime().block_on(async {
            let (send, mut messages) = mpsc::unbounded_channel();
            let folder = Folder::open(pods.clone()).expect("watched");
            // The kernel merges equal events.
            for number in 0..=queued {
                fs::write(pods.join(if number % 2 == 0 { ".a" } else { ".b" }), "").expect("written");
            }
            fs::remove_dir_all(&pods).expect("removed");
            fs::create_dir(&pods).expect("made again");
            let task = tokio::spawn(folder.follow(send));
            assert_eq!(next(&mut messages).await, "listed 0");
            assert_eq!(next(&mut messages).await, "listed 0");
            fs::write(pods.join("a.json"), POD).expect("written");
            assert_eq!(next(&mut messages).await, "want a.json /c");
            task.abort();
        });
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
