//! The daemon's socket, which only root can use.

use std::{fs, io, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

use futures_util::{FutureExt as _, future::BoxFuture};
use rustix::fs::FlockOperation;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc::UnboundedSender, oneshot},
    time::timeout,
};

use super::{
    desired::Key,
    mode::{ModeDecision, ModeRule, PodMode},
    placement::Placement,
    protocol::{Add, DaemonRequest, MAX_LINE, PATIENCE, Refusal, Response, SandboxInfo, Select},
    ready::Readiness,
    reconcile::Message,
    report::{PodFailure, PodResult},
    sidecar::{self, Ipv6, PodVerdict, Selection, SidecarArgs},
    source::{PodSource, SourceContext},
    takeover::Takeover,
    view::{Certainty, SandboxClaim},
};
use crate::{
    confinement::explained,
    escape::OneLine,
    ids::PodUid,
    ownership::{OwnedFolder, OwnershipError},
};

/// Why the socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Its folder or its lock cannot be trusted.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// A system call failed.
    #[error("{action} {path}")]
    Io {
        /// The operation.
        action: &'static str,
        /// Its path.
        path: String,
        /// The error from the kernel.
        #[source]
        source: io::Error,
    },
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError {
    let path = path.display().to_string();
    move |source| SocketError::Io { action, path, source }
}

/// The socket, and the lock that keeps other daemons from it.
pub struct Server {
    listener: UnixListener,
    _lock: fs::File,
    placement: Placement,
    selection: Selection,
}

struct Context {
    messages: UnboundedSender<Message>,
    placement: Placement,
    selection: Selection,
    readiness: Readiness,
}

impl Server {
    /// Listens on the socket. The folder is created if it does not exist, and must belong to root. The socket of an
    /// earlier daemon is replaced.
    pub fn open(path: &Path, placement: Placement, selection: Selection) -> Result<Self, SocketError> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let folder = OwnedFolder::create(parent.unwrap_or(Path::new(".")))?;
        let locked = path.with_extension("lock");
        let lock = folder.lock_file(Path::new(locked.file_name().unwrap_or_default()))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(io::Error::from)
            .map_err(at("another daemon uses this socket: locking", &locked))?;
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(at("replacing socket", path)(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(at("listening on socket", path))?;
        // Other users who connect before this are refused by the check of the peer's credentials.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .map_err(at("restricting to root", path))?;
        Ok(Self { listener, _lock: lock, placement, selection })
    }

    /// Serves requests forever.
    async fn serve(self, SourceContext { messages, readiness }: SourceContext) {
        let Self { listener, _lock, placement, selection } = self;
        let context = Arc::new(Context { messages, placement, selection, readiness });
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let context = Arc::clone(&context);
                    tokio::spawn(async move {
                        if let Err(error) = context.answer(stream).await {
                            tracing::warn!(%error, "answering on the socket");
                        }
                    });
                }
                Err(error) => {
                    // Probably too many open files, which is temporary.
                    tracing::error!(%error, "accepting on the socket");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl PodSource for Server {
    fn name(&self) -> &'static str {
        "socket"
    }

    fn run(self: Box<Self>, context: SourceContext) -> BoxFuture<'static, ()> {
        self.serve(context).boxed()
    }
}

impl Context {
    async fn answer(&self, mut stream: UnixStream) -> io::Result<()> {
        let peer = stream.peer_cred()?;
        // Read the request even if it is refused. Closing the socket with unread data would reset the connection, and
        // the peer would lose the answer.
        let mut line = String::new();
        let (reader, _) = stream.split();
        let mut reader = BufReader::new(reader.take(MAX_LINE));
        match timeout(PATIENCE, reader.read_line(&mut line)).await {
            Ok(read) => _ = read?,
            Err(late) => return Err(late.into()),
        }
        let response = if peer.uid() == 0 {
            match serde_json::from_str(&line) {
                Ok(request) => self.perform(request).await,
                Err(error) => failed(Refusal::Request, format!("reading the request: {error}")),
            }
        } else {
            tracing::warn!(uid = peer.uid(), "refused a user other than root on the socket");
            failed(Refusal::Forbidden, "only root may use this socket".to_owned())
        };
        let mut text = serde_json::to_string(&response)?;
        text.push('\n');
        stream.write_all(text.as_bytes()).await?;
        stream.shutdown().await
    }

