//! The machine as a table: each case is a run of events, with the commands and the state that each must lead to.

use std::time::Duration;

use super::{event::RUNNING_PATIENCE, *};
use crate::{
    daemon::{
        desired::{CaptureArgs, CaptureOptions},
        report::PodResult,
        takeover::Takeover,
        view::{ClaimError, Stage},
    },
    ids::NetnsCookie,
    record::RecordOrigin,
};

/// One step: what happens, what is commanded for it, and what the pod is then.
type TableStep = (MachineEvent, &'static str, &'static str);

fn desired(cgroup: &str) -> MachineEvent {
    desired_with(cgroup, &[])
}

fn desired_with(cgroup: &str, arguments: &[&str]) -> MachineEvent {
    let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    MachineEvent::Resolved(Resolution::Capture(Box::new(DesiredPod {
        origin: RecordOrigin::Command,
        cgroup: cgroup.into(),
        netns: None,
        options: CaptureOptions::Args(CaptureArgs { arguments, ..CaptureArgs::default() }),
        takeover: Takeover::None,
    })))
}

fn applied(cookie: u64) -> AppliedPod {
    AppliedPod {
        cookie: NetnsCookie(cookie),
        cgroup: "/c".into(),
        cgroup_id: 1,
        netns_inode: 2,
        netns_path: None,
    }
}

fn failed(cause: Cause, text: &str) -> FailedAttempt {
    let stage = if cause == Cause::NoProcess { AttemptStage::MayBeStarting } else { AttemptStage::Started };
    FailedAttempt { cause, failure: PodFailure { cause: cause.as_str().into(), text: text.into() }, stage }
}

fn refused(text: &str) -> MachineEvent {
    MachineEvent::Resolved(Resolution::Refuse(ClaimError::Options(text.into())))
}

fn ignored() -> MachineEvent {
    MachineEvent::Resolved(Resolution::Ignore(IgnoreReason::NoSidecar))
}

fn quiet() -> MachineContext {
    MachineContext {
        now: Instant::now(),
        delay: |failures| Duration::from_secs(failures.into()),
        add_waits: false,
        delete_waits: false,
        has_saved_rules: false,
        stage: None,
    }
}

fn name(command: &MachineCommand) -> String {
    let answer = |answer: &PodResult| match answer {
        Ok(how) => (*how).to_owned(),
        Err(failure) => format!("fail({})", failure.text),
    };
    let urgency = |priority: &Priority| if *priority == Priority::Urgent { "!" } else { "" };
    match command {
        MachineCommand::Capture { before, priority, .. } => {
            let before = before.as_ref().map_or("-".to_owned(), |before| before.cookie.to_string());
            format!("capture({before}){}", urgency(priority))
        }
        MachineCommand::Release { applied, priority } => {
            format!("release({}){}", applied.cookie, urgency(priority))
        }
        MachineCommand::Check(applied) => format!("check({})", applied.cookie),
        MachineCommand::StopFollowing => "unfollow".into(),
        MachineCommand::Answer(result) => format!("add:{}", answer(result)),
        MachineCommand::AnswerReleased(result) => format!("del:{}", answer(result)),
        MachineCommand::CountFailure(_) => "count".into(),
        MachineCommand::LogIgnored(_) | MachineCommand::LogStarting(_) | MachineCommand::LogRefused(_) => {
            "log".into()
        }
        MachineCommand::LogFailed { failures, .. } => format!("log({failures})"),
        MachineCommand::Publish(text) => format!("publish({text})"),
        MachineCommand::EndFailedAdd => "end-add".into(),
        MachineCommand::ForgetIfUnclaimed => "forget".into(),
    }
}

fn phase(machine: &PodMachine) -> String {
    let dirty = |change: PodChange| match change {
        PodChange::Clean => "",
        PodChange::Namespace => "+",
        PodChange::Dirty => "*",
    };
    let phase = match &machine.phase {
        Phase::Unapplied => "unapplied".to_owned(),
        Phase::Applied(applied) => format!("applied({})", applied.cookie),
        Phase::Capturing { change, .. } => format!("capturing{}", dirty(*change)),
        Phase::Releasing { change, .. } => format!("releasing{}", dirty(*change)),
        Phase::Checking { change, .. } => format!("checking{}", dirty(*change)),
    };
    let retry = if machine.backoff.retry_at.is_some() { " later" } else { "" };
    format!("{} {phase}{retry}", machine.state().as_str())
}

