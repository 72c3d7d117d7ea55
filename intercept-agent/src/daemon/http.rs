//! An HTTP server that no client can block for the others.
//!
//! A connection serves one request. Header and connection have time limits, and beyond the limit of connections the
//! oldest is closed. Incomplete requests therefore neither use up memory nor keep out the probes of the kubelet.

use std::{collections::VecDeque, time::Duration};

use axum::{Router, serve::Listener};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
    time::timeout,
};

/// Most open connections.
pub(super) const MAX_CONNECTIONS: usize = 64;
/// Most bytes of a request in memory.
const MAX_BUFFER: usize = 16 << 10;

/// Time limits for a client.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Until the request has arrived.
    pub(super) header: Duration,
    /// Until the answer has been read. Longer than it takes to produce any answer.
    pub(super) connection: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { header: Duration::from_secs(5), connection: Duration::from_secs(30) }
    }
}

/// Serves forever.
pub(super) async fn serve(mut listener: TcpListener, router: Router, limits: Limits) {
    let mut connections = JoinSet::new();
    let mut oldest_first = VecDeque::<AbortHandle>::new();
    loop {
        // Pauses after an error such as too many open files.
        let (stream, _) = Listener::accept(&mut listener).await;
        while connections.try_join_next().is_some() {}
        oldest_first.retain(|connection| !connection.is_finished());
        if oldest_first.len() >= MAX_CONNECTIONS
            && let Some(oldest) = oldest_first.pop_front()
        {
            oldest.abort();
        }
        oldest_first.push_back(connections.spawn(answer(stream, router.clone(), limits)));
    }
}

async fn answer(stream: TcpStream, router: Router, limits: Limits) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header)
        .keep_alive(false)
        .max_buf_size(MAX_BUFFER)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    match timeout(limits.connection, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(error = &error as &dyn std::error::Error, "answering over HTTP"),
        Err(_) => tracing::debug!("a client did not read its answer in time"),
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, time::Instant};

    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const SHORT: Limits =
        Limits { header: Duration::from_millis(200), connection: Duration::from_millis(600) };
    const LONG: Limits = Limits { header: Duration::from_secs(60), connection: Duration::from_secs(60) };

    async fn started(limits: Limits) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let large = || async { "x".repeat(64 << 20) };
        let router = Router::new().route("/", get(|| async { "ok\n" })).route("/large", get(large));
        tokio::spawn(serve(listener, router, limits));
        address
    }

    async fn sent(address: SocketAddr, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        stream.write_all(text.as_bytes()).await.expect("written");
        stream
    }

    /// Reads until the server closes the connection, by FIN or RST.
    async fn answer_of(stream: &mut TcpStream) -> String {
        let mut bytes = Vec::new();
        let read = timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes)).await;
        drop(read.expect("the server closes the connection"));
        String::from_utf8(bytes).expect("text")
    }

    fn block_on(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(test);
    }

    #[test]
    fn a_connection_ends_with_its_answer() {
        block_on(async {
            let address = started(LONG).await;
            let answer = answer_of(&mut sent(address, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await).await;
            assert!(
                answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nok\n"),
                "{answer}"
            );
        });
    }

    #[test]
    fn half_a_request_is_not_waited_for() {
        block_on(async {
            let address = started(SHORT).await;
            for half in ["", "GET / HT", "GET / HTTP/1.1\r\nhost: x\r\n"] {
                let started = Instant::now();
                let answer = answer_of(&mut sent(address, half).await).await;
                assert!(started.elapsed() < Duration::from_secs(5), "{half:?}: {answer}");
                assert!(!answer.contains("200"), "{half:?}: {answer}");
            }
        });
    }

    #[test]
    fn an_answer_that_is_not_read_is_given_up() {
        block_on(async {
            let address = started(SHORT).await;
            let mut stream = sent(address, "GET /large HTTP/1.1\r\nhost: x\r\n\r\n").await;
            tokio::time::sleep(SHORT.connection * 2).await;
            let answer = answer_of(&mut stream).await;
            assert!(answer.len() < 64 << 20, "{} bytes", answer.len());
        });
    }

    #[test]
    fn beyond_the_limit_the_oldest_gives_way_to_the_newest() {
        block_on(async {
            let address = started(LONG).await;
            let mut halves = Vec::new();
            for _ in 0..MAX_CONNECTIONS {
                halves.push(sent(address, "GET / HT").await);
            }
            for round in 0..3 {
                let answer = answer_of(&mut sent(address, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await).await;
                assert!(answer.contains("200 OK"), "{answer}");
                assert_eq!(answer_of(&mut halves[round]).await, "", "closed for it");
                halves.push(sent(address, "GET / HT").await);
            }
        });
    }
}
