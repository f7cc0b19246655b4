//! Netlink as far as one loopback device needs it: sockets, and requests to rtnetlink(7).
//!
//! Encoding is pure and tested; [`Route`] sends one request at a time and waits for its acknowledgement.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::error::{Context, SysError};

const HEADER_LEN: usize = 16;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;

const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const RT_SCOPE_HOST: u8 = 254;
const RT_TABLE_LOCAL: u8 = 255;
const RTPROT_STATIC: u8 = 4;
const RTN_LOCAL: u8 = 2;

/// The loopback device's index, in every network namespace.
pub(crate) const LOOPBACK: u32 = 1;

/// A netlink socket of a protocol, in these multicast groups.
#[expect(
    unsafe_code,
    reason = "rustix has no netlink addresses for every protocol"
)]
pub(crate) fn socket(protocol: libc::c_int, groups: u32, blocking: bool) -> io::Result<OwnedFd> {
    let nonblock = if blocking { 0 } else { libc::SOCK_NONBLOCK };
    let flags = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | nonblock;
    // SAFETY: plain system call without pointers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, flags, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an all-zero sockaddr_nl is valid.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_groups = groups;
    let len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: the address is a sockaddr_nl of the stated length and outlives the call.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if bound < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(socket)
    }
}

/// One request with its attributes, padded as the kernel wants it.
fn request(kind: u16, flags: u16, body: &[u8], attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut message = vec![0; HEADER_LEN];
    message.extend_from_slice(body);
    message.resize(message.len().next_multiple_of(4), 0);
    for (name, value) in attributes {
        let len = (4 + value.len()) as u16;
        message.extend_from_slice(&len.to_ne_bytes());
        message.extend_from_slice(&name.to_ne_bytes());
        message.extend_from_slice(value);
        message.resize(message.len().next_multiple_of(4), 0);
    }
    let len = message.len() as u32;
    message[..4].copy_from_slice(&len.to_ne_bytes());
    message[4..6].copy_from_slice(&kind.to_ne_bytes());
    message[6..8].copy_from_slice(&(flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message[8..12].copy_from_slice(&1_u32.to_ne_bytes());
    message
}

fn link_up(index: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend_from_slice(&index.to_ne_bytes());
    body.extend_from_slice(&IFF_UP.to_ne_bytes());
    body.extend_from_slice(&IFF_UP.to_ne_bytes());
    request(RTM_NEWLINK, 0, &body, &[])
}

fn address(index: u32, address: Ipv4Addr) -> Vec<u8> {
    let mut body = vec![AF_INET, 32, 0, RT_SCOPE_HOST];
    body.extend_from_slice(&index.to_ne_bytes());
    let octets = address.octets();
    let attributes: [(u16, &[u8]); 2] = [(IFA_LOCAL, &octets), (IFA_ADDRESS, &octets)];
    request(
        RTM_NEWADDR,
        NLM_F_CREATE | NLM_F_REPLACE,
        &body,
        &attributes,
    )
}

fn local_route(index: u32, network: Ipv4Addr, prefix: u8) -> Vec<u8> {
    let mut body = vec![
        AF_INET,
        prefix,
        0,
        0,
        RT_TABLE_LOCAL,
        RTPROT_STATIC,
        RT_SCOPE_HOST,
        RTN_LOCAL,
    ];
    body.extend_from_slice(&[0; 4]);
    let (network, index) = (network.octets(), index.to_ne_bytes());
    let attributes: [(u16, &[u8]); 2] = [(RTA_DST, &network), (RTA_OIF, &index)];
    request(
        RTM_NEWROUTE,
        NLM_F_CREATE | NLM_F_REPLACE,
        &body,
        &attributes,
    )
}

/// What the kernel's answer says: 0 or an error number.
fn acknowledgement(answer: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    let code = i32::from_ne_bytes(answer.get(HEADER_LEN..HEADER_LEN + 4)?.try_into().ok()?);
    (kind == NLMSG_ERROR).then_some(-code)
}

/// A socket to rtnetlink.
#[derive(Debug)]
pub(crate) struct Route(OwnedFd);

impl Route {
    /// Opens it.
    pub(crate) fn open() -> Result<Self, SysError> {
        let opened = socket(libc::NETLINK_ROUTE, 0, true);
        opened
            .map(Self)
            .context(|| "open a netlink socket".to_owned())
    }

    fn ask(&self, what: &str, request: &[u8]) -> Result<(), SysError> {
        let ask = || -> io::Result<()> {
            rustix::io::write(&self.0, request)?;
            let mut answer = [0; 4096];
            let len = rustix::io::read(&self.0, &mut answer)?;
            match acknowledgement(&answer[..len]) {
                Some(0) => Ok(()),
                Some(code) => Err(Errno::from_raw_os_error(code).into()),
                None => Err(io::ErrorKind::InvalidData.into()),
            }
        };
        ask().context(|| what.to_owned())
    }

    /// Brings the loopback device up.
    pub(crate) fn loopback_up(&self) -> Result<(), SysError> {
        self.ask("bring up the loopback device", &link_up(LOOPBACK))
    }

    /// Gives the loopback device one more address.
    pub(crate) fn add_address(&self, to: Ipv4Addr) -> Result<(), SysError> {
        self.ask(&format!("add address {to}"), &address(LOOPBACK, to))
    }

    /// Makes every address of a network the machine's own.
    pub(crate) fn add_local(&self, network: Ipv4Addr, prefix: u8) -> Result<(), SysError> {
        let what = format!("make {network}/{prefix} local");
        self.ask(&what, &local_route(LOOPBACK, network, prefix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_kernels_layout() {
        let message = address(1, Ipv4Addr::new(198, 18, 0, 1));
        assert_eq!(message.len(), 16 + 8 + 8 + 8);
        assert_eq!(u32::from_ne_bytes(message[..4].try_into().unwrap()), 40);
        assert_eq!(message[16..20], [AF_INET, 32, 0, RT_SCOPE_HOST]);
        assert_eq!(message[28..32], [198, 18, 0, 1]);
        assert_eq!(
            local_route(1, Ipv4Addr::new(198, 18, 0, 0), 15).len(),
            16 + 12 + 16
        );
        assert_eq!(link_up(1).len(), 32);
    }

    #[test]
    fn odd_attributes_are_padded() {
        let message = request(1, 0, &[1], &[(7, b"abc"), (8, b"")]);
        assert_eq!(message.len(), 16 + 4 + 8 + 4);
        assert_eq!(message[20..22], 7_u16.to_ne_bytes());
    }

    #[test]
    fn answers_are_read_with_care() {
        let mut answer = vec![0; 20];
        answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        assert_eq!(acknowledgement(&answer), Some(0));
        answer[16..20].copy_from_slice(&(-17_i32).to_ne_bytes());
        assert_eq!(acknowledgement(&answer), Some(17));
        assert_eq!(acknowledgement(&answer[..19]), None);
        assert_eq!(acknowledgement(&[]), None);
    }
}
