//! Kubernetes events for pods that could not be captured, where `kubectl describe pod` shows them.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// What the API takes of a message, in bytes.
const NOTE_BYTES: usize = 1024;
/// How many pods' last events are remembered.
const REMEMBERED: usize = 1024;

/// A pod of the API that could not be captured.
#[derive(Debug)]
pub struct PodEvent {
    /// The pod's UID.
    pub uid: String,
    /// Its namespace and name, with a slash between.
    pub name: String,
    /// Why, with the causes.
    pub text: String,
}

/// Publish what is sent here as events by this node's agent, for ever. Nothing waits for the API: an event that is not
/// taken is lost, and its text is in the log all the same.
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
    while let Some(PodEvent { uid, name, text }) = events.recv().await {
        let Some((namespace, pod)) = name.split_once('/') else { continue };
        // The recorder counts up the pod's last event, whose text stays as it was.
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
            type_: EventType::Warning,
            reason: "NotCaptured".to_owned(),
            note: Some(shortened(text)),
            action: "Capture".to_owned(),
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
