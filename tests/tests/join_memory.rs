//! Many joined connections at once whose readers do not read. `INTERCEPT_UNREAD` is their number.

use std::{
    io::{ErrorKind, Write as _},
    net::TcpStream,
};

use intercept_common::Family;

use tests::{
    agent::Agent,
    joined::{Leg, PodPair, charged, given_to_tcp, receive},
};

/// The bound of one connection, kernel memory included.
const MOST: u64 = 2 << 20;

/// So many connections, joined; `fewer` unless the variable says otherwise.
fn legs(pods: &PodPair, fewer: usize) -> Vec<Leg> {
    let wanted = std::env::var("INTERCEPT_UNREAD").ok().and_then(|text| text.parse().ok()).unwrap_or(fewer);
    let listener = pods.listen(Family::V4).expect("a listener");
    let leg = |_| {
        let leg = pods.connect(&listener, PodPair::app(Family::V4)).expect("a connection");
        leg.greet().expect("greeted");
        leg
    };
    (0..wanted).map(leg).collect()
}

/// Sends pieces until the socket would block, or so many times. Returns the number of bytes.
fn fill(mut end: &TcpStream, piece: &[u8], times: usize) -> usize {
    let mut sent = 0;
    for _ in 0..times {
        match end.write(piece) {
            Ok(written) => sent += written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("sending failed after {sent} bytes: {error}"),
        }
    }
    sent
}

/// Bytes of slabs that cannot be reclaimed, of the whole machine.
fn slabs() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("memory");
    let line = text.lines().find_map(|line| line.strip_prefix("SUnreclaim:")).expect("slabs");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

#[test]
fn a_reader_that_does_not_read_costs_two_mebibytes_at_most() {
    let agent = Agent::new("unread-bytes").expect("the agent");
    let pods = PodPair::accelerated("unread-bytes", &agent).expect("pods");
    let legs = legs(&pods, 300);
    let (mut whole, mut most) = (0, 0);
    for leg in &legs {
        let before = given_to_tcp(&leg.dialled).expect("a count");
        let sent = fill(&leg.dialled, &[7; 16 << 10], 4096);
        let by_tcp = given_to_tcp(&leg.dialled).expect("a count") - before;
        let past = sent - usize::try_from(by_tcp).expect("fits");
        assert!((1 << 19..=1 << 20).contains(&past), "{past} bytes past TCP, {by_tcp} by it");
        // What TCP takes is the same without joined connections.
        let charged =
            [&leg.dialled, &leg.accepted].map(|end| charged(end).expect("memory")).iter().sum::<u64>();
        assert!(charged <= MOST + 4 * by_tcp, "{charged} bytes charged, {by_tcp} sent by TCP");
        whole += charged;
        most = most.max(past);
    }
    let each = whole / legs.len() as u64;
    println!("{} connections: {each} bytes of sockets each, at most {most} sent past TCP", legs.len());
    for leg in legs.iter().step_by(50) {
        assert!(receive(&leg.accepted, 1 << 20).expect("received").iter().all(|byte| *byte == 7));
    }
}

#[test]
fn messages_of_a_byte_do_not_fill_the_slabs() {
    const TRIED: usize = 5000;
    let agent = Agent::new("unread-messages").expect("the agent");
    let pods = PodPair::accelerated("unread-messages", &agent).expect("pods");
    let legs = legs(&pods, 1000);
    let before = slabs();
    let sent: Vec<_> = legs.iter().map(|leg| fill(&leg.dialled, &[1], TRIED)).collect();
    let grown = slabs().saturating_sub(before) / legs.len() as u64;
    let least = sent.iter().min().expect("connections");
    println!("{} connections, {least} unread messages of a byte: {grown} bytes of slab each", legs.len());
    // TCP takes more than 256 as well: thousands, or one receive buffer of separate segments on a busy machine.
    assert!(*least > 350, "{least} messages until the sender is stopped");
    // 256 messages of 1 KiB past TCP, and what TCP needs for the others. All would need 5 MB.
    assert!(grown < 1 << 20, "{grown} bytes of slab for a connection");
    for (leg, sent) in legs.iter().zip(sent) {
        assert_eq!(receive(&leg.accepted, sent).expect("received"), vec![1; sent]);
    }
}
