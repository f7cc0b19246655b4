//! Who is at the other end of a connection, as far as the connection itself proves it: a uid on the private socket, a
//! worker's certificate over TLS, nobody otherwise. Never an address and never a header.

use std::io;
use std::net::{IpAddr, SocketAddr};

use kiln_core::access::Principal;
use kiln_core::job::TrustClass;
use kiln_core::{Priority, Role, TenantName};
use tokio::net::UnixStream;

use super::authority::PeerCertificate;

/// The other end of a connection; an extension of every request on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Peer {
    /// The private socket: the kernel says whose process it is.
    Local {
        /// User id.
        uid: u32,
    },
    /// TLS; a worker when it showed a certificate.
    Tls {
        /// Where from, for messages only.
        address: SocketAddr,
        /// The verified certificate.
        certificate: Option<PeerCertificate>,
    },
    /// Plain TCP.
    Plain {
        /// Where from, for messages only.
        address: SocketAddr,
    },
}

impl Peer {
    /// Of an accepted connection on the private socket.
    ///
    /// # Errors
    /// When the kernel does not say who it is.
    pub fn local(stream: &UnixStream) -> io::Result<Self> {
        Ok(Self::Local {
            uid: stream.peer_cred()?.uid(),
        })
    }

    /// Whether it is this program's own user or root, over the private socket.
    #[must_use]
    pub fn is_owner(&self) -> bool {
        matches!(self, Self::Local { uid } if *uid == 0 || *uid == rustix::process::geteuid().as_raw())
    }

    /// The worker that a certificate proves.
    #[must_use]
    pub fn worker(&self) -> Option<&PeerCertificate> {
        match self {
            Self::Tls { certificate, .. } => certificate.as_ref(),
            Self::Local { .. } | Self::Plain { .. } => None,
        }
    }
}

/// What counts as one place where requests come from: an address, and of IPv6 the network of 64 bits that one host has whole. For bounds alone.
#[must_use]
pub fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let bits = u128::from(v6) & !u128::from(u64::MAX);
            IpAddr::V6(bits.into())
        }
        v4 => v4,
    }
}

/// The owner of the installation, who came by the private socket and needs no token.
#[must_use]
pub fn owner() -> Principal {
    Principal {
        subject: "owner".to_owned(),
        token: None,
        tenant: TenantName::local(),
        role: Role::Admin,
        operator: true,
        scopes: None,
        priority_max: Priority::try_from(100).unwrap_or_default(),
        trust: TrustClass::Trusted,
        expires_unix_ms: None,
        gives_until_unix_ms: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_with_a_network_of_its_own_is_one_place() {
        let of = |text: &str| network_of(text.parse().expect("an address"));
        assert_eq!(of("2001:db8:1:2:3::4"), of("2001:db8:1:2:ffff::"));
        assert_ne!(of("2001:db8:1:2::"), of("2001:db8:1:3::"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }
}
