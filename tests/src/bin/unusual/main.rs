//! One flow made in an unusual way; see `tests::unusual`.

mod connect;
mod datagram;
mod hand_over;
mod ring;
mod user_namespace;

use std::fs;
use std::io::{BufRead, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use tests::testbed::Ids;
use tests::unusual::{Method, UnusualOutcome, UnusualSocket};

/// The second argument of a process that is given a socket, on its standard input, to connect.
const RECEIVER: &str = "receiver";
/// The second argument of a program with the set-user-ID bit.
const SET_USER_ID: &str = "set-user-id";

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let unusual: UnusualSocket =
        serde_json::from_str(&arguments.next().context("the flow to make is missing")?)?;
    match arguments.next().as_deref() {
        Some(RECEIVER) => return say(&connect::connected(&unusual, hand_over::receive()?)),
        Some(SET_USER_ID) => return say(&connect::connected(&unusual, connect::socket(&unusual)?)),
        _ => {}
    }
    if let Some(first) = unusual.user_namespace {
        user_namespace::enter(first)?;
    }
    match unusual.method {
        Method::SetUserId => {
            ready()?;
            set_user_id(&unusual)
        }
        Method::Raw(_) => {
            let sockets = datagram::raw(&unusual)?;
            ready()?;
            say(&datagram::send_raw(&unusual, &sockets))
        }
        Method::InTurn | Method::AtOnce => {
            let socket = datagram::socket(&unusual)?;
            ready()?;
            say(&datagram::ask(&unusual, &socket))
        }
        _ => {
            let socket = made_by(&unusual)?;
            ready()?;
            if unusual.method == Method::Passed {
                return hand_over::to_receiver(&unusual, &socket);
            }
            become_user(unusual.used_by)?;
            say(&connect::connected(&unusual, socket))
        }
    }
}

/// The socket of a connection. Only the effective ids change: what follows may need to become another.
fn made_by(unusual: &UnusualSocket) -> Result<OwnedFd> {
    let keep_u = Uid::from_raw(u32::MAX);
    let keep_g = Gid::from_raw(u32::MAX);
    setgroups(&[]).context("setgroups")?;
    setresgid(keep_g, Gid::from_raw(unusual.made_by.gid), keep_g).context("setresgid")?;
    setresuid(keep_u, Uid::from_raw(unusual.made_by.uid), keep_u).context("setresuid")?;
    let socket = connect::socket(unusual);
    setresuid(keep_u, Uid::from_raw(0), keep_u).context("setresuid back")?;
    setresgid(keep_g, Gid::from_raw(0), keep_g).context("setresgid back")?;
    let socket = socket?;
    connect::prepare(unusual, &socket)?;
    Ok(socket)
}

fn become_user(ids: Ids) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(ids.uid), Gid::from_raw(ids.gid));
    setresgid(gid, gid, gid).context("setresgid")?;
    setresuid(uid, uid, uid).context("setresuid")
}

/// Starts a copy of this program that belongs to `made_by` and has the bits.
fn set_user_id(unusual: &UnusualSocket) -> Result<()> {
    let program = std::env::current_exe()?;
    let helper = program.with_file_name("helper");
    fs::copy(&program, &helper)?;
    chown(&helper, Some(unusual.made_by.uid), Some(unusual.made_by.gid))?;
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o6755))?;
    let status = Command::new(&helper)
        .arg(serde_json::to_string(unusual)?)
        .arg(SET_USER_ID)
        .gid(unusual.used_by.gid)
        .uid(unusual.used_by.uid)
        .status()
        .context("starting the helper")?;
    ensure!(status.success(), "the helper: {status}");
    Ok(())
}

fn ready() -> Result<()> {
    println!("ready");
    std::io::stdout().flush()?;
    let mut line = String::new();
    ensure!(std::io::stdin().lock().read_line(&mut line)? > 0, "never told to go");
    Ok(())
}

fn say(outcome: &UnusualOutcome) -> Result<()> {
    println!("{}", serde_json::to_string(outcome)?);
    Ok(())
}
