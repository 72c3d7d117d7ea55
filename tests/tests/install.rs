//! Attach, replace and detach: idempotent, atomic, and without remains.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tests::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, OriginalDst, Transport},
    agent::{Agent, INIT_FLAGS},
    testbed::{Ids, Pod, PodSpec, Sandbox},
};

const SERVICE: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 10)), 80);
/// Excludes [`SERVICE`].
const OTHER: [&str; 6] = ["-u", "1337", "-i", "*", "-x", "10.96.0.0/16"];

/// How many programs a pod has on its cgroup: none at the four hooks of datagrams without DNS capture.
const PROGRAMS: usize = 8;

fn listen(actor: &Actor, name: &str, ids: Ids, port: u16) {
    let bind = Bind::new(ids, SocketAddr::new(IpAddr::from([0, 0, 0, 0]), port));
    actor.listen(Listen { name: name.into(), transport: Transport::Tcp, bind }).expect("listening");
}

/// A pod with a proxy and a neighbour that answers for the service.
fn pod(label: &str) -> (Pod, Actor, Actor) {
    let pod = Pod::new(PodSpec::new(label)).expect("a pod");
    let inside = Actor::start(&pod).expect("an actor");
    let world = Actor::start(pod.neighbour()).expect("an actor");
    listen(&inside, "outbound", Ids::PROXY, 15001);
    listen(&world, "world", Ids::ROOT, SERVICE.port());
    (pod, inside, world)
}

/// The server that answers for the service, and the original destination if it is the proxy.
fn answers(inside: &Actor) -> (String, Option<OriginalDst>) {
    match inside.dial(Dial::new(Ids::APP, SERVICE)).expect("dialled").outcome {
        DialOutcome::Answered(answer) if answer.server == "outbound" => (answer.server, answer.original_dst),
        DialOutcome::Answered(answer) => (answer.server, None),
        other => panic!("{other:?}"),
    }
}

fn captured() -> (String, Option<OriginalDst>) {
    ("outbound".into(), Some(OriginalDst::Addr(SERVICE)))
}

fn passthrough_v6(sandbox: &Sandbox) -> bool {
    sandbox
        .netns
        .run(|| UdpSocket::bind((Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6), 0)).is_ok())
        .expect("in the namespace")
}

/// The number of programs on the cgroup at each hook (BPF_PROG_QUERY).
fn programs_on(sandbox: &Sandbox) -> usize {
    const HOOKS: [u32; 12] = [3, 10, 11, 14, 15, 19, 20, 21, 29, 30, 31, 32];
    let dir = std::fs::File::open(sandbox.cgroup.path()).expect("the cgroup");
    HOOKS.iter().map(|&hook| tests::bpf::attached(dir.as_raw_fd(), hook).expect("asked the kernel")).sum()
}

#[test]
fn the_same_again_changes_nothing_and_other_options_replace() {
    let agent = Agent::new("install").expect("the agent");
    let (pod, inside, _world) = pod("install");
    assert_eq!(answers(&inside).0, "world");
    assert!(!passthrough_v6(&pod));
    assert!(agent.attach(&pod, &INIT_FLAGS).expect("attached").starts_with("attached"));
    // The agent has exited, and the capture stays.
    assert_eq!(answers(&inside), captured());
    assert!(passthrough_v6(&pod));
    assert_eq!(programs_on(&pod), PROGRAMS);

    let before = agent.pods().expect("status");
    assert!(agent.attach(&pod, &INIT_FLAGS).expect("attached").starts_with("unchanged"));
    let after = agent.pods().expect("status");
    assert_eq!(before[0].policy, after[0].policy);
    assert_eq!(programs_on(&pod), PROGRAMS);

    assert!(agent.attach(&pod, &OTHER).expect("attached").starts_with("replaced"));
    assert_eq!(answers(&inside).0, "world");
    assert_eq!(programs_on(&pod), PROGRAMS);
    assert_ne!(agent.pods().expect("status")[0].policy, before[0].policy);

    agent.detach(&pod).expect("detached");
    assert_eq!(answers(&inside).0, "world");
    assert_eq!(programs_on(&pod), 0);
    assert!(!passthrough_v6(&pod));
    assert!(!agent.bpffs().join("intercept").exists());
}

#[test]
fn replacing_under_load_loses_no_connection() {
    let agent = Agent::new("replace").expect("the agent");
    let (pod, inside, _world) = pod("replace");
    agent.attach(&pod, &INIT_FLAGS).expect("attached");
    thread::scope(|scope| {
        let replacing = scope.spawn(|| {
            for round in 0..20 {
                let options = if round % 2 == 0 { &OTHER[..] } else { &INIT_FLAGS[..] };
                assert!(agent.attach(&pod, options).expect("attached").starts_with("replaced"));
            }
        });
        let mut seen = (0, 0);
        while !replacing.is_finished() {
            for dialled in inside.dial_all(vec![Dial::new(Ids::APP, SERVICE); 50]).expect("dialled") {
                match dialled.outcome {
                    DialOutcome::Answered(answer) if answer.server == "world" => seen.0 += 1,
                    DialOutcome::Answered(answer) => {
                        assert_eq!((answer.server, answer.original_dst), captured());
                        seen.1 += 1;
                    }
                    other => panic!("{other:?} after {seen:?}"),
                }
            }
        }
        replacing.join().expect("replaced");
        assert!(seen.0 > 0 && seen.1 > 0, "only one of the policies was met: {seen:?}");
    });
    agent.detach(&pod).expect("detached");
}

