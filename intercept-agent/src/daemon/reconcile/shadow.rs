//! What shadow mode finds in the pods: each kind of difference is said once, and all flows are counted.

use super::Reconciler;
use crate::{
    daemon::{desired::Key, events::EventKind},
    shadow::{ShadowRecord, ShadowReport},
};

impl Reconciler {
    /// The reports of all pods in shadow mode.
    pub(super) fn compared(&mut self, reports: &[ShadowReport]) {
        let mut news = Vec::<(Key, String)>::new();
        let mut differing = Vec::new();
        for (key, pod) in &mut self.pods {
            let cookie = pod.machine.phase.applied().map(|applied| applied.cookie);
            let Some(report) = reports.iter().find(|report| Some(report.netns_cookie) == cookie) else {
                pod.shadow = ShadowRecord::default();
                continue;
            };
            let found = pod.shadow.update(report);
            self.metrics.compared([
                ("agreed", found.agreed),
                ("differed", found.differed),
                ("uncompared", found.uncompared),
            ]);
            news.extend(found.differences.into_iter().map(|text| (key.clone(), text)));
            differing.push((pod.name.clone(), pod.shadow.kinds()));
        }
        self.metrics.shadow_differences(differing);
        for (key, text) in news {
            let name = self.pods.get(&key).map(|pod| pod.name.clone()).unwrap_or_default();
            tracing::warn!(pod = %key, name, "shadow mode differs from what happened: {text}");
            self.publish(&key, EventKind::ShadowDiffers, text);
        }
    }
}