/// Runs the steps; `context` is the same for all of them.
fn run(case: &str, context: &MachineContext, steps: Vec<TableStep>) -> PodMachine {
    let mut machine = PodMachine::default();
    for (number, (event, commands, state)) in steps.into_iter().enumerate() {
        let event_text = format!("{event:?}");
        let commanded: Vec<String> = machine.on(event, context).iter().map(name).collect();
        let seen = (commanded.join(" "), phase(&machine));
        assert_eq!(seen, (commands.to_owned(), state.to_owned()), "{case}, step {number}: {event_text}");
    }
    machine
}

const SETTLED: &str = "unfollow del:released forget";
const DONE: &str = "add:captured del:released";

#[test]
fn what_is_desired_is_captured_and_what_is_not_is_released() {
    run(
        "one pod from begin to end",
        &quiet(),
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (MachineEvent::Captured(applied(7)), DONE, "captured applied(7)"),
            (desired("/a"), "", "captured applied(7)"),
            (MachineEvent::Recheck, "capture(7)", "captured capturing"),
            (MachineEvent::Captured(applied(7)), DONE, "captured applied(7)"),
            (desired("/b"), "capture(7)", "pending capturing"),
            (MachineEvent::Captured(applied(8)), DONE, "captured applied(8)"),
            (MachineEvent::Resolved(Resolution::Absent), "unfollow release(8)", "leaving releasing"),
            (MachineEvent::Released, SETTLED, "leaving unapplied"),
        ],
    );
    run(
        "taken over from an earlier daemon, and not desired",
        &quiet(),
        vec![
            (MachineEvent::Adopted(applied(7)), "", "leaving applied(7)"),
            (ignored(), "log unfollow release(7)", "left_alone releasing"),
            (MachineEvent::Released, "unfollow add:no_sidecar del:released forget", "left_alone unapplied"),
            (ignored(), "unfollow add:no_sidecar del:released forget", "left_alone unapplied"),
        ],
    );
    run(
        "no place yet, then the API's word",
        &quiet(),
        vec![
            (MachineEvent::Resolved(Resolution::AwaitApi), "", "pending unapplied"),
            (MachineEvent::Resolved(Resolution::Unplaced), SETTLED, "pending unapplied"),
            (desired("/a"), "capture(-)", "pending capturing"),
            (MachineEvent::Captured(applied(7)), DONE, "captured applied(7)"),
            (MachineEvent::Resolved(Resolution::AwaitApi), "", "captured applied(7)"),
        ],
    );
}

#[test]
fn what_changes_in_flight_is_looked_at_when_the_job_is_done() {
    run(
        "another policy during a capture",
        &quiet(),
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (desired("/b"), "", "pending capturing*"),
            (MachineEvent::Captured(applied(7)), "capture(7)", "pending capturing"),
            (MachineEvent::Captured(applied(7)), DONE, "captured applied(7)"),
        ],
    );
    run(
        "no longer desired during a capture",
        &quiet(),
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (MachineEvent::SandboxEnded, "", "leaving capturing"),
            (MachineEvent::Resolved(Resolution::Absent), "", "leaving capturing*"),
            (
                MachineEvent::CaptureFailed(failed(Cause::Kernel, "x")),
                "count unfollow del:released forget",
                "leaving unapplied",
            ),
        ],
    );
    run(
        "desired again during a release",
        &quiet(),
        vec![
            (MachineEvent::Adopted(applied(7)), "", "leaving applied(7)"),
            (MachineEvent::Resolved(Resolution::Absent), "unfollow release(7)", "leaving releasing"),
            (desired("/a"), "", "pending releasing*"),
            (MachineEvent::Released, "capture(-)", "pending capturing"),
        ],
    );
}

