//! What Istio's init container istio-validation does: as the proxy's user, without any right, it sees whether what it
//! sends to 127.0.0.6 arrives at one of the proxy's ports, and whether its original destination is told there. It ends
//! with 126 if not.

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener},
    process::ExitCode,
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, SockRef, Socket, Type};

const PROXY: [u16; 2] = [15001, 15006];
const DIALLED: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 6), 15002);
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    match probe() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(126)
        }
    }
}

fn probe() -> Result<()> {
    let (arrived, arrivals) = mpsc::channel();
    for port in PROXY {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
        let arrived = arrived.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                drop(arrived.send(SockRef::from(&stream).original_dst_v4()));
            }
        });
    }
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.connect_timeout(&DIALLED.into(), PATIENCE).context("connecting")?;
    let original = arrivals.recv_timeout(PATIENCE).context("nothing arrived")?.context("no destination")?;
    let original = original.as_socket_ipv4().context("an original destination of another family")?;
    ensure!(original.port() == DIALLED.port(), "the original destination is {original}");
    Ok(())
}
