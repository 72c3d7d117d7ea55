//! A minimal HTTP server and client for a process in a pod.
//!
//! `http serve ADDRESS..` says `ready` and answers every request with the address it arrived at.
//! `http log ADDRESS..` also prints each request: the client's address, the path, and the headers `x-passed`.
//! `http get ADDRESS COUNT fresh|kept` fails unless the response to each request is that address.
//! `http hold ADDRESS` makes one connection, and one request on it for each line of its input, and says `answered`.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use socket2::{Domain, Socket, Type};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", ref addresses @ ..] => serve(addresses, RequestLog::Off),
        ["log", ref addresses @ ..] => serve(addresses, RequestLog::On),
        ["get", to, count, kept @ ("fresh" | "kept")] => get(to.parse()?, count.parse()?, kept == "kept"),
        ["hold", to] => hold(to.parse()?),
        _ => bail!("usage: http serve|log ADDRESS.. | http get ADDRESS COUNT fresh|kept | http hold ADDRESS"),
    }
}

/// Whether requests are printed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RequestLog {
    Off,
    On,
}

fn serve(addresses: &[&str], log: RequestLog) -> Result<()> {
    let listeners = addresses.iter().map(|address| listen(address.parse()?)).collect::<Result<Vec<_>>>()?;
    println!("ready");
    std::thread::scope(|scope| {
        for listener in &listeners {
            scope.spawn(move || {
                for stream in listener.incoming().flatten() {
                    // A client may close before the end.
                    scope.spawn(move || drop(answer(&stream, log)));
                }
            });
        }
    });
    Ok(())
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into()).with_context(|| format!("binding {address}"))?;
    socket.listen(1024)?;
    Ok(socket.into())
}

fn answer(mut stream: &TcpStream, log: RequestLog) -> Result<()> {
    let body = stream.local_addr()?.to_string();
    let mut reader = BufReader::new(stream);
    loop {
        let lines = head(&mut reader)?;
        let Some(first) = lines.first() else { return Ok(()) };
        if log == RequestLog::On {
            let passed = lines.iter().filter_map(|line| line.strip_prefix("x-passed:"));
            let passed: Vec<_> = passed.flat_map(|value| value.split(',')).map(str::trim).collect();
            let path = first.split(' ').nth(1).unwrap_or_default();
            println!("served {} {path} {}", stream.peer_addr()?.ip(), passed.join(","));
        }
        // In one write. The rest would wait until the first part is acknowledged (Nagle).
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(answer.as_bytes())?;
    }
}

/// Reads the lines up to the empty one. None at the end of the stream.
fn head(reader: &mut BufReader<&TcpStream>) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        let end = reader.read_line(&mut line)? == 0;
        if end || line.trim_end().is_empty() {
            return Ok(lines);
        }
        lines.push(line.trim_end().to_ascii_lowercase());
    }
}

fn get(to: SocketAddr, count: usize, kept: bool) -> Result<()> {
    let per_connection = if kept { count } else { 1 };
    let mut done = 0;
    while done < count {
        let stream = TcpStream::connect(to).with_context(|| format!("connecting, request {done}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(&stream);
        for _ in 0..per_connection {
            request(to, &mut reader).with_context(|| format!("request {done} of {count}"))?;
            ensure!(stream.peer_addr()? == to, "the peer is {}", stream.peer_addr()?);
            done += 1;
        }
    }
    Ok(())
}

fn hold(to: SocketAddr) -> Result<()> {
    let stream = TcpStream::connect(to).context("connecting")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::new(&stream);
    for line in std::io::stdin().lines() {
        line?;
        request(to, &mut reader)?;
        ensure!(stream.peer_addr()? == to, "the peer is {}", stream.peer_addr()?);
        println!("answered");
    }
    Ok(())
}

fn request(to: SocketAddr, reader: &mut BufReader<&TcpStream>) -> Result<()> {
    let mut stream = *reader.get_ref();
    stream.write_all(format!("GET / HTTP/1.1\r\nhost: {to}\r\n\r\n").as_bytes())?;
    let head = head(reader)?;
    ensure!(head.first().is_some_and(|status| status.starts_with("http/1.1 200")), "answered {head:?}");
    let length = head.iter().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.with_context(|| format!("no length in {head:?}"))?.parse()?];
    reader.read_exact(&mut body)?;
    ensure!(body == to.to_string().as_bytes(), "answered by {}", String::from_utf8_lossy(&body));
    Ok(())
}
