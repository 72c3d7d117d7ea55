//! Keeps the CNI plugin installed. A network plugin that restarts rewrites its configuration without the entry, and an
//! upgrade of the node may remove the binary.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::sleep,
};

use super::{
    inotify::{Changed, FolderWatch},
    metrics::Metrics,
    retry,
};
use crate::cni::{
    PLUGIN,
    install::{InstallError, Installed, Plugin},
};

/// Delay after a change before the files are read, because their writer may not have finished.
const SETTLE: Duration = Duration::from_millis(50);
/// Polling interval while a folder cannot be watched or has no usable configuration.
const MISSING: Duration = Duration::from_secs(1);
/// Interval between checks without a change.
const RESYNC_INTERVAL: Duration = Duration::from_secs(30);
/// A reinstallation within this time after another means that a program keeps removing the entry. The delay then
/// doubles each time.
const CONTESTED: Duration = Duration::from_secs(10);

/// Whether the CNI plugin is installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PluginState {
    /// Not checked yet.
    Unknown,
    /// In this file.
    Installed(PathBuf),
    /// Not in the configuration, with the error.
    Missing(String),
    /// No longer kept, because the agent is being removed.
    Removed,
}

impl PluginState {
    /// Returns why new pods do not use the plugin. `None` if it is installed.
    pub fn problem(&self) -> Option<String> {
        match self {
            Self::Installed(_) => None,
            Self::Unknown => Some("installing the CNI plugin".to_owned()),
            Self::Missing(why) => Some(format!("the CNI plugin is not in the node's configuration: {why}")),
            Self::Removed => Some("the CNI plugin is being removed from this node".to_owned()),
        }
    }
}

/// Keeps the plugin installed until it is stopped.
pub struct Installer {
    plugin: Plugin,
    metrics: Metrics,
    state: watch::Sender<PluginState>,
    stop: mpsc::Receiver<oneshot::Sender<()>>,
}

/// A handle to the [`Installer`].
#[derive(Clone, Debug)]
pub struct InstallerHandle {
    state: watch::Receiver<PluginState>,
    stop: mpsc::Sender<oneshot::Sender<()>>,
}

impl InstallerHandle {
    /// Returns the current state.
    pub fn state(&self) -> PluginState {
        self.state.borrow().clone()
    }

    /// Stops the installer. After the return it does not write the configuration again.
    pub async fn stop(&self) {
        let (reply, stopped) = oneshot::channel();
        // An error means that it had already stopped.
        if self.stop.send(reply).await.is_ok() {
            drop(stopped.await);
        }
    }
}

impl Installer {
    /// Creates an installer and its handle. [`Installer::run`] starts it.
    pub fn new(plugin: Plugin, metrics: Metrics) -> (Self, InstallerHandle) {
        let (state, seen) = watch::channel(PluginState::Unknown);
        let (stop, stopped) = mpsc::channel(1);
        metrics.plugin(&PluginState::Unknown);
        (Self { plugin, metrics, state, stop: stopped }, InstallerHandle { state: seen, stop })
    }

    /// Installs the plugin, and reinstalls it whenever it is missing.
    pub async fn run(mut self) {
        let mut last_written: Option<Instant> = None;
        let mut contested = 0;
        loop {
            // Before the files are read, so that no change is missed.
            let watch = |path: &Path| FolderWatch::open(path).ok();
            let configurations = watch(&self.plugin.folders.configurations);
            let binaries = watch(&self.plugin.folders.binaries);
            let written = self.install().await;
            let unwatched = configurations.is_none() || binaries.is_none();
            if written && unwatched {
                // Now more can be watched.
                continue;
            }
            let pause = if unwatched || self.is_missing() { MISSING } else { RESYNC_INTERVAL };
            if written {
                let again = last_written.is_some_and(|before| before.elapsed() < CONTESTED);
                contested = if again { contested + 1 } else { 0 };
                last_written = Some(Instant::now());
            }
            let settle = if contested > 1 { retry::delay(contested) } else { SETTLE };
            let changed = async {
                tokio::select! {
                    () = relevant(configurations.as_ref(), is_configuration) => {}
                    () = relevant(binaries.as_ref(), |name| name == PLUGIN) => {}
                }
                sleep(settle).await;
            };
            tokio::select! {
                () = changed => {}
                () = sleep(pause.max(settle)) => {}
                reply = self.stop.recv() => {
                    self.publish(PluginState::Removed);
                    if let Some(reply) = reply {
                        // The requester may be gone.
                        let _ = reply.send(());
                    }
                    return;
                }
            }
        }
    }

    fn is_missing(&self) -> bool {
        !matches!(*self.state.borrow(), PluginState::Installed(_))
    }

    /// Installs the plugin. True if files have changed.
    async fn install(&self) -> bool {
        let plugin = self.plugin.clone();
        let result = match tokio::task::spawn_blocking(move || plugin.install()).await {
            Ok(result) => result,
            Err(failed) => {
                tracing::error!(error = %failed, "installing the CNI plugin");
                return false;
            }
        };
        let (state, changed) = match result {
            Ok(Installed { path, changed }) => {
                if changed {
                    tracing::info!(file = %path.display(), "added the CNI plugin to the node's configuration");
                    self.metrics.plugin_written();
                }
                (PluginState::Installed(path), changed)
            }
            Err(error) => (PluginState::Missing(text(&error)), false),
        };
        if *self.state.borrow() != state {
            if let Some(problem) = state.problem() {
                tracing::warn!("{problem}");
            }
            self.publish(state);
        }
        changed
    }

    fn publish(&self, state: PluginState) {
        self.metrics.plugin(&state);
        self.state.send_replace(state);
    }
}

