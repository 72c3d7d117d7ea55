//! Live decisions, from the ring buffer that the programs fill while a reader is active.

use std::{
    fmt, fs, io,
    net::IpAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aya::maps::{Array, Map, MapData, MapError, RingBuf};
use intercept_common::{
    ProxyListener, Reason, Verdict,
    acceleration::{JoinCount, TcpReason},
    layout::{Event, container},
    names,
};
use serde::Serialize;
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    escape::OneLine,
    ids::{CookieNumber, NetnsCookie},
    node::NodeError,
    store::{Lock, Store, StoreError},
};

/// Why decisions cannot be traced.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(
        "another `intercept-agent trace` is running on this node; stop it first, because there can be only one reader"
    )]
    Busy(#[source] StoreError),
    #[error("{action} map {map}")]
    Map { action: &'static str, map: String, source: MapError },
    #[error("waiting for events")]
    Wait(#[source] io::Error),
}

/// The reader of events. The programs write events while it exists.
pub struct Trace {
    events: AsyncFd<RingBuf<MapData>>,
    switch: Array<MapData, u32>,
    // Dropped after `drop` has switched the events off, so that the next reader starts from there.
    _lock: Lock,
}

fn open<T: TryFrom<Map, Error = MapError>>(
    store: &Store,
    map: &'static str,
    wrap: fn(MapData) -> Map,
) -> Result<T, TraceError> {
    let path = store.maps().join(map);
    let opened = MapData::from_pin(&path).and_then(|data| T::try_from(wrap(data)));
    let map = || path.display().to_string();
    opened.map_err(|source| TraceError::Map { action: "opening", map: map(), source })
}

fn set(switch: &mut Array<MapData, u32>, value: u32) -> Result<(), TraceError> {
    switch.set(0, value, 0).map_err(|source| TraceError::Map {
        action: "writing to",
        map: names::TRACING.to_owned(),
        source,
    })
}

impl Trace {
    /// Switches the events on. Must be called in a tokio runtime with io enabled.
    pub fn start(store: &Store) -> Result<Self, TraceError> {
        let lock = store.lock_events().map_err(|error| match error.is_taken() {
            true => TraceError::Busy(error),
            false => error.into(),
        })?;
        let events: RingBuf<MapData> = open(store, names::EVENTS, Map::RingBuf)?;
        let mut switch = open(store, names::TRACING, Map::Array)?;
        // SAFETY: the ring buffer owns its descriptor, which does not change, until it is dropped.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) };
        let mut events = events.map_err(|error| TraceError::Wait(error.into()))?;
        // Discard events that an earlier reader did not read.
        while events.get_mut().next().is_some() {}
        set(&mut switch, 1)?;
        Ok(Self { events, switch, _lock: lock })
    }

    /// Waits for events and passes each to `take`. Returns false once `take` does.
    pub async fn read(&mut self, mut take: impl FnMut(&Event) -> bool) -> Result<bool, TraceError> {
        let mut ready = self.events.readable_mut().await.map_err(TraceError::Wait)?;
        while let Some(item) = ready.get_inner_mut().next() {
            // An event of another size would be from another layout, whose programs use another directory.
            if let Ok(event) = bytemuck::try_pod_read_unaligned(&item)
                && !take(&event)
            {
                return Ok(false);
            }
        }
        ready.clear_ready();
        Ok(true)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if let Err(error) = set(&mut self.switch, 0) {
            tracing::warn!(error = &error as &dyn std::error::Error, "switching the events off");
        }
    }
}

/// Switches off events that a killed reader has left on. Does nothing while there is a reader.
pub fn switch_off_if_unread(store: &Store) -> Result<(), StoreError> {
    let Ok(lock) = store.lock_events() else { return Ok(()) };
    let switched = open::<Array<MapData, u32>>(store, names::TRACING, Map::Array).and_then(|mut switch| {
        match switch.get(&0, 0) {
            Ok(0) => Ok(()),
            _ => set(&mut switch, 0),
        }
    });
    if let Err(error) = switched {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "switching off events that no process reads"
        );
    }
    drop(lock);
    Ok(())
}

/// An event as it is printed. Its names are stable.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// Seconds since the epoch.
    pub time: f64,
    #[serde(with = "CookieNumber")]
    pub netns_cookie: NetnsCookie,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    pub direction: &'static str,
    pub protocol: &'static str,
    pub source: IpAddr,
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<&'static str>,
    pub verdict: &'static str,
    pub reason: &'static str,
}

