//! The two parts of sk_lookup: the stub of a pod, and the program that decides for all pods.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::{AsFd as _, AsRawFd as _},
    path::PathBuf,
};

use aya::{
    maps::{Map, MapData, MapInfo, PerCpuArray, PerCpuValues, ProgramArray},
    programs::loaded_programs,
};
use intercept_agent::facade::sys::Plain;
use intercept_common::{Family, NetnsCookie, layout::LookupScratch, names};
use tests::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, Transport},
    agent::Agent,
    bpf,
    testbed::{Ids, Pod, PodSpec},
};

const FLAGS: [&str; 6] = ["-u", "1337", "-i", "*", "-b", "*"];
const DROP: u32 = 0;
const PASS: u32 = 1;

fn listen(actor: &Actor, name: &str, ids: Ids, port: u16) {
    let bind = Bind::new(ids, SocketAddr::new(IpAddr::from([0, 0, 0, 0]), port));
    actor.listen(Listen { name: name.into(), transport: Transport::Tcp, bind }).expect("a server");
}

fn pin(agent: &Agent, map: &str) -> PathBuf {
    agent.store().join("maps").join(map)
}

fn answer(pod: &Pod, world: &Actor) -> String {
    answer_of(world, pod.address(Family::V4), 8080)
}

fn answer_of(client: &Actor, address: IpAddr, port: u16) -> String {
    match client.dial(Dial::new(Ids::ROOT, SocketAddr::new(address, port))).expect("dialled").outcome {
        DialOutcome::Answered(answer) => answer.server,
        other => format!("{other:?}"),
    }
}

/// Without the shared program, connections from outside are refused and counted, or pass if that is requested. Those within
/// the pod go on, also to its proxy.
#[test]
fn without_the_shared_half_inbound_is_refused() {
    let agent = Agent::new("half").expect("the agent");
    let pod = Pod::new(PodSpec::new("half")).expect("a pod");
    let (inside, world) =
        (Actor::start(&pod).expect("an actor"), Actor::start(pod.neighbour()).expect("an actor"));
    listen(&inside, "app", Ids::APP, 8080);
    listen(&inside, "proxy", Ids::PROXY, 15006);
    listen(&inside, "outbound", Ids::PROXY, 15001);
    agent.attach(&pod, &FLAGS).expect("attached");
    assert_eq!(answer(&pod, &world), "proxy");

    let data = MapData::from_pin(pin(&agent, names::JUMP_TABLE)).expect("a map");
    let mut programs = ProgramArray::try_from(Map::ProgramArray(data)).expect("of programs");
    programs.clear_index(&0).expect("taken out");
    let refused = answer(&pod, &world);
    assert!(refused != "proxy" && refused != "app", "{refused}");
    assert_eq!(answer_of(&inside, IpAddr::from([127, 0, 0, 1]), 8080), "app");
    assert_eq!(answer_of(&inside, IpAddr::from([192, 0, 2, 1]), 80), "outbound");
    let pods = agent.pods().expect("status");
    assert_eq!(pods[0].failures[0].reason, "steer_missing", "{pods:#?}");

    agent.attach(&pod, &[&FLAGS[..], &["--open-without-proxy"]].concat()).expect("attached");
    assert_eq!(answer(&pod, &world), "app");
    agent.detach(&pod).expect("detached");
}

/// A lookup that a packet interrupts must not use the cookie of the packet's pod.
#[test]
fn the_cookie_of_another_lookup_is_not_used() {
    let agent = Agent::new("note").expect("the agent");
    let pod = Pod::new(PodSpec::new("note")).expect("a pod");
    let inside = Actor::start(&pod).expect("an actor");
    listen(&inside, "proxy", Ids::PROXY, 15006);
    agent.attach(&pod, &FLAGS).expect("attached");

    let scratch = MapInfo::from_pin(pin(&agent, names::LOOKUP_SCRATCH)).expect("a map").id();
    let steer = loaded_programs()
        .flatten()
        .find(|program| {
            program.name_as_str() == Some(names::STEER_INBOUND)
                && program.map_ids().ok().flatten().is_some_and(|ids| ids.contains(&scratch))
        })
        .expect("the program is loaded");
    let program = steer.fd().expect("a descriptor");
    let data = MapData::from_pin(pin(&agent, names::LOOKUP_SCRATCH)).expect("a map");
    let mut notes: PerCpuArray<_, Plain<LookupScratch>> =
        PerCpuArray::try_from(Map::PerCpuArray(data)).expect("of notes");
    let cpus = aya::util::nr_cpus().expect("a number of CPUs");
    let netns = agent.pods().expect("status")[0].netns_cookie;

    let remote = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 7), 40_000);
    let local = SocketAddrV4::new(Ipv4Addr::new(10, 1, 2, 3), 8080);
    let mut look_up = |ports: u64| {
        let address = u64::from(remote.ip().to_bits().to_be());
        let note =
            Plain(LookupScratch { netns: NetnsCookie(netns), tag: address << 32 | ports, listeners: 0 });
        notes.set(0, PerCpuValues::try_from(vec![note; cpus]).expect("one a CPU"), 0).expect("noted");
        bpf::look_up(program.as_fd().as_raw_fd(), remote, local).expect("run")
    };
    let ports = u64::from(local.port()) << 16 | u64::from(remote.port().to_be());
    let (verdict, socket) = look_up(ports);
    assert!(verdict == PASS && socket != 0, "its own note: {verdict}, socket {socket}");
    for other in [ports ^ 1, ports ^ 1 << 16] {
        assert_eq!(look_up(other), (DROP, 0), "the note of another look-up");
    }
    agent.detach(&pod).expect("detached");
}
