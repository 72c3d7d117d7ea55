//! `run`: one pod in the foreground.

use std::{
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use aya_log::EbpfLogger;
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{Signal, SignalKind, signal},
};

use self::place::RunPlace;
use super::{
    Failed,
    attach::{self, AttachRequest, apply_capture},
    machine::{self, MachineError},
    print_line,
};
use crate::{
    cli::AttachArgs,
    ids::NetnsCookie,
    netns::Netns,
    node::{Attached, Node, Rewrite},
    options::{Config, RunOptions},
    shadow::{ShadowRecord, ShadowReport},
};

mod place;

/// How often the differences that shadow mode has found are read.
const SHADOW_INTERVAL: Duration = Duration::from_secs(5);
/// How often the pod is checked, as by the daemon.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(400);

pub(super) fn run(args: AttachArgs) -> Result<()> {
    if args.confirm.is_some() {
        return Err(Failed::Machine(MachineError::ConfirmRun).into());
    }
    let request = AttachRequest::of(args)?;
    super::check::require_privileges()?;
    // Before the self-test of joined connections: the process's first runtime makes sockets for signals, which stay, and would keep
    // the self-test's namespace.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    super::accelerate::admit(&request.bpffs, &request.config)?;
    runtime.block_on(follow(request))
}

async fn follow(request: AttachRequest) -> Result<()> {
    let AttachRequest { target, config, switches, bpffs, max_connections, protected } = request;
    // Before the attach, so that no signal and no change is missed.
    let ends = EndSignals::listen()?;
    let mut changes = place::subscribe(&target, &config)?;
    let done =
        apply_capture(&bpffs, max_connections, (&target, &config), Rewrite::IfChanged, Some(&mut changes))?;
    let (name, cookie) = (machine::name_of(&target), target.netns.cookie());
    let changes = match changes.follow() {
        Ok(changes) => changes,
        Err(error) => {
            take_out(&bpffs, cookie, Some(&target.netns)).context("detaching")?;
            return Err(error.into());
        }
    };
    print_line!("{} {name} in namespace {}", done.as_str(), target.netns.name());
    if let Some(protected) = protected {
        print_line!("inbound: {}", protected.describe(&config));
    }
    tell_systemd();
    let mut place = RunPlace::new(target, changes);
    let kept = keep(&mut place, &name, ends, (config, switches), (&bpffs, max_connections)).await;
    // Whatever ends this, nothing would keep the capture up to date.
    let exists = !matches!(kept, Ok(Kept::Gone));
    let netns = place.open.map(|open| open.target.netns).filter(|_| exists);
    take_out(&bpffs, cookie, netns.as_ref()).context("detaching")?;
    if kept? == Kept::Gone {
        bail!(
            "{name} is gone, and its capture with it: what takes its place is not captured until it is attached"
        );
    }
    print_line!("detached {name}");
    Ok(())
}

/// The signals that end `run`.
struct EndSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl EndSignals {
    fn listen() -> Result<Self> {
        let interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        let terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        Ok(Self { interrupt, terminate })
    }
}

/// How `run` ends.
#[derive(PartialEq, Eq)]
enum Kept {
    /// By a signal.
    Interrupted,
    /// The pod is gone.
    Gone,
}

/// Keeps a capture up to date until a signal comes or the pod is gone.
async fn keep(
    place: &mut RunPlace,
    name: &str,
    mut ends: EndSignals,
    (mut config, switches): (Config, RunOptions),
    (bpffs, max_connections): (&Path, u32),
) -> Result<Kept> {
    if let Some(open) = place.open.as_ref().filter(|_| switches.run_validation) {
        attach::validate(&open.target, &config, &switches)?;
    }
    let mut lines = log_lines(bpffs)?;
    let mut compared = ShadowRecord::default();
    let mut compare = tokio::time::interval(SHADOW_INTERVAL);
    let mut check = tokio::time::interval(LIVENESS_INTERVAL);
    loop {
        tokio::select! {
            ready = lines.readable_mut() => {
                let mut ready = ready.context("waiting for log lines of the programs")?;
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
            _ = compare.tick(), if config.shadow => {
                if let Err(error) = log_differences(bpffs, place.cookie(), &mut compared) {
                    tracing::warn!("{error:#}");
                }
            }
            _ = ends.interrupt.recv() => return Ok(Kept::Interrupted),
            _ = ends.terminate.recv() => return Ok(Kept::Interrupted),
            _ = check.tick() => match place.exists(bpffs, &config) {
                Ok(true) => {}
                Ok(false) => return Ok(Kept::Gone),
                Err(error) => tracing::warn!("checking whether {name} exists: {error:#}"),
            },
            change = place.changed() => {
                if let Err(error) = change {
                    tracing::warn!(error = &error as &dyn std::error::Error, "following the namespace: reading it again");
                }
                let Some(open) = &place.open else { continue };
                match attach::apply_again(bpffs, max_connections, &open.target, &mut config) {
                    Ok(Attached::Unchanged) => {}
                    Ok(_) => tracing::info!(netns = open.target.netns.name(), "applied a change of addresses or routes"),
                    Err(error) => tracing::error!("{error:#}: the previous policy stays active"),
                }
            }
        }
    }
}

/// Logs each kind of difference that shadow mode has found since the last call.
fn log_differences(bpffs: &Path, cookie: NetnsCookie, compared: &mut ShadowRecord) -> Result<()> {
    let Some(node) = Node::find(bpffs)? else { return Ok(()) };
    let report =
        ShadowReport::read(node.maps().shadow(), cookie).context("reading what shadow mode has compared")?;
    for difference in report.map(|report| compared.update(&report).differences).unwrap_or_default() {
        tracing::warn!("shadow mode differs from what happened: {difference}");
    }
    Ok(())
}

/// Tells systemd that the capture is active (sd_notify), so that units of `Type=notify` are ordered after it.
fn tell_systemd() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = UnixDatagram::unbound().and_then(|socket| match path.as_bytes().strip_prefix(b"@") {
        Some(name) => socket.send_to_addr(b"READY=1", &SocketAddr::from_abstract_name(name)?),
        None => socket.send_to(b"READY=1", &path),
    });
    if let Err(error) = sent {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "telling systemd that the capture is active"
        );
    }
}

fn log_lines(bpffs: &Path) -> Result<AsyncFd<EbpfLogger<&'static dyn log::Log>>> {
    let node = Node::find(bpffs)?.context("the state that has just been written is gone")?;
    // SAFETY: the reader owns its descriptor, which does not change, until it is dropped.
    let reader = unsafe { AsyncFd::register_with_interest(node.log_reader()?, Interest::READABLE) };
    reader.map_err(std::io::Error::from).context("waiting for log lines of the programs")
}

fn take_out(bpffs: &Path, cookie: NetnsCookie, netns: Option<&Netns>) -> Result<()> {
    if let Some(mut node) = Node::find(bpffs)? {
        node.detach(cookie, netns)?;
        node.remove_if_unused()?;
    }
    Ok(())
}
