//! Metrics for Prometheus: counted by the daemon, or read from the programs' counters.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use self::table::{CauseLabel, Decision, Failed, Named, Of, PodCause, PodMap, Result, State, Why};
use super::{cause::Cause, plugin::PluginState};
use crate::{
    ids::NetnsCookie,
    maps::{Maps, PolicyUsage},
    node::{Attached, NodeError},
    store::Store,
};

mod table;

/// Bounds in seconds. An attach takes at most 5 ms, and 20 ms in one of a hundred cases.
const LATENCIES: [f64; 12] = [0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0];

/// Shared by all parts of the daemon.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    attaches: Family<Result, Counter>,
    latency: Histogram,
    errors: Family<CauseLabel, Counter>,
    pods: Family<State, Gauge>,
    left_alone: Family<Why, Gauge>,
    preexisting_connections: Gauge,
    proofs: Family<Result, Counter>,
    proofs_failed: Family<PodCause, Gauge>,
    bypasses: Family<CauseLabel, Gauge>,
    shadow_flows: Family<Result, Counter>,
    shadow_differences: Family<Named, Gauge>,
    cutovers: Family<State, Gauge>,
    plugin: OnceLock<PluginMetrics>,
    started: Instant,
    /// When the reconciler last checked its pods, in milliseconds after `started`.
    beat: AtomicU64,
}

/// Only if the daemon keeps the CNI plugin installed.
struct PluginMetrics {
    registry: Registry,
    installed: Gauge,
    writes: Counter,
}

impl PluginMetrics {
    fn new() -> Self {
        let mut registry = table::registry();
        let installed = table::PLUGIN_INSTALLED.register(&mut registry);
        let writes = table::PLUGIN_WRITES.register(&mut registry);
        Self { registry, installed, writes }
    }
}

impl Metrics {
    /// Creates metrics that have counted nothing.
    pub fn new() -> Self {
        let mut registry = table::registry();
        let attaches = table::ATTACHES.register(&mut registry);
        let latency = table::ATTACH_SECONDS.register_as(&mut registry, Histogram::new(LATENCIES));
        let errors = table::ERRORS.register(&mut registry);
        let pods = table::PODS.register(&mut registry);
        let left_alone = table::PODS_LEFT_ALONE.register(&mut registry);
        let preexisting_connections = table::PREEXISTING_CONNECTIONS.register(&mut registry);
        let proofs = table::PROOFS.register(&mut registry);
        let proofs_failed = table::POD_PROOF_FAILED.register(&mut registry);
        let bypasses = table::BYPASSES.register(&mut registry);
        let shadow_flows = table::SHADOW_FLOWS.register(&mut registry);
        let shadow_differences = table::POD_SHADOW_DIFFERENCES.register(&mut registry);
        let cutovers = table::PODS_CUTOVER.register(&mut registry);
        let beat = AtomicU64::new(0);
        let started = Instant::now();
        Self(Arc::new(Inner {
            registry,
            attaches,
            latency,
            errors,
            pods,
            left_alone,
            preexisting_connections,
            proofs,
            proofs_failed,
            bypasses,
            shadow_flows,
            shadow_differences,
            cutovers,
            plugin: OnceLock::new(),
            started,
            beat,
        }))
    }

    /// Counts a captured pod.
    pub fn captured(&self, done: Attached, took: Duration) {
        self.0.attaches.get_or_create(&Result { result: done.as_str().to_owned() }).inc();
        if done == Attached::New {
            self.0.latency.observe(took.as_secs_f64());
        }
    }

    /// Counts a failed attempt.
    pub fn error(&self, cause: Cause) {
        self.0.errors.get_or_create(&CauseLabel { cause: cause.as_str().to_owned() }).inc();
    }

