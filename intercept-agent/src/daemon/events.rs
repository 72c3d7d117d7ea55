//! Kubernetes events for pods that cannot be captured, as `kubectl describe pod` shows them.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Most bytes of a message that the API accepts.
const NOTE_BYTES: usize = 1024;
/// Number of pods whose last event is remembered.
const REMEMBERED: usize = 1024;

/// What an event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The pod cannot be captured.
    NotCaptured,
    /// Its connections do not reach its proxy.
    NotProven,
    /// They reach it again.
    Proven,
    /// Shadow mode would have done something else than what happened.
    ShadowDiffers,
    /// The pod is not cut over from iptables to the agent, or not back.
    NotCutOver,
    /// It is cut over.
    CutOver,
    /// Its rules of iptables capture it again.
    CutBack,
}

impl EventKind {
    fn reason(self) -> &'static str {
        match self {
            Self::NotCaptured => "NotCaptured",
            Self::NotProven => "NotProven",
            Self::Proven => "Proven",
            Self::ShadowDiffers => "ShadowDiffers",
            Self::NotCutOver => "NotCutOver",
            Self::CutOver => "CutOver",
            Self::CutBack => "CutBack",
        }
    }

    fn action(self) -> &'static str {
        match self {
            Self::NotCaptured => "Capture",
            Self::NotProven | Self::Proven => "Prove",
            Self::ShadowDiffers => "Compare",
            Self::NotCutOver | Self::CutOver | Self::CutBack => "CutOver",
        }
    }

    fn type_(self) -> EventType {
        match self {
            Self::NotCaptured | Self::NotProven | Self::ShadowDiffers | Self::NotCutOver => {
                EventType::Warning
            }
            Self::Proven | Self::CutOver | Self::CutBack => EventType::Normal,
        }
    }
}

/// An event on a pod of the API.
#[derive(Debug)]
pub struct PodEvent {
    /// The pod's UID.
    pub uid: String,
    /// Namespace and name, separated by a slash.
    pub name: String,
    /// What it says.
    pub kind: EventKind,
    /// The error with its causes.
    pub text: String,
}

/// Publishes what is sent to the returned channel as events of this node's agent, forever. Nothing waits for the API.
/// An event that the API does not accept is lost, but its text is also logged.
pub fn publish(client: Client, node: String) -> UnboundedSender<PodEvent> {
    let (sender, events) = unbounded_channel();
    let reporter = Reporter { controller: "intercept-agent".to_owned(), instance: Some(node) };
    tokio::spawn(follow(client, reporter, events));
    sender
}

async fn follow(client: Client, reporter: Reporter, mut events: UnboundedReceiver<PodEvent>) {
    let fresh = || Recorder::new(client.clone(), reporter.clone());
    let mut recorder = fresh();
    let mut said = HashMap::<String, String>::new();
    while let Some(PodEvent { uid, name, kind, text }) = events.recv().await {
        let Some((namespace, pod)) = name.split_once('/') else { continue };
        // The recorder increments the count of the pod's last event and keeps its text, so a new text needs a new
        // event.
        if said.insert(uid.clone(), text.clone()).is_some_and(|before| before != text)
            || said.len() > REMEMBERED
        {
            recorder = fresh();
            said = HashMap::from([(uid.clone(), text.clone())]);
        }
        let reference = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(namespace.to_owned()),
            name: Some(pod.to_owned()),
            uid: Some(uid),
            ..ObjectReference::default()
        };
        let event = Event {
            type_: kind.type_(),
            reason: kind.reason().to_owned(),
            note: Some(shortened(text)),
            action: kind.action().to_owned(),
            secondary: None,
        };
        if let Err(error) = recorder.publish(&event, &reference).await {
            tracing::warn!(
                name,
                error = &error as &dyn std::error::Error,
                "publishing an event for this pod"
            );
        }
    }
}

fn shortened(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(NOTE_BYTES));
    text
}