#[test]
fn a_kill_at_any_moment_leaves_the_old_or_the_new_state() {
    let agent = Agent::new("killed").expect("the agent");
    let (pod, inside, _world) = pod("killed");
    let seed = std::env::var("INTERCEPT_SEED").map_or(1, |text| text.parse().expect("a number"));
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..60 {
        // From nothing and from another policy. The first attach also loads the programs.
        let fresh = round % 3 == 0;
        let old = if fresh {
            if !agent.pods().expect("status").is_empty() {
                agent.detach(&pod).expect("detached");
            }
            "world"
        } else {
            agent.attach(&pod, &OTHER).expect("attached");
            "world"
        };
        let mut attach =
            agent.for_pod("attach", &pod, &INIT_FLAGS).stdout(Stdio::null()).spawn().expect("started");
        let wait = Duration::from_micros(random.random_range(0..if fresh { 150_000 } else { 30_000 }));
        let start = Instant::now();
        while start.elapsed() < wait {
            std::hint::spin_loop();
        }
        drop(attach.kill());
        attach.wait().expect("ended");
        let got = answers(&inside);
        assert!(got == captured() || got.0 == old, "round {round}, killed after {wait:?}: {got:?}");
    }
    // The next attach repairs the state.
    agent.attach(&pod, &INIT_FLAGS).expect("attached");
    assert_eq!(answers(&inside), captured());
    assert_eq!(programs_on(&pod), PROGRAMS);
    agent.detach(&pod).expect("detached");
    assert_eq!(answers(&inside).0, "world");
    assert_eq!(programs_on(&pod), 0);
    assert!(!agent.bpffs().join("intercept").exists());
}

#[test]
fn one_more_pod_on_a_node_with_many_takes_at_most_60_ms() {
    const MANY: usize = 60;
    let agent = Agent::new("many").expect("the agent");
    let places: Vec<Sandbox> = (0..MANY).map(|_| Sandbox::new("many").expect("a pod")).collect();
    // CPU time as well, because wall time depends on other work of the machine.
    let mut took: Vec<(Duration, Duration)> = places
        .iter()
        .map(|sandbox| {
            let (start, before) = (Instant::now(), cpu_of_children());
            agent.attach(sandbox, &INIT_FLAGS).expect("attached");
            (cpu_of_children() - before, start.elapsed())
        })
        .collect();
    let mut last = took.split_off(MANY / 2);
    last.sort();
    let (cpu, _) = last[last.len() / 2];
    let quickest = last.iter().map(|(_, wall)| *wall).min().expect("some");
    println!("median of {cpu:?} on a processor; the quickest took {quickest:?}");
    assert!(cpu <= Duration::from_millis(60), "{last:?}");
    let one = Sandbox::new("one").expect("a pod");
    let mut kernel: Vec<Duration> = (0..9)
        .map(|_| {
            let took = in_the_kernel(&agent, &one);
            agent.detach(&one).expect("detached");
            took
        })
        .collect();
    kernel.sort_unstable();
    println!("maps and links took {kernel:?}");
    // The minimum, because other work of the machine only adds time.
    assert!(kernel[0] <= Duration::from_millis(5), "{kernel:?}");
    assert_eq!(agent.pods().expect("status").len(), MANY);
    // The next call removes pods whose namespace or cgroup is gone.
    drop(places);
    agent.attach(&one, &INIT_FLAGS).expect("attached");
    assert_eq!(agent.pods().expect("status").len(), 1);
}

/// Attaches. Returns the time of the steps that change the kernel, from the agent's log.
fn in_the_kernel(agent: &Agent, sandbox: &Sandbox) -> Duration {
    let mut attach = agent.for_pod("attach", sandbox, &INIT_FLAGS);
    let output =
        attach.args(["--log", "intercept_agent=debug", "--log-format", "json"]).output().expect("started");
    assert!(output.status.success(), "{output:?}");
    let log = String::from_utf8(output.stderr).expect("text");
    let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    let mut took = lines.filter_map(|line| line["fields"]["seconds"].as_f64()).map(Duration::from_secs_f64);
    took.next().unwrap_or_else(|| panic!("no time in {log}"))
}

fn cpu_of_children() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("own statistics");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    // cutime and cstime, in ticks of 10 ms.
    let ticks = |field: &str| field.parse::<u64>().expect("a number");
    Duration::from_millis(10 * (ticks(fields[13]) + ticks(fields[14])))
}