fn text(error: &InstallError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn is_configuration(name: &str) -> bool {
    // Temporary files start with a dot.
    !name.starts_with('.') && [".conf", ".conflist", ".json"].iter().any(|kind| name.ends_with(kind))
}

/// Waits for a change of a relevant file, or for an unknown change.
async fn relevant(watch: Option<&FolderWatch>, is_relevant: impl Fn(&str) -> bool) {
    let Some(watch) = watch else { return std::future::pending().await };
    loop {
        match watch.changed().await {
            Ok(Changed::Names(names)) if !names.iter().any(|name| is_relevant(name)) => {}
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use serde_json::{Value, json};

    use super::*;
    use crate::cni::install::{Folders, Mode};

    const PRIMARY: &str = r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}"#;

    struct PluginFixture {
        dir: tempfile::TempDir,
        handle: InstallerHandle,
    }

    impl PluginFixture {
        fn start() -> (Self, tokio::task::JoinHandle<()>) {
            let dir = tempfile::tempdir().expect("a folder");
            let folders =
                Folders { configurations: dir.path().join("net.d"), binaries: dir.path().join("bin") };
            let entry = json!({ "type": PLUGIN });
            let binary = dir.path().join("agent");
            fs::write(&binary, "the agent").expect("written");
            let plugin = Plugin { folders, mode: Mode::Chained { file: None }, entry, binary };
            let (installer, handle) = Installer::new(plugin, Metrics::new());
            (Self { dir, handle }, tokio::spawn(installer.run()))
        }

        fn list(&self) -> PathBuf {
            self.dir.path().join("net.d/10-net.conflist")
        }

        fn write(&self, text: &str) {
            let beside = self.dir.path().join("new");
            fs::write(&beside, text).expect("written");
            fs::rename(beside, self.list()).expect("renamed");
        }

        fn is_in_list(&self) -> bool {
            let list: Value = fs::read(self.list())
                .map_or(Value::Null, |text| serde_json::from_slice(&text).expect("JSON"));
            list["plugins"]
                .as_array()
                .is_some_and(|plugins| plugins.iter().any(|plugin| plugin["type"] == PLUGIN))
        }

        async fn within_a_second(&self, what: &str, so: impl Fn(&Self) -> bool) {
            let started = Instant::now();
            while !so(self) {
                assert!(started.elapsed() < Duration::from_secs(1), "{what}: {:?}", self.handle.state());
                sleep(Duration::from_millis(5)).await;
            }
        }
    }

    fn block_on(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(test);
    }

    #[test]
    fn it_is_put_back_within_a_second_until_it_is_stopped() {
        block_on(async {
            let (node, task) = PluginFixture::start();
            let mut state = node.handle.state.clone();
            state.wait_for(|state| matches!(state, PluginState::Missing(_))).await.expect("running");
            let problem = node.handle.state().problem().expect("a problem");
            assert!(problem.contains("there is no usable configuration yet"), "{problem}");

            fs::create_dir_all(node.list().parent().expect("a folder")).expect("created");
            node.write(PRIMARY);
            state.wait_for(|state| *state == PluginState::Installed(node.list())).await.expect("running");
            assert!(node.is_in_list());
            // A network plugin that restarts twice.
            for _ in 0..2 {
                node.write(PRIMARY);
                node.within_a_second("the list", PluginFixture::is_in_list).await;
            }
            let binary = node.dir.path().join("bin").join(PLUGIN);
            fs::write(&binary, "another").expect("replaced");
            let is_whole = |_: &PluginFixture| {
                let is_executable = |found: fs::Metadata| found.permissions().mode() & 0o111 != 0;
                fs::metadata(&binary).is_ok_and(is_executable)
                    && fs::read(&binary).is_ok_and(|content| content == b"the agent")
            };
            node.within_a_second("the binary", is_whole).await;
            fs::remove_file(&binary).expect("removed");
            node.within_a_second("the binary", is_whole).await;

            node.write("{ broken");
            let is_missing = |node: &PluginFixture| matches!(node.handle.state(), PluginState::Missing(_));
            node.within_a_second("it is told", is_missing).await;
            let problem = node.handle.state().problem().expect("a problem");
            assert!(
                problem.contains("10-net.conflist: it is not valid JSON; correct or remove it"),
                "{problem}"
            );
            node.write(PRIMARY);
            node.within_a_second("the list", PluginFixture::is_in_list).await;

            node.handle.stop().await;
            node.handle.stop().await;
            assert_eq!(node.handle.state(), PluginState::Removed);
            task.await.expect("it has ended");
            node.write(PRIMARY);
            assert!(!node.is_in_list());
        });
    }

    #[test]
    fn what_others_append_is_not_fought_over() {
        block_on(async {
            let (node, task) = PluginFixture::start();
            fs::create_dir_all(node.list().parent().expect("a folder")).expect("created");
            node.write(PRIMARY);
            let mut state = node.handle.state.clone();
            state.wait_for(|state| *state == PluginState::Installed(node.list())).await.expect("running");
            let mut list: Value =
                serde_json::from_slice(&fs::read(node.list()).expect("read")).expect("JSON");
            list["plugins"].as_array_mut().expect("a list").push(json!({"type": "istio-cni"}));
            node.write(&list.to_string());
            // A later change that is noticed.
            fs::remove_file(node.dir.path().join("bin").join(PLUGIN)).expect("removed");
            node.within_a_second("the binary", |node| node.dir.path().join("bin").join(PLUGIN).exists())
                .await;
            assert_eq!(fs::read_to_string(node.list()).expect("read"), list.to_string());
            task.abort();
        });
    }
}
