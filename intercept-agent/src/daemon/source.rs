//! Where it is said which pods are desired.
//!
//! A source tells the reconciler of its claims by messages, and of nothing else. What several sources say of one pod is
//! merged below them, in [`super::view`]. To add one: implement [`PodSource`], give its claim a [`Message`] and a field
//! of [`super::view::PodView`], and open it in [`super::serve`].

use futures_util::future::BoxFuture;
use tokio::sync::mpsc::UnboundedSender;

use super::{ready::Readiness, reconcile::Message};

/// What a source has to do with.
#[derive(Clone)]
pub struct SourceContext {
    /// The way to the reconciler.
    pub messages: UnboundedSender<Message>,
    /// Whether this daemon could capture a pod.
    pub readiness: Readiness,
}

/// A source of pods. It is opened by its own constructor, which may fail, and run once what is applied is known: only
/// then may it say what is not desired any more.
pub trait PodSource: Send {
    /// Its name in logs.
    fn name(&self) -> &'static str;

    /// Tell of every pod, then of every change, until the reconciler is gone.
    fn run(self: Box<Self>, context: SourceContext) -> BoxFuture<'static, ()>;
}
