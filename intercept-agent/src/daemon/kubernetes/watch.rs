//! A watch that is retried, and reported once when the API is lost and once when it is back.
//!
//! The stream of `kube` begins each attempt with an event, so its own backoff starts again with every attempt. It also goes
//! on without an event where it can, which says nothing of the API: after an outage the objects are listed again.

use std::{fmt::Debug, time::Duration};

use futures_util::{StreamExt as _, stream::BoxStream};
use kube::{
    Api,
    runtime::watcher::{self, Event},
};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep_until};

use crate::daemon::retry;

/// How long a watch must last before it counts as restored. A server that lists and then refuses the watch restores
/// nothing.
const STABLE: Duration = Duration::from_secs(2);
/// The failure from which on the delay no longer grows: after six seconds the API is tried again.
const LONGEST_DELAY: u32 = 7;
/// Connections end now and then, at a proxy or when the API is restarted. A second one within this time is an outage.
const CUT: Duration = Duration::from_secs(60);
/// Most different errors that are reported in one outage.
const MAX_REPORTED: usize = 8;

/// A watch on the objects of one kind.
pub(super) struct Watch<K> {
    api: Api<K>,
    config: watcher::Config,
    events: BoxStream<'static, watcher::Result<Event<K>>>,
    objects: &'static str,
    outage: Outage,
    /// When the next attempt begins.
    retry_at: Option<Instant>,
}

/// What has failed since the watch last worked.
#[derive(Debug, Default)]
struct Outage {
    since: Option<Instant>,
    /// When an established watch was last cut off.
    cut: Option<Instant>,
    failures: u32,
    reported: Vec<String>,
    /// When the watch counts as restored, if nothing fails until then.
    stable_at: Option<Instant>,
}

impl<K> Watch<K>
where
    K: kube::Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    /// Watches these objects, called `objects` in the log.
    pub(super) fn new(api: Api<K>, config: watcher::Config, objects: &'static str) -> Self {
        let events = watcher::watcher(api.clone(), config.clone()).boxed();
        Self { api, config, events, objects, outage: Outage::default(), retry_at: None }
    }

    /// Returns the next event. Errors are reported and retried. Can be cancelled without losing an event.
    pub(super) async fn next(&mut self) -> Option<Event<K>> {
        loop {
            if let Some(at) = self.retry_at {
                sleep_until(at).await;
                self.retry_at = None;
            }
            let stable_at = self.outage.stable_at;
            tokio::select! {
                event = self.events.next() => match event? {
                    Ok(event) => {
                        if matches!(event, Event::InitDone) {
                            self.outage.listed(Instant::now());
                        }
                        return Some(event);
                    }
                    Err(error) => self.failed(&error),
                },
                () = sleep_until(stable_at.unwrap_or_else(Instant::now)), if stable_at.is_some() => {
                    if let Some(lasted) = self.outage.end(Instant::now()) {
                        let seconds = lasted.as_secs();
                        tracing::info!(objects = self.objects, seconds, "the API is back: the watch works again");
                    }
                }
            }
        }
    }

    fn failed(&mut self, error: &watcher::Error) {
        let now = Instant::now();
        let text = text(error);
        if matches!(error, watcher::Error::WatchFailed(_)) && self.outage.is_first_cut(now) {
            tracing::debug!(objects = self.objects, error = text, "the watch was cut off, and continues");
            self.retry_at = Some(now + retry::delay(1));
            return;
        }
        if let watcher::Error::WatchStartFailed(_) | watcher::Error::WatchFailed(_) = error {
            self.events = watcher::watcher(self.api.clone(), self.config.clone()).boxed();
        }
        if self.outage.failed(&text, now) {
            tracing::warn!(
                objects = self.objects,
                error = text,
                "watching the API: active captures stay, and the watch is retried"
            );
        }
        self.retry_at = Some(now + retry::delay(self.outage.failures.min(LONGEST_DELAY)));
    }
}

impl Outage {
    /// Whether an established watch was cut off that had worked for a while.
    fn is_first_cut(&mut self, now: Instant) -> bool {
        let before = self.cut.replace(now);
        self.since.is_none() && before.is_none_or(|before| now - before > CUT)
    }

    /// Counts a failure. Returns whether it is to be reported: the first of each kind is.
    fn failed(&mut self, error: &str, now: Instant) -> bool {
        self.since.get_or_insert(now);
        self.failures += 1;
        self.stable_at = None;
        let new = self.reported.len() < MAX_REPORTED && !self.reported.iter().any(|known| known == error);
        if new {
            self.reported.push(error.to_owned());
        }
        new
    }

    /// The API has listed all objects.
    fn listed(&mut self, now: Instant) {
        self.stable_at = self.since.map(|_| now + STABLE);
    }

    /// Ends the outage. Returns how long it lasted.
    fn end(&mut self, now: Instant) -> Option<Duration> {
        std::mem::take(self).since.map(|since| now - since)
    }
}

/// Returns a short text for an error. The errors' own texts repeat their sources and contain all fields of the API's
/// answer.
fn text(error: &watcher::Error) -> String {
    let (what, cause) = match error {
        watcher::Error::InitialListFailed(cause) => ("listing", cause),
        watcher::Error::WatchStartFailed(cause) => ("starting to watch", cause),
        watcher::Error::WatchFailed(cause) => ("watching", cause),
        watcher::Error::WatchError(status) => {
            return format!("the API has ended the watch: {}", status.message);
        }
        error @ watcher::Error::NoResourceVersion => return error.to_string(),
    };
    if let kube::Error::Api(status) = cause {
        return format!("{what}: the API refused the request: {}", status.message);
    }
    // The innermost error comes from the system or the server.
    let sources = std::iter::successors(Some(cause as &dyn std::error::Error), |error| error.source());
    format!("{what}: {}", sources.last().map(ToString::to_string).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_reported_once_and_ends_when_the_watch_lasts() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut outage = Outage::default();
        outage.listed(at(0));
        assert_eq!(outage.stable_at, None, "nothing has failed yet");
        let reported: Vec<_> = (1..100).filter(|n| outage.failed("refused", at(*n))).collect();
        assert_eq!(reported, [1]);
        assert!(outage.failed("forbidden", at(100)), "another error is news");
        // A server that lists, and refuses the watch each time.
        for n in 101..110 {
            outage.listed(at(n));
            assert_eq!(outage.stable_at, Some(at(n) + STABLE));
            assert!(!outage.failed("forbidden", at(n)));
            assert_eq!(outage.stable_at, None);
        }
        outage.listed(at(110));
        assert_eq!(outage.end(at(112)), Some(Duration::from_secs(111)));
        assert_eq!((outage.failures, outage.stable_at), (0, None));
        assert!(outage.failed("refused", at(200)), "the next outage is reported again");
    }

    #[test]
    fn a_watch_that_is_cut_off_now_and_then_is_no_outage() {
        let start = Instant::now();
        let mut outage = Outage::default();
        for n in 0..3 {
            assert!(outage.is_first_cut(start + CUT * (2 * n)), "{n}");
        }
        assert!(!outage.is_first_cut(start + CUT * 4 + Duration::from_secs(1)), "it did not work in between");
        outage.failed("refused", start + CUT * 9);
        assert!(!outage.is_first_cut(start + CUT * 10), "nothing works");
    }

    #[test]
    fn errors_that_differ_each_time_are_not_all_reported() {
        let mut outage = Outage::default();
        let now = Instant::now();
        let reported = (0..100).filter(|n| outage.failed(&format!("error {n}"), now)).count();
        assert_eq!(reported, MAX_REPORTED);
    }
}
