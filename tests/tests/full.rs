//! What happens when the node has no room for another original destination.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr},
    process::Stdio,
    time::{Duration, Instant},
};

use tests::{
    actor::{Actor, Bind, Dial, Listen, OriginalDst, Outcome, Transport},
    agent::Agent,
    testbed::{Ids, Pod, PodSpec},
};

const ROOM: usize = 4;

/// The policy for a full map: the connection is not let around the proxy, which sees its own port as the original
/// destination; it is counted, and a line of log says what to do.
#[test]
fn a_full_map_is_closed_counted_and_told() {
    let agent = Agent::new("full").expect("the agent");
    let pod = Pod::new(PodSpec::new("full")).expect("a pod");
    let inside = Actor::start(&pod).expect("an actor");
    let bind = Bind::new(Ids::PROXY, SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 15001));
    inside.listen(Listen { name: "outbound".into(), transport: Transport::Tcp, bind }).expect("a proxy");

    let mut run = agent
        .for_pod("run", &pod, &["-i", "*", "-u", "1337", "--max-connections", &ROOM.to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the agent starts");
    let mut said = String::new();
    BufReader::new(run.stdout.take().expect("a pipe")).read_line(&mut said).expect("a line");
    assert!(said.starts_with("attached"), "{said}");

    let to = SocketAddr::from(([10, 96, 0, 10], 80));
    let original = |inside: &Actor| match inside.dial(Dial::new(Ids::APP, to)).expect("dialled").outcome {
        Outcome::Answered(answer) => answer.original_dst.expect("an answer of the option"),
        other => panic!("{other:?}"),
    };
    assert_eq!(original(&inside), OriginalDst::Addr(to));

    // Connections that stay open at the client's end.
    let mut holder = pod
        .command_as("/bin/bash", Ids::APP)
        .expect("bash")
        .args(["-c", "for i in 1 2 3 4; do exec {fd}<>/dev/tcp/10.96.0.10/80; done; echo open; read"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("bash starts");
    let mut open = String::new();
    BufReader::new(holder.stdout.take().expect("a pipe")).read_line(&mut open).expect("a line");
    assert_eq!(open, "open\n");
    match original(&inside) {
        OriginalDst::Addr(own) => assert_eq!(own.port(), 15001, "{own}"),
        other => panic!("{other:?}"),
    }
    drop(holder.stdin.take().expect("a pipe").write_all(b"\n"));
    holder.wait().expect("bash ends");
    let deadline = Instant::now() + Duration::from_secs(5);
    while original(&inside) != OriginalDst::Addr(to) {
        assert!(Instant::now() < deadline, "room is not given back");
    }

    let status = agent.status().expect("status");
    assert_eq!(status[0]["failures"][0]["reason"], "orig_dst_full", "{status:?}");

    rustix::process::kill_process(rustix::process::Pid::from_child(&run), rustix::process::Signal::TERM)
        .expect("a signal");
    let output = run.wait_with_output().expect("the agent ends");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    assert!(log.contains("ORIG_DST is full, raise --max-connections"), "{log}");
}
