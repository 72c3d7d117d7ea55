//! The actor's process: reads requests, hands each to the thread that runs as the asked user, writes replies.

mod dial;
mod listen;
mod options;
mod pool;
mod query;
mod relay;

use std::io::{BufRead, BufWriter, Write};
use std::sync::mpsc;

use anyhow::{Context, Result};
use tests::actor::protocol::{ActorJob, ActorMessage, Done, Request};
use tests::actor::{Listen, Transport};

use options::Privileged;
use pool::MemberPool;

/// Where replies go.
type Output = mpsc::Sender<ActorMessage>;

fn main() -> Result<()> {
    let (output, messages) = mpsc::channel();
    let writer = std::thread::spawn(move || write(&messages));
    let privileged = Privileged::start();
    let mut pool = MemberPool::default();
    for line in std::io::stdin().lock().lines() {
        let line = line.context("reading requests")?;
        let Request { id, job } =
            serde_json::from_str(&line).with_context(|| format!("understanding the request {line}"))?;
        start(&mut pool, &privileged, &output, id, job);
    }
    // Nobody is left to tell; connections still open end with the process.
    drop(writer);
    Ok(())
}

fn start(pool: &mut MemberPool, privileged: &Privileged, output: &Output, id: u64, job: ActorJob) {
    let output = output.clone();
    let reply = {
        let output = output.clone();
        // An error means that the writer is gone, and with it the reader.
        move |done| drop(output.send(ActorMessage::Reply { id, done }))
    };
    let ids = match &job {
        ActorJob::Listen(Listen { bind, .. }) => bind.ids,
        ActorJob::Relay(relay) => relay.bind.ids,
        ActorJob::Dial(dial) => dial.ids,
        ActorJob::Query(query) => query.ids,
        ActorJob::Close(opened) => {
            let known = pool.close(*opened);
            reply(if known {
                Done::Closed
            } else {
                Done::Failed(format!("request {opened} opened nothing"))
            });
            return;
        }
    };
    let result = match job {
        ActorJob::Dial(dial) => pool.member(ids).map(|member| {
            member.run(async move || reply(Done::Dialled(dial::dial(dial).await)));
        }),
        ActorJob::Query(query) => pool.member(ids).map(|member| {
            member.run(async move || reply(Done::Queried(query::query(query).await)));
        }),
        ActorJob::Listen(listen) => pool.member(ids).map(|member| {
            let privileged = privileged.clone();
            let stop = member.run_until_closed(async move || {
                let failed = reply.clone();
                let ready = move |addr| reply(Done::Ready(addr));
                let served = match listen.transport {
                    Transport::Tcp => listen::connections(listen, &privileged, ready).await,
                    Transport::Udp => listen::datagrams(listen, &privileged, ready).await,
                };
                if let Err(error) = served {
                    failed(Done::Failed(format!("{error:#}")));
                }
            });
            pool.opened(id, vec![stop]);
        }),
        ActorJob::Relay(relay) => relay::open(pool, privileged, relay, id, &output, reply.clone()),
        ActorJob::Close(_) => unreachable!("answered above"),
    };
    if let Err(error) = result {
        drop(output.send(ActorMessage::Reply { id, done: Done::Failed(format!("{error:#}")) }));
    }
}

fn write(messages: &mpsc::Receiver<ActorMessage>) -> Result<()> {
    let mut output = BufWriter::new(std::io::stdout().lock());
    while let Ok(first) = messages.recv() {
        let mut next = Some(first);
        while let Some(message) = next {
            serde_json::to_writer(&mut output, &message)?;
            output.write_all(b"\n")?;
            next = messages.try_recv().ok();
        }
        output.flush()?;
    }
    Ok(())
}