    async fn perform(&self, request: DaemonRequest) -> Response {
        if let Some(sandbox) = request.sandbox()
            && !sandbox.is_printable()
        {
            return failed(Refusal::Request, "the names of the pod contain control characters".to_owned());
        }
        match request {
            DaemonRequest::Add(add) => self.add(*add).await,
            DaemonRequest::Delete(sandbox) => {
                let key = key(&sandbox);
                self.ask(|reply| Message::Delete { key, sandbox: sandbox.sandbox, reply }).await
            }
            DaemonRequest::Check(sandbox) => self.ask(|reply| Message::Check(key(&sandbox), reply)).await,
            DaemonRequest::Report => match self.tell(Message::Report).await {
                Some(reports) => Response::Pods(reports),
                None => ending(),
            },
            DaemonRequest::Ready => match self.readiness.of_daemon().await {
                Ok(()) => Response::Done("ready".to_owned()),
                Err(problem) => failed(Refusal::NotReady, problem),
            },
            DaemonRequest::Collect { valid } => {
                let valid = valid.into_iter().collect();
                match self.tell(|reply| Message::Collect(valid, reply)).await {
                    Some(released) => Response::Done(format!("{released} released")),
                    None => ending(),
                }
            }
            DaemonRequest::StopInstalling => {
                if let Some(installer) = &self.readiness.installer {
                    installer.stop().await;
                }
                Response::Done("stopped".to_owned())
            }
            DaemonRequest::Leave => match self.tell(Message::Leave).await {
                Some(Ok(())) => Response::Done("left".to_owned()),
                Some(Err(error)) => failed(Refusal::Internal, OneLine(explained(&error)).to_string()),
                None => ending(),
            },
        }
    }

    async fn add(&self, add: Add) -> Response {
        let key = key(&add.pod);
        let claim = self.claim(add);
        self.ask(|reply| Message::Sandbox(key, Box::new(claim), reply)).await
    }

    fn claim(&self, add: Add) -> SandboxClaim {
        let cgroup = match (&add.cgroup, &add.pod.uid) {
            (Some(name), _) => self.placement.of_name(name).map_err(|error| error.to_string()),
            (None, Some(uid)) => self.placement.of_pod(uid).map_err(|error| error.to_string()),
            (None, None) => {
                Err("the runtime passes neither the pod's cgroup nor its UID: give the plugin the \
                                 capability cgroupPath, or pass K8S_POD_UID"
                    .to_owned())
            }
        };
        let (verdict, certainty) = match (add.select, add.annotations) {
            (Select::All, _) => {
                let mode = Some(ModeDecision::of_options(PodMode::of(&add.given), ModeRule::Default));
                let args =
                    SidecarArgs { given: add.given, ipv6: Ipv6::Always, takeover: Takeover::None, mode };
                (Ok(PodVerdict::Capture(args)), Certainty::Provisional)
            }
            (Select::Sidecar, annotations) => sidecar::decide_by_annotations(
                &add.pod.namespace,
                annotations.as_ref(),
                &self.selection,
                &add.given,
            ),
        };
        let SandboxInfo { sandbox: id, namespace, name, .. } = add.pod;
        SandboxClaim {
            id,
            namespace,
            name,
            netns: add.netns,
            cgroup,
            first_address: add.addresses.first().copied(),
            verdict,
            certainty,
        }
    }

    async fn ask(&self, message: impl FnOnce(oneshot::Sender<PodResult>) -> Message) -> Response {
        match self.tell(message).await {
            Some(Ok(how)) => Response::Done(how.to_owned()),
            Some(Err(problem)) => Response::Failed(problem),
            None => ending(),
        }
    }

    async fn tell<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.messages.send(message(reply)).ok()?;
        answer.await.ok()
    }
}

fn failed(why: Refusal, text: String) -> Response {
    Response::Failed(PodFailure::refusal(why, text))
}

fn ending() -> Response {
    failed(Refusal::Ending, "the daemon is shutting down; try again".to_owned())
}

fn uid(sandbox: &SandboxInfo) -> &str {
    sandbox.uid.as_deref().unwrap_or(&sandbox.sandbox)
}

fn key(sandbox: &SandboxInfo) -> Key {
    Key::Pod(PodUid(uid(sandbox).to_owned()))
}

/// Sends a request to the daemon from another process and waits for the answer.
pub fn request(path: &Path, request: &DaemonRequest) -> io::Result<Response> {
    use std::io::{BufRead as _, Read as _, Write as _};
    let mut stream = std::os::unix::net::UnixStream::connect(path)?;
    let peer = rustix::net::sockopt::socket_peercred(&stream)?.uid;
    if !peer.is_root() && peer != rustix::process::geteuid() {
        let text = format!("the socket belongs to user {}, not to a daemon of root", peer.as_raw());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    stream.set_read_timeout(Some(PATIENCE * 3))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut text = serde_json::to_string(request)?;
    text.push('\n');
    stream.write_all(text.as_bytes())?;
    let mut line = String::new();
    std::io::BufReader::new(stream.take(MAX_LINE * 64)).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&line)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_impostor_on_the_socket_is_not_asked() {
        let dir = tempfile::tempdir().expect("a folder");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("opened");
        let path = dir.path().join("agent.sock");
        let listener = std::thread::scope(|scope| {
            let as_nobody = scope.spawn(|| {
                rustix::thread::set_thread_uid(rustix::fs::Uid::from_raw(65534))
                    .expect("this thread becomes nobody");
                std::os::unix::net::UnixListener::bind(&path).expect("bound")
            });
            as_nobody.join().expect("no panic")
        });
        let error = request(&path, &DaemonRequest::Report).expect_err("refused");
        assert!(error.to_string().starts_with("the socket belongs to user 65534"), "{error}");
        drop(listener);
    }
}
