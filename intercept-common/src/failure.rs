//! What the programs do when something fails inside them. This table is the policy: the programs ask it, and the
//! same words are counted, logged and documented.

/// What becomes of the flow when a program fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnFailure {
    /// The flow is refused: it must not pass around the proxy.
    Closed,
    /// The flow goes on; what is lost is named by the failure.
    Open,
}

macro_rules! failures {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal, $policy:ident;)+) => {
        /// A failure inside a program.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        #[repr(u8)]
        pub enum Failure { $($(#[doc = $doc])+ $name),+ }

        impl Failure {
            /// All of them, in the order of their discriminants.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The word for it in logs and metrics. Stable.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word),+ }
            }

            /// What it means, for people.
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii()),+ }
            }

            /// What becomes of the flow.
            #[inline(always)]
            pub const fn policy(self) -> OnFailure {
                match self { $(Self::$name => OnFailure::$policy),+ }
            }
        }
    };
}

failures! {
    /// nothing listens on the proxy's port: refused, as under iptables
    NoListener = "no_listener", Closed;
    /// no memory to remember the original destination: the connect is refused
    NoStorage = "no_storage", Closed;
    /// the original destination could not be stored: the connect is refused (EHOSTUNREACH)
    OrigDstFull = "orig_dst_full", Closed;
    /// the source address could not be bound: the proxy sees a loopback client
    SourceNotBound = "source_not_bound", Open;
    /// the proxy's listener could not be registered: inbound is refused until it is
    ListenerNotAdded = "listener_not_added", Closed;
    /// the program that decides on inbound flows is not there: inbound is refused
    SteerMissing = "steer_missing", Closed;
    /// the pod has as many redirected connections as it may have: the connect is refused (ENOBUFS)
    TooManyConnections = "too_many_connections", Closed;
    /// the proxy listens by MPTCP, which cannot be handed connections: inbound is refused until it listens by TCP
    MptcpListener = "mptcp_listener", Closed;
    /// the proxy was refused a socket of MPTCP (EPROTONOSUPPORT), so that it listens by TCP
    MptcpRefused = "mptcp_refused", Closed;
    /// a process outside of the proxy's container listens on the proxy's port: it gets no inbound connections
    ForeignListener = "foreign_listener", Closed;
}