    /// Sets the number of pods in each state.
    pub fn pods(&self, counts: impl IntoIterator<Item = (&'static str, usize)>) {
        for (state, count) in counts {
            self.0
                .pods
                .get_or_create(&State { state: state.to_owned() })
                .set(count.try_into().unwrap_or(i64::MAX));
        }
    }

    /// Sets the number of ignored pods by reason.
    pub fn left_alone(&self, counts: &BTreeMap<&'static str, usize>) {
        self.0.left_alone.clear();
        for (why, count) in counts {
            let gauge = self.0.left_alone.get_or_create(&Why { why: (*why).to_owned() }).clone();
            gauge.set((*count).try_into().unwrap_or(i64::MAX));
        }
    }

    /// Sets the number of captured pods with connections from before the capture.
    pub fn preexisting_connections(&self, pods: usize) {
        self.0.preexisting_connections.set(pods.try_into().unwrap_or(i64::MAX));
    }

    /// Counts a probe.
    pub fn proof(&self, result: &str) {
        self.0.proofs.get_or_create(&Result { result: result.to_owned() }).inc();
    }

    /// Sets which pods do not reach their proxy, by name and cause.
    pub fn proofs_failed(&self, failed: Vec<(String, String)>) {
        self.0.proofs_failed.clear();
        for (pod, cause) in failed {
            self.0.proofs_failed.get_or_create(&PodCause { pod, cause }).set(1);
        }
    }

    /// Counts flows of a pod in shadow mode, by result.
    pub fn compared(&self, flows: [(&'static str, u64); 3]) {
        for (result, count) in flows {
            self.0.shadow_flows.get_or_create(&Result { result: result.to_owned() }).inc_by(count);
        }
    }

    /// Sets the number of kinds of differences of each pod in shadow mode.
    pub fn shadow_differences(&self, pods: Vec<(String, usize)>) {
        self.0.shadow_differences.clear();
        for (pod, kinds) in pods {
            let gauge = self.0.shadow_differences.get_or_create(&Named { pod }).clone();
            gauge.set(kinds.try_into().unwrap_or(i64::MAX));
        }
    }

    /// Sets the number of pods in each state of their cut-over.
    pub fn cutovers(&self, counts: impl IntoIterator<Item = (&'static str, usize)>) {
        for (state, count) in counts {
            let gauge = self.0.cutovers.get_or_create(&State { state: state.to_owned() }).clone();
            gauge.set(count.try_into().unwrap_or(i64::MAX));
        }
    }

    /// Sets the number of sockets that go around the proxy, by cause.
    pub fn bypasses(&self, counts: &BTreeMap<&'static str, usize>) {
        self.0.bypasses.clear();
        for (cause, count) in counts {
            let gauge = self.0.bypasses.get_or_create(&CauseLabel { cause: (*cause).to_owned() }).clone();
            gauge.set((*count).try_into().unwrap_or(i64::MAX));
        }
    }

    /// Sets whether the CNI plugin is installed.
    pub fn plugin(&self, state: &PluginState) {
        self.plugin_metrics().installed.set(i64::from(state.problem().is_none()));
    }

    /// Counts a write of the CNI plugin into the configuration.
    pub fn plugin_written(&self) {
        self.plugin_metrics().writes.inc();
    }

    fn plugin_metrics(&self) -> &PluginMetrics {
        self.0.plugin.get_or_init(PluginMetrics::new)
    }

    /// Stores that the reconciler is alive.
    pub fn heartbeat(&self) {
        let now = u64::try_from(self.0.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.beat.store(now, Ordering::Relaxed);
    }

    /// How long ago the reconciler was alive.
    pub fn since_beat(&self) -> Duration {
        self.0.started.elapsed().saturating_sub(Duration::from_millis(self.0.beat.load(Ordering::Relaxed)))
    }

    /// Returns all metrics as text, with the programs' counters as they are in this bpffs now. `names` has the names of
    /// pods by the cookies of their namespaces.
    pub fn text(&self, bpffs: &Path, names: &HashMap<NetnsCookie, String>) -> String {
        let mut text = String::new();
        let mut written = text::encode_registry(&mut text, &self.0.registry);
        if let Some(plugin) = self.0.plugin.get() {
            written = written.and(text::encode_registry(&mut text, &plugin.registry));
        }
        let mut node = table::registry();
        if let Err(error) = read_node(&mut node, bpffs, names) {
            self.error(Cause::Metrics);
            tracing::error!(error = &error as &dyn std::error::Error, "reading the counters of the programs");
        }
        let written = written.and(text::encode_registry(&mut text, &node)).and(text::encode_eof(&mut text));
        written.expect("a string takes any text");
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn read_node(
    registry: &mut Registry,
    bpffs: &Path,
    names: &HashMap<NetnsCookie, String>,
) -> std::result::Result<(), NodeError> {
    let decisions = table::DECISIONS.register(registry);
    let failures = table::FAILURES.register(registry);
    let connections = table::CONNECTIONS.register(registry);
    let entries = table::MAP_ENTRIES.register(registry);
    let capacity = table::MAP_MAX_ENTRIES.register(registry);
    let used = table::POD_MAP_ENTRIES.register(registry);
    let budgets = table::POD_MAP_MAX_ENTRIES.register(registry);

    // Without the lock, because reading must not wait for an attach.
    let Some(store) = Store::find(bpffs)? else { return Ok(()) };
    let maps = Maps::open(&store.maps())?;
    let name = |cookie: NetnsCookie| names.get(&cookie).cloned().unwrap_or_else(|| format!("netns:{cookie}"));
    let fill = maps.fill(&store.maps())?;
    for (cookie, policy) in maps.policies()? {
        let pod = name(cookie);
        let counters = maps.counters(policy.slot)?;
        for (reason, count) in counters.by_reason().filter(|(_, count)| *count > 0) {
            let labels = Decision { pod: pod.clone(), reason: reason.as_str().to_owned() };
            decisions.get_or_create(&labels).inc_by(count);
        }
        for (failure, count) in counters.by_failure().filter(|(_, count)| *count > 0) {
            let labels = Failed { pod: pod.clone(), failure: failure.as_str().to_owned() };
            failures.get_or_create(&labels).inc_by(count);
        }
        for (map, entries, _) in fill.usage.get(&policy.id).copied().unwrap_or_default().by_map() {
            let labels = PodMap { pod: pod.clone(), map: map.to_owned() };
            used.get_or_create(&labels).set(entries.try_into().unwrap_or(i64::MAX));
        }
        let open = maps.connections(policy.slot);
        connections.get_or_create(&Named { pod }).set(open.try_into().unwrap_or(i64::MAX));
    }
    for (map, _, budget) in PolicyUsage::default().by_map() {
        budgets.get_or_create(&Of { map: map.to_owned() }).set(budget.into());
    }
    for (map, used, room) in fill.maps {
        let labels = Of { map: map.to_owned() };
        entries.get_or_create(&labels).set(used.try_into().unwrap_or(i64::MAX));
        capacity.get_or_create(&labels).set(room.into());
    }
    Ok(())
}
