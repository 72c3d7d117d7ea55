//! What is read of the kernel's description of an interface.

use netlink_packet_core::{
    DecodeError, ErrorContext as _, NetlinkDeserializable, NetlinkHeader, NlasIterator, Parseable as _,
};
use netlink_packet_route::{
    AddressFamily,
    link::{AfSpecInet6, LinkFlags, LinkHeader, LinkMessageBuffer},
};

use super::Interface;
use crate::netlink;

/// An answer to `RTM_GETLINK`.
///
/// It has some fifty attributes, of which only these are read. Decoding all of them takes longer than it takes the kernel to write
/// them, and fails for a pod that has chosen a name that is not UTF-8.
pub(super) struct InterfaceReply {
    pub(super) interface: Interface,
    /// Whether it is the loopback interface and has IPv6 enabled.
    pub(super) is_loopback_v6: bool,
}

impl NetlinkDeserializable for InterfaceReply {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let header = LinkHeader::parse(payload)?;
        let loopback = header.flags.contains(LinkFlags::Loopback);
        let (mut name, mut is_loopback_v6) = (String::new(), false);
        for attribute in attributes(payload.get(size_of::<LinkMessageBuffer>()..).unwrap_or_default()) {
            let attribute = attribute.context("reading the attributes of an interface")?;
            match attribute.kind() {
                libc::IFLA_IFNAME => name = netlink::name(attribute.value()),
                libc::IFLA_AF_SPEC if loopback => is_loopback_v6 = has_v6(attribute.value())?,
                _ => {}
            }
        }
        let up = header.flags.contains(LinkFlags::Up);
        Ok(Self { interface: Interface { index: header.index, name, loopback, up }, is_loopback_v6 })
    }
}

fn attributes(bytes: &[u8]) -> NlasIterator<&[u8]> {
    NlasIterator::new(bytes)
}

/// Whether the settings of an interface, by address family, enable IPv6.
fn has_v6(families: &[u8]) -> Result<bool, DecodeError> {
    for family in attributes(families) {
        let family = family.context("reading the settings of an interface")?;
        if family.kind() != u16::from(u8::from(AddressFamily::Inet6)) {
            continue;
        }
        for setting in attributes(family.value()) {
            let setting = setting.context("reading the settings of IPv6")?;
            if let AfSpecInet6::DevConf(settings) = AfSpecInet6::parse(&setting)? {
                return Ok(settings.disable_ipv6 == 0);
            }
        }
    }
    Ok(false)
}