/// The time since 1970 from which `CLOCK_MONOTONIC` counts.
pub(crate) fn boot_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let up = Duration::new(
        u64::try_from(now.tv_sec).unwrap_or_default(),
        u32::try_from(now.tv_nsec).unwrap_or_default(),
    );
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(up)
}

/// Formats events as lines.
pub struct Printer {
    boot: Duration,
}

impl Printer {
    /// Reads the boot time, from which events count.
    pub fn new() -> Self {
        Self { boot: boot_time() }
    }

    /// Returns the line for an event, with a name for its pod.
    pub fn line(&self, event: &Event, pod: Option<String>) -> Line {
        let inbound = event.inbound != 0;
        let (verdict, reason) = outcome(event);
        let is_owned = !inbound && event.acceleration == 0;
        let owned = |value: u32| is_owned.then_some(value);
        Line {
            time: (self.boot + Duration::from_nanos(event.time)).as_secs_f64(),
            netns_cookie: event.netns,
            pod,
            direction: if inbound { "inbound" } else { "outbound" },
            protocol: match event.protocol {
                6 => "tcp",
                17 => "udp",
                _ => "other",
            },
            source: event.src.into(),
            source_port: event.src_port,
            destination: event.dst.into(),
            destination_port: event.dst_port,
            pid: owned(event.pid),
            process: match event.acceleration {
                0 => is_owned.then(|| process(event)),
                _ => Some(name(event)).filter(|name| !name.is_empty()),
            },
            uid: owned(event.uid),
            gid: owned(event.gid),
            container: container_kind(event.container),
            verdict,
            reason,
        }
    }
}

impl Default for Printer {
    fn default() -> Self {
        Self::new()
    }
}

/// Which container of the options a process runs in. `None` if in neither, or if the options name none.
fn container_kind(bits: u8) -> Option<&'static str> {
    match u32::from(bits) {
        bits if bits & container::EXEMPT != 0 => Some("exempt"),
        bits if bits & container::PROXY != 0 => Some("proxy"),
        _ => None,
    }
}

/// Verdict and reason of a decision, or what became of a connection between proxies.
fn outcome(event: &Event) -> (&'static str, &'static str) {
    let Some(counter) = event.acceleration.checked_sub(1) else {
        let reason = Reason::ALL.get(usize::from(event.reason)).copied();
        let verdict = match reason.map(Reason::verdict) {
            None => "unknown",
            Some(Verdict::Pass) => "leave",
            Some(Verdict::Redirect(ProxyListener::Outbound)) => "outbound_port",
            Some(Verdict::Redirect(ProxyListener::Inbound)) => "inbound_port",
            Some(Verdict::Redirect(ProxyListener::Dns)) => "dns_port",
        };
        return (verdict, reason.map_or("unknown", Reason::as_str));
    };
    let verdict = if counter == JoinCount::Joined as u32 { "joined" } else { "tcp" };
    let connections = JoinCount::ALL.iter().map(|count| count.as_str());
    let mut words = connections.chain(TcpReason::ALL.iter().map(|reason| reason.as_str()));
    (verdict, usize::try_from(counter).ok().and_then(|counter| words.nth(counter)).unwrap_or("unknown"))
}

/// Returns the name of the process, or that of the thread if the process is gone.
fn process(event: &Event) -> String {
    let name = fs::read_to_string(format!("/proc/{}/comm", event.pid)).ok();
    let name = name.map(|name| name.trim_end().to_owned());
    name.unwrap_or_else(|| self::name(event))
}

/// Returns the name in the event: of the thread, or the beginning of a refused proxy's executable.
fn name(event: &Event) -> String {
    let end = event.comm.iter().position(|byte| *byte == 0).unwrap_or(event.comm.len());
    String::from_utf8_lossy(&event.comm[..end]).into_owned()
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = |ip: &IpAddr, port: u16| std::net::SocketAddr::new(*ip, port).to_string();
        write!(f, "{:.6} ", self.time)?;
        match &self.pod {
            Some(pod) => write!(f, "{} ", OneLine(pod))?,
            None => write!(f, "netns:{} ", self.netns_cookie)?,
        }
        write!(f, "{} {} ", self.direction, self.protocol)?;
        match (&self.process, self.pid, self.uid, self.gid) {
            (Some(process), Some(pid), Some(uid), Some(gid)) => {
                write!(f, "{}[{pid}] {uid}:{gid} ", OneLine(process))?;
                if let Some(container) = self.container {
                    write!(f, "in the {container} container ")?;
                }
            }
            (Some(process), ..) => {
                write!(f, "{} {} ", OneLine(process), end(&self.source, self.source_port))?;
            }
            _ => write!(f, "{} ", end(&self.source, self.source_port))?,
        }
        write!(f, "-> {} {} ({})", end(&self.destination, self.destination_port), self.verdict, self.reason)
    }
}

