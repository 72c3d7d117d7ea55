//! Datagrams with their destination address, and answers from that address.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

use intercept_common::Family;
use socket2::{MaybeUninitSlice, MsgHdr, MsgHdrMut, SockAddr, Socket};

/// Makes the destinations of datagrams available to [`receive`].
pub fn want_destinations(socket: &Socket, family: Family) -> io::Result<()> {
    if family == Family::V6 {
        set_on(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)
    } else {
        set_on(socket, libc::IPPROTO_IP, libc::IP_PKTINFO)
    }
}

fn set_on(socket: &Socket, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    let size = libc::socklen_t::try_from(size_of_val(&on)).expect("four");
    // SAFETY: the descriptor is open, and the option's value is an int that outlives the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Receives one datagram without waiting. Returns its length, source and destination address.
pub fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr, Option<IpAddr>)> {
    let mut control = [MaybeUninit::<u8>::zeroed(); 64];
    // SAFETY: a sockaddr_storage of zeroes is a valid value, and recvmsg sets the length that it fills.
    let mut from = unsafe { SockAddr::try_init(|_, _| Ok(()))? }.1;
    let mut received = vec![MaybeUninit::<u8>::zeroed(); buffer.len()];
    let (length, control_length) = {
        let mut slices = [MaybeUninitSlice::new(&mut received)];
        let mut message =
            MsgHdrMut::new().with_addr(&mut from).with_buffers(&mut slices).with_control(&mut control);
        let length = socket.recvmsg(&mut message, libc::MSG_DONTWAIT)?;
        (length, message.control_len())
    };
    for (to, byte) in buffer.iter_mut().zip(&received) {
        // SAFETY: the buffer was made of zeroes, so every byte of it is initialised.
        *to = unsafe { byte.assume_init() };
    }
    // SAFETY: as above.
    let control: Vec<u8> = control[..control_length].iter().map(|b| unsafe { b.assume_init() }).collect();
    let from = from.as_socket().ok_or_else(|| io::Error::other("a datagram without a source"))?;
    Ok((length, from, destination(&control)))
}

/// Sends one datagram without waiting, from the given address.
pub fn send_from(socket: &Socket, buffer: &[u8], to: SocketAddr, from: IpAddr) -> io::Result<()> {
    let control = match from {
        IpAddr::V4(addr) => {
            // struct in_pktinfo: interface, source, (ignored) destination.
            let mut info = [0; 12];
            info[4..8].copy_from_slice(&addr.octets());
            control_message(libc::IPPROTO_IP, libc::IP_PKTINFO, &info)
        }
        IpAddr::V6(addr) => {
            // struct in6_pktinfo: source, interface.
            let mut info = [0; 20];
            info[..16].copy_from_slice(&addr.octets());
            control_message(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info)
        }
    };
    let to = SockAddr::from(to);
    let slices = [IoSlice::new(buffer)];
    let message = MsgHdr::new().with_addr(&to).with_buffers(&slices).with_control(&control);
    socket.sendmsg(&message, libc::MSG_DONTWAIT).map(drop)
}

/// Sends one datagram to each destination with one sendmmsg. Returns the number of datagrams sent.
pub fn send_many(socket: BorrowedFd<'_>, datagrams: &[(Vec<u8>, SocketAddr)]) -> io::Result<usize> {
    use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, SocketAddrAny, sendmmsg};
    let addresses: Vec<SocketAddrAny> = datagrams.iter().map(|(_, to)| SocketAddrAny::from(*to)).collect();
    let slices: Vec<[IoSlice<'_>; 1]> =
        datagrams.iter().map(|(content, _)| [IoSlice::new(content)]).collect();
    let mut control: Vec<SendAncillaryBuffer<'_, '_, '_>> =
        datagrams.iter().map(|_| SendAncillaryBuffer::default()).collect();
    let mut messages: Vec<MMsgHdr<'_>> = addresses
        .iter()
        .zip(&slices)
        .zip(&mut control)
        .map(|((to, slices), control)| MMsgHdr::new_with_addr(to, slices, control))
        .collect();
    Ok(sendmmsg(socket, &mut messages, SendFlags::DONTWAIT)?)
}

/// The size of struct cmsghdr, a multiple of the alignment of control messages.
const HEADER: usize = 16;

fn control_message(level: libc::c_int, kind: libc::c_int, content: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + 24);
    message.extend_from_slice(&(HEADER + content.len()).to_ne_bytes());
    message.extend_from_slice(&level.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(content);
    message.resize(message.len().next_multiple_of(size_of::<usize>()), 0);
    message
}

/// Finds the destination address in the control messages of a datagram.
fn destination(mut control: &[u8]) -> Option<IpAddr> {
    while control.len() >= HEADER {
        let length = usize::from_ne_bytes(control[..8].try_into().ok()?);
        let level = libc::c_int::from_ne_bytes(control[8..12].try_into().ok()?);
        let kind = libc::c_int::from_ne_bytes(control[12..16].try_into().ok()?);
        let content = control.get(HEADER..length)?;
        match (level, kind) {
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                let addr: [u8; 4] = content.get(8..12)?.try_into().ok()?;
                return Some(Ipv4Addr::from(addr).into());
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                let addr: [u8; 16] = content.get(..16)?.try_into().ok()?;
                return Some(Ipv6Addr::from(addr).into());
            }
            _ => control = control.get(length.next_multiple_of(size_of::<usize>())..)?,
        }
    }
    None
}
