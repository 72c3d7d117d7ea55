//! The table of metrics: the name, labels, kind and help of each.
//!
//! Registration and the table of docs/operations.md (`cargo xtask docs`) come from it. A row's comment is what the
//! document says of it, where that is more than the help.

use std::marker::PhantomData;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{self, Registry},
};

/// A metric of this kind, with its labels.
pub(super) struct MetricDef<M> {
    name: &'static str,
    help: &'static str,
    kind: PhantomData<fn() -> M>,
}

impl<M: registry::Metric + Clone> MetricDef<M> {
    const fn new(name: &'static str, help: &'static str) -> Self {
        Self { name, help, kind: PhantomData }
    }

    /// Registers one that has counted nothing.
    pub(super) fn register(&self, registry: &mut Registry) -> M
    where
        M: Default,
    {
        self.register_as(registry, M::default())
    }

    /// Registers this one.
    pub(super) fn register_as(&self, registry: &mut Registry, metric: M) -> M {
        registry.register(self.name, self.help, metric.clone());
        metric
    }
}

/// A registry for metrics of the table.
pub(super) fn registry() -> Registry {
    Registry::with_prefix("intercept")
}

macro_rules! labels {
    ($($name:ident { $($field:ident: $kind:ty),+ })+) => {
        $(
            #[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
            pub(super) struct $name { $(pub(super) $field: $kind),+ }
        )+
    };
}

labels! {
    CauseLabel { cause: String }
    Result { result: String }
    State { state: String }
    Why { why: String }
    Decision { pod: String, reason: String }
    Failed { pod: String, failure: String }
    Named { pod: String }
    Of { map: String }
    PodCause { pod: String, cause: String }
    PodMap { pod: String, map: String }
}

macro_rules! metrics {
    ($($(#[doc = $document:literal])* $row:ident: $kind:ty = $name:literal, $help:literal;)+) => {
        $($(#[doc = $document])* pub(super) const $row: MetricDef<$kind> = MetricDef::new($name, $help);)+
    };
}

metrics! {
    /// pods: `captured`; `pending` and `leaving` for milliseconds; `failed` until an attempt succeeds; `left_alone` (ignored)
    PODS: Family<State, Gauge> = "pods", "Pods by state";
    /// pods that are ignored, by reason (below)
    PODS_LEFT_ALONE: Family<Why, Gauge> = "pods_left_alone", "Pods that are ignored, by reason";
    /// captured pods with connections from before the capture, which bypass the proxy until they close
    PREEXISTING_CONNECTIONS: Gauge = "pods_with_earlier_connections",
        "Captured pods with connections from before the capture";
    /// captures that were applied, by what had to be done
    ATTACHES: Family<Result, Counter> = "attaches", "Captures that were applied, by what had to be done";
    /// time to capture a pod that was not captured
    ATTACH_SECONDS: Histogram = "attach_seconds", "Time to capture a pod";
    /// failed attempts, by cause (below)
    ERRORS: Family<CauseLabel, Counter> = "errors", "Attempts on a pod that failed, by cause";
    /// probes of pods: `proven`, `nothing_to_prove`, or the cause of the failure ([trust.md](trust.md))
    PROOFS: Family<Result, Counter> = "proofs", "Probes of pods, by result";
    /// 1 for each pod whose connections do not reach its proxy, by cause ([trust.md](trust.md))
    POD_PROOF_FAILED: Family<PodCause, Gauge> = "pod_proof_failed",
        "Pods whose connections do not reach their proxy";
    /// open sockets of captured pods that go around the proxy, by cause ([trust.md](trust.md)), as of each pod's last audit
    BYPASSES: Family<CauseLabel, Gauge> = "bypasses", "Open sockets that go around the proxy, by cause";
    /// flows of pods in shadow mode: `agreed`, `differed` or `uncompared` ([shadow.md](shadow.md)); read every ten seconds
    SHADOW_FLOWS: Family<Result, Counter> = "shadow_flows", "Flows of pods in shadow mode, by result";
    /// kinds of differences that shadow mode has found in a pod ([shadow.md](shadow.md))
    POD_SHADOW_DIFFERENCES: Family<Named, Gauge> = "pod_shadow_differences",
        "Kinds of differences that shadow mode has found, by pod";
    /// pods that are to be cut over from iptables, or are: `comparing`, `refused`, `unfinished`, `cut_over`
    /// ([cutover.md](cutover.md))
    PODS_CUTOVER: Family<State, Gauge> = "pods_cutover", "Pods that are cut over from iptables, by state";
    /// flows, by the reason of the decision ([decision.md](decision.md)); `explain` prints the same word and its row
    DECISIONS: Family<Decision, Counter> = "decisions", "Decisions on flows, by pod and reason";
    /// failures inside the programs
    FAILURES: Family<Failed, Counter> = "failures", "Failures inside the programs, by pod";
    /// open redirected connections
    CONNECTIONS: Family<Named, Gauge> = "connections", "Redirected connections that are open, by pod";
    /// 1 if the node's CNI configuration has the plugin; only with `--cni-keep`
    PLUGIN_INSTALLED: Gauge = "plugin_installed", "Whether the node's CNI configuration has the plugin";
    /// how often the plugin was added to the configuration; if more than once a day, another program removes it
    PLUGIN_WRITES: Counter = "plugin_writes", "Times that the plugin was added to the node's CNI configuration";
    /// entries in use; new connections or pods are refused when a map is full
    MAP_ENTRIES: Family<Of, Gauge> = "map_entries", "Entries in use, by map";
    /// size of the map
    MAP_MAX_ENTRIES: Family<Of, Gauge> = "map_max_entries", "Size of the map";
    /// a pod's entries in a map
    POD_MAP_ENTRIES: Family<PodMap, Gauge> = "pod_map_entries", "Entries that a pod has in a map of lists";
    /// budget of one pod in a map
    POD_MAP_MAX_ENTRIES: Family<Of, Gauge> = "pod_map_max_entries",
        "Entries that one pod may have in a map of lists";
}
