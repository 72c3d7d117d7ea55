//! Joins the two ends of a connection for the self-test, with a program and maps that are not pinned.

use std::{
    net::SocketAddr,
    os::fd::AsRawFd as _,
    sync::{Arc, Mutex},
};

use aya::{
    Ebpf,
    maps::{Array, MapError, SockHash},
    programs::{ProgramError, SkMsg},
};
use intercept_common::names;

use super::ends::{Latch, SocketPair};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/trial.o"));

/// Why the self-test cannot join connections.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// aya failed to create the maps.
    #[error("creating the maps of the self-test")]
    Load(#[source] Box<aya::EbpfError>),
    /// The kernel refused the program.
    #[error("loading and attaching the self-test's sk_msg program")]
    Program(#[source] Box<ProgramError>),
    /// The kernel refused a socket, or access to a map.
    #[error("accessing the self-test's map of connections")]
    Map(#[source] Box<MapError>),
    /// The object lacks a program or map.
    #[error("the built-in object has no {0}: the build is inconsistent")]
    Absent(&'static str),
    /// A socket has no IPv4 address.
    #[error("reading the addresses of a socket of the self-test")]
    Addresses(#[source] std::io::Error),
}

impl From<MapError> for JoinError {
    fn from(error: MapError) -> Self {
        Self::Map(Box::new(error))
    }
}

impl From<ProgramError> for JoinError {
    fn from(error: ProgramError) -> Self {
        Self::Program(Box::new(error))
    }
}

/// The program, attached to its map. Dropping it removes both.
pub(super) struct Joiner {
    ebpf: Ebpf,
    latch: Latch,
}

impl Joiner {
    pub(super) fn load() -> Result<Self, JoinError> {
        let mut ebpf = Ebpf::load(OBJECT).map_err(|error| JoinError::Load(Box::new(error)))?;
        let map = ebpf.map(names::PEERS).ok_or(JoinError::Absent(names::PEERS))?;
        let map = SockHash::<_, u64>::try_from(map)?.fd().try_clone().map_err(MapError::from)?;
        let program = ebpf.program_mut(names::SK_MSG).ok_or(JoinError::Absent(names::SK_MSG))?;
        let program: &mut SkMsg = program.try_into()?;
        program.load()?;
        program.attach(&map)?;
        let latch = ebpf.take_map(names::BY_TCP).ok_or(JoinError::Absent(names::BY_TCP))?;
        let latch = Latch(Some(Arc::new(Mutex::new(Array::try_from(latch)?))));
        Ok(Self { ebpf, latch })
    }

    /// Joins a connection on which nothing has been sent. It leaves the map when it is closed.
    pub(super) fn join(&mut self, ends: &mut SocketPair) -> Result<(), JoinError> {
        let map = self.ebpf.map_mut(names::PEERS).ok_or(JoinError::Absent(names::PEERS))?;
        let mut map = SockHash::<_, u64>::try_from(map)?;
        for end in [&ends.client, &ends.server] {
            let port = |addr: std::io::Result<SocketAddr>| addr.map(|addr| u64::from(addr.port()));
            let local = port(end.local_addr()).map_err(JoinError::Addresses)?;
            let remote = port(end.peer_addr()).map_err(JoinError::Addresses)?;
            map.insert(local << 32 | remote, end.as_raw_fd(), 0)?;
        }
        ends.latch = self.latch.clone();
        Ok(())
    }

    /// Returns the number of joined messages.
    pub(super) fn messages(&self) -> Result<u64, JoinError> {
        let map = self.ebpf.map(names::JOINED).ok_or(JoinError::Absent(names::JOINED))?;
        Ok(Array::<_, u64>::try_from(map)?.get(&0, 0)?)
    }
}
