//! The sources of desired pods.
//!
//! A source sends its claims to the reconciler in messages, and nothing else. [`super::view`] merges the claims of
//! several sources on one pod. To add one: implement [`PodSource`], give its claim a [`Message`] and a field of
//! [`super::view::PodView`], and open it in [`super::serve`].

use futures_util::future::BoxFuture;
use tokio::sync::mpsc::UnboundedSender;

use super::{ready::Readiness, reconcile::Message};

/// What a source works with.
#[derive(Clone)]
pub struct SourceContext {
    /// The reconciler's inbox.
    pub messages: UnboundedSender<Message>,
    /// Whether this daemon could capture a pod now.
    pub readiness: Readiness,
}

/// A source of pods. Its constructor opens it and may fail. It runs once the applied pods are known, because only
/// then may it end claims.
pub trait PodSource: Send {
    /// Its name in logs.
    fn name(&self) -> &'static str;

    /// Sends a claim for every pod, then every change, until the reconciler ends.
    fn run(self: Box<Self>, context: SourceContext) -> BoxFuture<'static, ()>;
}
