//! Layouts of the maps of joined connections, and the reasons for which a message goes by TCP instead. The programs are an
//! object of their own, loaded for the first pod with `--accelerate`.

use bytemuck::{Pod, Zeroable};

use crate::{NetnsCookie, Slot};

/// Longest name of an executable in bytes, including the terminating NUL.
pub const NAME_LENGTH: usize = 32;
/// Unread bytes of a joined connection beyond which messages go by TCP.
pub const MAX_UNREAD_BYTES: u32 = 1 << 20;
/// Unread messages of a joined connection beyond which messages go by TCP. Each costs a kilobyte of kernel memory besides
/// its bytes.
pub const MAX_UNREAD_MESSAGES: u32 = 256;
/// Cells of `JOIN_HINTS`.
pub const HINTS: u32 = 1 << 14;

/// The number of a helper that no kernel has. In the program of messages it stands for `bpf_rdonly_cast`, whose number the agent
/// fills in when it loads the program.
pub const RDONLY_CAST: u32 = 0x7fff_0001;

/// Cells of `JOIN_SHORT`.
pub const SHORT_CELLS: u32 = 1 << 12;
/// Connections of a pod to one destination that ended after one message, in a second, from which on most further ones are
/// not joined.
pub const MANY_SHORT: u8 = 64;
/// One of this many is joined all the same. A power of two.
pub const PROBED: u16 = 16;

/// Values of [`JoinSocket::kind`].
pub mod kind {
    /// A known proxy's listener on the inbound port; accepted sockets start with a copy.
    pub const LISTENER: u32 = 1;
    /// A known proxy's connecting socket.
    pub const DIALLING: u32 = 2;
    /// A connecting socket that waits for its peer.
    pub const OFFERED: u32 = 3;
    /// The peer is known.
    pub const PAIRED: u32 = 4;
}

/// A pod: its netns cookie and its cell in the maps.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct PodCell {
    /// Netns cookie.
    pub netns: NetnsCookie,
    /// Index into `JOIN_PODS` and `JOIN_COUNTERS`.
    pub slot: Slot,
    /// Zero.
    pub reserved: u32,
}

/// One end of a connection.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct JoinEnd {
    /// Address of the kernel's socket. It is only read from, and only while a socket with `cookie` exists.
    pub sock: u64,
    /// Socket cookie, which the kernel never reuses; the key in `JOIN_ENDS`.
    pub cookie: u64,
    /// The pod that the socket belongs to.
    pub pod: PodCell,
}

/// Key of `JOIN_OFFERS`: the initial sequence numbers of both directions of a connection. Nothing between the two ends
/// changes them, except what terminates one connection and opens another.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug, Default)]
#[repr(C)]
pub struct SequenceKey {
    /// Of the connecting end.
    pub dialled: u32,
    /// Of the accepting end.
    pub accepted: u32,
}

/// Value of `JOIN_OFFERS`: the connecting end waits here for the accepting one.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct JoinOffer {
    /// The connecting end.
    pub dialled: JoinEnd,
    /// The accepting end; all zero until it is known.
    pub accepted: JoinEnd,
}

/// Value of `JOIN_SOCKETS`.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct JoinSocket {
    /// A value of [`kind`].
    pub kind: u32,
    /// For the last message: the discriminant of [`TcpReason`] if it went by TCP, [`JoinSocket::JOINED`] if it was joined.
    /// Zero before the first message.
    pub last: u32,
    /// The pod that the socket belongs to.
    pub pod: PodCell,
    /// Valid while [`kind`] is `OFFERED`.
    pub sequence: SequenceKey,
    /// The peer, once it is known.
    pub peer: JoinEnd,
    /// Bytes of joined messages since the mark. The mark tells how much has been read.
    pub marked_bytes: u64,
    /// Joined messages since the mark.
    pub marked_messages: u32,
    /// Joined messages before the mark that may be unread.
    pub older_messages: u32,
    /// Messages that were sent, joined or by TCP.
    pub messages: u32,
    /// Zero.
    pub reserved: u32,
}

impl JoinSocket {
    /// See [`JoinSocket::last`].
    pub const JOINED: u32 = u32::MAX;
}

/// Key of `JOIN_PROXIES`: an executable that is accepted as a pod's proxy.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ProxyName {
    /// Netns cookie of the pod.
    pub netns: NetnsCookie,
    /// Last component of the executable's path, padded with NUL.
    pub name: [u8; NAME_LENGTH],
}

impl ProxyName {
    /// `None` if the name is empty, too long or a path.
    pub fn new(netns: NetnsCookie, name: &str) -> Option<Self> {
        let mut padded = [0; NAME_LENGTH];
        let fits = !name.is_empty() && name.len() < NAME_LENGTH && !name.contains(['/', '\0']);
        padded.get_mut(..name.len()).filter(|_| fits)?.copy_from_slice(name.as_bytes());
        Some(Self { netns, name: padded })
    }
}

macro_rules! counted {
    ($(#[$meta:meta])* $vis:vis enum $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u32)]
        $vis enum $name { $($(#[$doc])* $variant,)* }

        impl $name {
            /// All of them, in the order of their counters.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The word in `status` and metrics. Stable.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }
    };
}

counted! {
    /// Counted per pod.
    pub enum JoinCount {
        /// Ends in this pod whose peer was found on this node.
        Joined = "joined",
        /// Connections and listeners of executables that are not accepted proxies.
        RefusedProxy = "refused_proxy",
        /// Connections for which a map had no room.
        RefusedFull = "refused_full",
        /// Connections to a destination to which many others ended after one message.
        Short = "short",
    }
}

counted! {
    /// Why a message of a paired connection goes by TCP. Counted when a connection changes to TCP, not for every message.
    pub enum TcpReason {
        /// Joining is switched off on the node or in one of the two pods.
        Off = "switched_off",
        /// Bytes sent by TCP are still unread.
        Unread = "tcp_unread",
        /// This end can no longer send, or has an upper layer such as kTLS.
        State = "own_state",
        /// The peer is closed or no longer receives.
        Closed = "peer_closed",
        /// The reader's descriptor is blocking, or the connection has not been accepted yet.
        Blocking = "reader_blocks",
        /// The reader has set SO_RCVLOWAT.
        LowWater = "reader_low_water",
        /// Too many bytes are unread.
        Bytes = "unread_bytes",
        /// Too many messages are unread.
        Messages = "unread_messages",
        /// The reader's memory cgroup is nearly full.
        Memory = "reader_memory",
        /// The peer is no longer in the map.
        Gone = "peer_gone",
    }
}

/// Number of counters per pod: those of [`JoinCount`], then those of [`TcpReason`].
pub const JOIN_COUNTER_COUNT: usize = JoinCount::ALL.len() + TcpReason::ALL.len();

/// Value of `JOIN_COUNTERS`, per CPU.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct JoinCounters {
    /// Indexed by [`JoinCount`], then by [`TcpReason`].
    pub counts: [u64; JOIN_COUNTER_COUNT],
}

const _: () = {
    assert!(size_of::<PodCell>() == 16);
    assert!(size_of::<JoinEnd>() == 32);
    assert!(size_of::<SequenceKey>() == 8);
    assert!(size_of::<JoinOffer>() == 64);
    assert!(size_of::<JoinSocket>() == 88);
    assert!(size_of::<ProxyName>() == 40);
};