#[test]
fn failures_are_tried_again_later_and_said_once() {
    let fail = || MachineEvent::CaptureFailed(failed(Cause::Kernel, "x"));
    let machine = run(
        "the same failure twice, then another, then success",
        &quiet(),
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (fail(), "count log(1) del:fail(x) add:fail(x)", "failed unapplied later"),
            (MachineEvent::Recheck, "", "failed unapplied later"),
            (MachineEvent::RetryDue, "capture(-)", "failed capturing"),
            (fail(), "count del:fail(x) add:fail(x)", "failed unapplied later"),
            (MachineEvent::RetryDue, "capture(-)", "failed capturing"),
            (MachineEvent::Captured(applied(7)), DONE, "captured applied(7)"),
        ],
    );
    assert_eq!(machine.backoff, Backoff::default());
    run(
        "a new description is tried at once",
        &quiet(),
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (fail(), "count log(1) del:fail(x) add:fail(x)", "failed unapplied later"),
            (desired("/b"), "capture(-)", "pending capturing"),
        ],
    );
    run(
        "what is applied stays when its replacement fails",
        &quiet(),
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (MachineEvent::Captured(applied(7)), DONE, "captured applied(7)"),
            (desired("/b"), "capture(7)", "pending capturing"),
            (fail(), "count log(1) del:fail(x) add:fail(x)", "failed applied(7) later"),
        ],
    );
    run(
        "a release that fails ends its backoff when it succeeds",
        &quiet(),
        vec![
            (MachineEvent::Adopted(applied(7)), "", "leaving applied(7)"),
            (MachineEvent::Resolved(Resolution::Absent), "unfollow release(7)", "leaving releasing"),
            (
                MachineEvent::ReleaseFailed(failed(Cause::Kernel, "x")),
                "count log(1) del:fail(x) add:fail(x)",
                "failed applied(7) later",
            ),
            (MachineEvent::RetryDue, "unfollow release(7)", "failed releasing"),
            (MachineEvent::Released, SETTLED, "leaving unapplied"),
        ],
    );
}

#[test]
fn an_event_is_published_once_for_each_failure() {
    let options = || MachineEvent::CaptureFailed(failed(Cause::Options, "o"));
    run(
        "options that do not hold are published at once",
        &quiet(),
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (options(), "count log(1) del:fail(o) add:fail(o) publish(o)", "failed unapplied later"),
            (MachineEvent::RetryDue, "capture(-)", "failed capturing"),
            (options(), "count del:fail(o) add:fail(o)", "failed unapplied later"),
        ],
    );
    let context = quiet();
    let mut machine = run(
        "others when they last",
        &context,
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (
                MachineEvent::CaptureFailed(failed(Cause::Kernel, "x")),
                "count log(1) del:fail(x) add:fail(x)",
                "failed unapplied later",
            ),
            (MachineEvent::RetryDue, "capture(-)", "failed capturing"),
        ],
    );
    let later = MachineContext { now: context.now + EVENT_AFTER, ..context };
    let commands = machine.on(MachineEvent::CaptureFailed(failed(Cause::Kernel, "x")), &later);
    assert!(commands.contains(&MachineCommand::Publish("x".into())), "{commands:?}");
}

#[test]
fn a_failed_add_is_answered_and_ended() {
    let waits = MachineContext { add_waits: true, ..quiet() };
    run(
        "a capture that fails",
        &waits,
        vec![
            (desired("/a"), "capture(-)!", "pending capturing"),
            (
                MachineEvent::CaptureFailed(failed(Cause::Kernel, "x")),
                "count log(1) del:fail(x) add:fail(x) publish(x) end-add",
                "failed unapplied later",
            ),
        ],
    );
    run(
        "a shadow that fails, on which nothing depends",
        &waits,
        vec![
            (desired_with("/a", &["--shadow"]), "capture(-)!", "pending capturing"),
            (
                MachineEvent::CaptureFailed(failed(Cause::Kernel, "x")),
                "count log(1) del:fail(x) add:not_shadowed publish(x)",
                "failed unapplied later",
            ),
        ],
    );
    run(
        "a claim that cannot be followed",
        &waits,
        vec![(
            refused("r"),
            "add:fail(r) count log publish(r) unfollow del:released forget end-add",
            "failed unapplied",
        )],
    );
    // The same desired pod again, for another sandbox: it is captured again, so that the ADD is answered.
    run(
        "an ADD for what is captured",
        &waits,
        vec![
            (desired("/a"), "capture(-)!", "pending capturing"),
            (MachineEvent::Captured(applied(7)), DONE, "captured applied(7)"),
            (desired("/a"), "capture(7)!", "pending capturing"),
        ],
    );
}

