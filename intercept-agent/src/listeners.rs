//! stub
use crate::{cgroup::CgroupDir, netns::Netns};
use std::{net::IpAddr, os::fd::OwnedFd};
pub struct Listener {
    pub family: u8,
    pub addr: IpAddr,
    pub port: u16,
    pub v6only: bool,
    pub fd: OwnedFd,
}
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct ListenerError;
pub fn find(_: &Netns, _: &CgroupDir, _: &[u16]) -> Result<Vec<Listener>, ListenerError> {
    Ok(vec![])
}
