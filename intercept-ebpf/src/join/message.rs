//! Decides for each message of a paired socket whether it is joined (redirected to the peer's receive queue) or goes by TCP.
//!
//! **Order.** A message is joined only while the peer has read every byte that was sent by TCP, and the kernel delivers
//! joined bytes before those that arrive by TCP. So no byte overtakes another, however often a connection changes.

use aya_ebpf::{
    bindings::{bpf_sock, sk_msg_md},
    programs::SkMsgContext,
};
use intercept_common::acceleration::{
    JoinSocket, MAX_UNREAD_BYTES, MAX_UNREAD_MESSAGES, SequenceKey, TcpReason, kind,
};

use crate::{
    context::load,
    kernel::{Reader, Sender},
    maps,
    observe::{self, Side},
};

/// A process sends; the socket's lock is held.
#[inline(always)]
pub(crate) fn send(ctx: &SkMsgContext) {
    let sk = load!(load_u64, sk_msg_md, ctx.msg, __bindgen_anon_3) as *mut bpf_sock;
    if sk.is_null() {
        return;
    }
    let Some(socket) = maps::socket(sk) else { return };
    socket.messages = socket.messages.saturating_add(1);
    if socket.kind != kind::PAIRED {
        if !is_answered(socket) {
            return;
        }
        observe::found_peer(ctx, &socket.pod);
    }
    let size = load!(load_u32, sk_msg_md, ctx.msg, size);
    let verdict = match check(sk, socket, size) {
        Ok(()) if maps::redirect(ctx, socket.peer.cookie) => Ok(()),
        Ok(()) => Err(TcpReason::Gone),
        Err(why) => Err(why),
    };
    match verdict {
        Ok(()) => {
            socket.last = JoinSocket::JOINED;
            socket.marked_bytes += u64::from(size);
            socket.marked_messages += 1;
        }
        Err(why) => {
            if socket.last == JoinSocket::JOINED {
                observe::changes_to_tcp(ctx, &socket.pod, side(socket), why);
            }
            socket.last = why as u32;
        }
    }
}

/// Only the connecting end has made an offer.
#[inline(always)]
fn side(socket: &JoinSocket) -> Side {
    if socket.sequence == SequenceKey::default() { Side::Accepted } else { Side::Dialled }
}

/// Whether the connecting end has a peer: it looks for the answer to its offer here.
#[inline(always)]
fn is_answered(socket: &mut JoinSocket) -> bool {
    if socket.kind != kind::OFFERED {
        return false;
    }
    let Some(offer) = maps::offer(&socket.sequence) else { return false };
    if offer.accepted.cookie == 0 {
        return false;
    }
    maps::remove_offer(&socket.sequence);
    socket.peer = offer.accepted;
    socket.kind = kind::PAIRED;
    true
}

/// Every condition for joining a message.
#[inline(always)]
fn check(sk: *mut bpf_sock, socket: &mut JoinSocket, size: u32) -> Result<(), TcpReason> {
    if maps::node_is_off() || !maps::is_on(&socket.pod) || !maps::is_on(&socket.peer.pod) {
        return Err(TcpReason::Off);
    }
    let sender = Sender::of(sk).filter(Sender::is_open).ok_or(TcpReason::State)?;
    let reader = Reader::of(&socket.peer).filter(Reader::is_open).ok_or(TcpReason::Closed)?;
    if !sender.all_read_by(&reader) {
        return Err(TcpReason::Unread);
    }
    if !reader.is_non_blocking() {
        return Err(TcpReason::Blocking);
    }
    if !reader.wants_any_byte() {
        return Err(TcpReason::LowWater);
    }
    let unread = reader.unread();
    settle(socket, unread);
    if unread != 0 && unread.saturating_add(size) > MAX_UNREAD_BYTES {
        return Err(TcpReason::Bytes);
    }
    if socket.older_messages + socket.marked_messages >= MAX_UNREAD_MESSAGES {
        return Err(TcpReason::Messages);
    }
    if !reader.has_memory(size) {
        return Err(TcpReason::Memory);
    }
    Ok(())
}

/// Moves the mark. Bytes are read in the order in which they were sent: if no more are unread than were sent since the mark,
/// everything before the mark has been read.
#[inline(always)]
fn settle(socket: &mut JoinSocket, unread: u32) {
    if unread == 0 {
        socket.older_messages = 0;
    } else if u64::from(unread) <= socket.marked_bytes {
        socket.older_messages = socket.marked_messages;
    } else {
        return;
    }
    socket.marked_bytes = 0;
    socket.marked_messages = 0;
}