#[test]
fn a_claim_that_cannot_be_followed_changes_nothing_that_is_applied() {
    run(
        "refused, and understood again",
        &quiet(),
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (MachineEvent::Captured(applied(7)), DONE, "captured applied(7)"),
            (refused("r"), "add:fail(r) count log publish(r)", "failed applied(7)"),
            (refused("r"), "add:fail(r)", "failed applied(7)"),
            (desired("/a"), "capture(7)", "pending capturing"),
        ],
    );
}

#[test]
fn a_pod_may_be_without_a_process_while_it_starts() {
    let starting = || MachineEvent::CaptureFailed(failed(Cause::NoProcess, "s"));
    let context = MachineContext { stage: Some(Stage::Running), ..quiet() };
    let mut machine = run(
        "the API says that it runs",
        &context,
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (starting(), "log", "pending unapplied later"),
            (MachineEvent::RetryDue, "capture(-)", "pending capturing"),
        ],
    );
    let later = MachineContext { now: context.now + RUNNING_PATIENCE, ..context };
    machine.on(starting(), &later);
    assert_eq!(phase(&machine), "failed unapplied later", "its time is over");
    run(
        "no object of the API speaks for it",
        &quiet(),
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (starting(), "count log(1) del:fail(s) add:fail(s)", "failed unapplied later"),
        ],
    );
}

#[test]
fn what_is_gone_is_released() {
    let captured = || {
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (MachineEvent::Captured(applied(7)), DONE, "captured applied(7)"),
        ]
    };
    let case = |name: &str, steps: Vec<TableStep>| {
        run(name, &quiet(), captured().into_iter().chain(steps).collect())
    };
    case(
        "no source will say so",
        vec![
            (MachineEvent::Gone(Aftermath::Over), "unfollow release(7)", "leaving releasing"),
            (MachineEvent::Released, SETTLED, "leaving unapplied"),
        ],
    );
    case(
        "a source may want it again",
        vec![
            (MachineEvent::Gone(Aftermath::MayReturn), "unfollow release(7)", "captured releasing later"),
            (MachineEvent::Released, "", "pending unapplied later"),
            (MachineEvent::RetryDue, "capture(-)", "pending capturing"),
        ],
    );
    case(
        "nothing leads to it, and the kernel has it",
        vec![
            (MachineEvent::Unreachable, "unfollow check(7)", "captured checking"),
            (MachineEvent::StillThere, "", "captured applied(7)"),
        ],
    );
    case(
        "nothing leads to it, and the kernel has it no more",
        vec![
            (MachineEvent::Unreachable, "unfollow check(7)", "captured checking"),
            (MachineEvent::Recheck, "", "captured checking*"),
            (MachineEvent::Gone(Aftermath::Over), "unfollow release(7)", "leaving releasing*"),
        ],
    );
    case(
        "detached by command",
        vec![
            (MachineEvent::Recheck, "capture(7)", "captured capturing"),
            (MachineEvent::Detached, SETTLED, "leaving unapplied"),
        ],
    );
}

#[test]
fn changes_of_the_namespace_rest_and_keep_nobody_waiting() {
    let captured = || {
        vec![
            (desired("/a"), "capture(-)", "pending capturing"),
            (MachineEvent::Rest(Duration::from_secs(4)), "", "pending capturing"),
            (MachineEvent::NamespaceChanged, "", "pending capturing+"),
            (MachineEvent::Captured(applied(7)), DONE, "captured applied(7) later"),
        ]
    };
    let case = |name: &str, steps: Vec<TableStep>| {
        run(name, &quiet(), captured().into_iter().chain(steps).collect())
    };
    case(
        "a change is applied when the pod has rested",
        vec![
            (MachineEvent::NamespaceChanged, "", "captured applied(7) later"),
            (MachineEvent::RetryDue, "capture(7)", "captured capturing"),
            (MachineEvent::Rest(Duration::ZERO), "", "captured capturing"),
            (MachineEvent::Captured(applied(7)), DONE, "captured applied(7)"),
            (MachineEvent::NamespaceChanged, "capture(7)", "captured capturing"),
        ],
    );
    case(
        "another policy does not wait for that",
        vec![
            (desired("/b"), "capture(7)", "pending capturing"),
            (MachineEvent::NamespaceChanged, "", "pending capturing+"),
            (desired("/c"), "", "pending capturing*"),
            (MachineEvent::Captured(applied(7)), "capture(7)", "pending capturing"),
        ],
    );
}