#[cfg(test)]
mod tests {
    use intercept_common::Addr;

    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().expect("an address").into()
    }

    fn event() -> Event {
        let mut comm = [0; 16];
        comm[..4].copy_from_slice(b"curl");
        Event {
            time: 1_500_000_000,
            netns: NetnsCookie(42),
            dst: addr("10.96.0.1"),
            src: addr("0.0.0.0"),
            dst_port: 80,
            src_port: 0,
            // Higher than any pid.
            pid: u32::MAX,
            uid: 1000,
            gid: 1000,
            reason: Reason::IncludedCidr as u8,
            protocol: 6,
            inbound: 0,
            container: 0,
            comm,
            acceleration: 0,
        }
    }

    #[test]
    fn an_outbound_event_names_its_process() {
        let printer = Printer { boot: Duration::from_secs(1000) };
        let line = printer.line(&event(), Some("default/app".into()));
        assert_eq!(
            line.to_string(),
            "1001.500000 default/app outbound tcp curl[4294967295] 1000:1000 -> 10.96.0.1:80 outbound_port (included_cidr)"
        );
    }

    #[test]
    fn the_container_of_a_process_is_named_where_it_counts() {
        let printer = Printer { boot: Duration::ZERO };
        for (bits, text) in [(container::PROXY, "proxy"), (container::EXEMPT, "exempt")] {
            let event = Event { container: u8::try_from(bits).expect("few bits"), ..event() };
            let line = printer.line(&event, None);
            assert!(line.to_string().contains(&format!("1000:1000 in the {text} container -> ")), "{line}");
            assert_eq!(serde_json::to_value(&line).expect("json")["container"], text);
        }
        let json = serde_json::to_value(printer.line(&event(), None)).expect("json");
        assert!(json.get("container").is_none(), "{json}");
    }

    #[test]
    fn an_event_of_a_connection_between_proxies_says_what_became_of_it() {
        let printer = Printer { boot: Duration::ZERO };
        let of = |counter: usize| Event {
            acceleration: u32::try_from(counter + 1).expect("few"),
            src: addr("10.71.0.2"),
            src_port: 5555,
            pid: 0,
            comm: [0; 16],
            ..event()
        };
        let line = |event: &Event| printer.line(event, Some("shop/cart".into())).to_string();
        let begin = "1.500000 shop/cart outbound tcp 10.71.0.2:5555 -> 10.96.0.1:80";
        assert_eq!(line(&of(JoinCount::Joined as usize)), format!("{begin} joined (joined)"));
        let latched = of(JoinCount::ALL.len() + TcpReason::Bytes as usize);
        assert_eq!(line(&latched), format!("{begin} tcp (unread_bytes)"));
        let mut refused = of(JoinCount::RefusedProxy as usize);
        refused.comm[..4].copy_from_slice(b"curl");
        let begin = "1.500000 shop/cart outbound tcp curl 10.71.0.2:5555 -> 10.96.0.1:80";
        assert_eq!(line(&refused), format!("{begin} tcp (refused_proxy)"));
    }

    #[test]
    fn a_name_cannot_steer_the_terminal() {
        let printer = Printer { boot: Duration::ZERO };
        let mut event = event();
        event.comm[..8].copy_from_slice(b"\x1b[2J\n\xc2\x9b1");
        let line = printer.line(&event, Some("a\r/b".into()));
        let expected = r"1.500000 a\r/b outbound tcp \u{1b}[2J\n\u{9b}1[4294967295] 1000:1000 -> ";
        assert!(line.to_string().starts_with(expected), "{:?}", line.to_string());
    }

    #[test]
    fn an_inbound_event_names_its_client_and_no_process() {
        let printer = Printer { boot: Duration::ZERO };
        let src = addr("2001:db8::1");
        let event = Event { inbound: 1, src, src_port: 5555, reason: Reason::InboundAll as u8, ..event() };
        let line = printer.line(&event, None);
        assert_eq!(
            line.to_string(),
            "1.500000 netns:42 inbound tcp [2001:db8::1]:5555 -> 10.96.0.1:80 inbound_port (inbound_all)"
        );
        let json = serde_json::to_value(&line).expect("json");
        assert!(json.get("process").is_none() && json.get("uid").is_none(), "{json}");
    }
}
