//! What the programs that join connections share with the agent: the layouts of their maps, and why a message is not
//! joined. They are an object of their own, loaded for the first pod that asks for it.

use bytemuck::{Pod, Zeroable};

/// Longest name of an executable, with the NUL that ends it.
pub const NAME_LENGTH: usize = 32;
/// Bytes that may wait unread past TCP before messages go by TCP.
pub const MAX_UNREAD_BYTES: u32 = 1 << 20;
/// Messages that may wait unread past TCP. Each takes a kilobyte of the kernel's memory besides its bytes.
pub const MAX_UNREAD_MESSAGES: u32 = 256;
/// Cells of `JOIN_HINTS`.
pub const HINTS: u32 = 1 << 14;

/// Values of [`JoinSocket::kind`].
pub mod kind {
    /// A known proxy's socket that listens on the inbound port; what it accepts starts as a copy.
    pub const LISTENER: u32 = 1;
    /// A known proxy's socket that connects.
    pub const DIALLING: u32 = 2;
    /// It dialled, and offers itself to the other end.
    pub const OFFERED: u32 = 3;
    /// The other end is known.
    pub const PAIRED: u32 = 4;
}

/// One pod, as the programs name it: its netns cookie, and the cell that says whether it is accelerated.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct PodCell {
    /// Netns cookie.
    pub netns: u64,
    /// Index into `JOIN_PODS` and `JOIN_COUNTERS`.
    pub slot: u32,
    /// Zero.
    pub reserved: u32,
}

/// One end of a connection.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct JoinEnd {
    /// Address of the kernel's socket. Only read from, and only while a socket with `cookie` is there.
    pub sock: u64,
    /// JoinSocket cookie, which no other socket ever has; the key in `JOIN_ENDS`.
    pub cookie: u64,
    /// Whose socket it is.
    pub pod: PodCell,
}

/// Key of `JOIN_OFFERS`: the first sequence numbers of a connection, of the bytes that each end sends. Nothing on the way
/// between two ends changes them, but for what ends one connection and begins another.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Hash, Debug, Default)]
#[repr(C)]
pub struct SequenceKey {
    /// Of the end that dialled.
    pub dialled: u32,
    /// Of the end that accepted.
    pub accepted: u32,
}

/// Value of `JOIN_OFFERS`: the end that dialled waits here for the one that accepts.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct JoinOffer {
    /// The end that dialled.
    pub dialled: JoinEnd,
    /// The end that accepted; all zero until it is there.
    pub accepted: JoinEnd,
}

/// Value of `JOIN_SOCKETS`, the storage of a socket.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct JoinSocket {
    /// A value of [`kind`].
    pub kind: u32,
    /// Discriminant of [`TcpReason`] after a message that went by TCP, [`JoinSocket::JOINED`] after one that was joined, and zero
    /// before the first.
    pub last: u32,
    /// Whose it is.
    pub pod: PodCell,
    /// While it is offered.
    pub sequence: SequenceKey,
    /// The other end, once it is known.
    pub peer: JoinEnd,
    /// Bytes sent past TCP since the mark, by which it is known what has been read.
    pub marked_bytes: u64,
    /// Messages since the mark.
    pub marked_messages: u32,
    /// Messages before the mark that may be unread.
    pub older_messages: u32,
}

impl JoinSocket {
    /// See [`JoinSocket::last`].
    pub const JOINED: u32 = u32::MAX;
}

/// Key of `JOIN_PROXIES`: an executable that a pod's proxy may be.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ProxyName {
    /// Netns cookie of the pod.
    pub netns: u64,
    /// Last part of the executable's path, NUL padded.
    pub name: [u8; NAME_LENGTH],
}

impl ProxyName {
    /// `None` if the name is empty, too long or a path.
    pub fn new(netns: u64, name: &str) -> Option<Self> {
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

            /// The word that `status` prints.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }
    };
}

counted! {
    /// What is counted of a pod's proxies' connections.
    pub enum JoinCount {
        /// Ends of this pod whose other end was found on this node.
        Joined = "joined",
        /// Connections and listeners of executables that are not known to be safe.
        RefusedProxy = "refused_proxy",
        /// Connections for which there was no room in a map.
        RefusedFull = "refused_full",
    }
}

counted! {
    /// Why a message of a joined connection goes by TCP all the same. A connection is counted under one of these when it
    /// leaves, not for each message.
    pub enum TcpReason {
        /// The switch of the node or of one of the two pods is off.
        Off = "switched_off",
        /// Bytes that went by TCP have not been read yet.
        Unread = "tcp_unread",
        /// This end is no longer open for sending, or has an upper layer such as TLS.
        State = "own_state",
        /// The other end is gone or takes no more.
        Closed = "peer_closed",
        /// The reader's descriptor blocks, or nobody has accepted it yet.
        Blocking = "reader_blocks",
        /// The reader has set SO_RCVLOWAT.
        LowWater = "reader_low_water",
        /// Too many bytes wait to be read.
        Bytes = "unread_bytes",
        /// Too many messages do.
        Messages = "unread_messages",
        /// The reader's memory cgroup is nearly full.
        Memory = "reader_memory",
        /// The other end is not in the map any more.
        Gone = "peer_gone",
    }
}

/// How many counters a pod has: those of [`JoinCount`], then those of [`TcpReason`].
pub const JOIN_COUNTER_COUNT: usize = JoinCount::ALL.len() + TcpReason::ALL.len();

/// Value of `JOIN_COUNTERS`, one a CPU.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct JoinCounters {
    /// By [`JoinCount`], then by [`TcpReason`].
    pub counts: [u64; JOIN_COUNTER_COUNT],
}

const _: () = {
    assert!(size_of::<PodCell>() == 16);
    assert!(size_of::<JoinEnd>() == 32);
    assert!(size_of::<SequenceKey>() == 8);
    assert!(size_of::<JoinOffer>() == 64);
    assert!(size_of::<JoinSocket>() == 80);
    assert!(size_of::<ProxyName>() == 40);
};
