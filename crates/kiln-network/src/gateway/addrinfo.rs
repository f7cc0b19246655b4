//! Asks the host's resolver for the IPv6 addresses of a name alone, and tells "it has none" from "nobody knows".
//!
//! The standard library asks for both families at once. Then an error about one of them is lost when the other has an answer, and what kind of error
//! it was is only in its text.

use std::ffi::CString;
use std::io;
use std::net::Ipv6Addr;
use std::ptr;

/// `EAI_NODATA` and `EAI_ADDRFAMILY` of netdb.h on Linux: the name is there, and has no such address.
const NO_SUCH_ADDRESS: [libc::c_int; 2] = [-5, -9];

/// Every IPv6 address of the name, none when a server said that there is none. Waits as long as the host's resolver does.
///
/// # Errors
/// When nobody answered, or a server had no answer (SERVFAIL and such): then nobody knows.
pub(super) fn ipv6_of(host: &str) -> io::Result<Vec<Ipv6Addr>> {
    let host = CString::new(host).map_err(io::Error::other)?;
    match ask(&host) {
        Ok(found) => Ok(found),
        Err(code) if code == libc::EAI_NONAME || NO_SUCH_ADDRESS.contains(&code) => Ok(Vec::new()),
        Err(libc::EAI_SYSTEM) => Err(io::Error::last_os_error()),
        Err(code) => Err(io::Error::other(format!(
            "the host's resolver does not know (code {code})"
        ))),
    }
}

#[expect(unsafe_code, reason = "getaddrinfo(3) with hints")]
fn ask(host: &CString) -> Result<Vec<Ipv6Addr>, libc::c_int> {
    // SAFETY: a C struct of integers and pointers, for which zeros are valid and mean "no wish".
    let mut hints: libc::addrinfo = unsafe { std::mem::zeroed() };
    hints.ai_family = libc::AF_INET6;
    hints.ai_socktype = libc::SOCK_STREAM;
    let mut list: *mut libc::addrinfo = ptr::null_mut();
    // SAFETY: the name ends with a zero byte, the hints are initialised, and `list` may be written to. All live during the call.
    let code =
        unsafe { libc::getaddrinfo(host.as_ptr(), ptr::null(), &raw const hints, &raw mut list) };
    if code != 0 {
        return Err(code);
    }
    let mut found = Vec::new();
    let mut at = list;
    while !at.is_null() {
        // SAFETY: an element of the list that the call above made and that is freed below.
        let one = unsafe { &*at };
        let long = one.ai_addrlen as usize >= size_of::<libc::sockaddr_in6>();
        if one.ai_family == libc::AF_INET6 && long && !one.ai_addr.is_null() {
            // SAFETY: of this family and length it is a sockaddr_in6; read unaligned because its pointer is one to a sockaddr.
            let addr = unsafe { one.ai_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
            found.push(Ipv6Addr::from(addr.sin6_addr.s6_addr));
        }
        at = one.ai_next;
    }
    // SAFETY: the list of the call above, freed once, and nothing borrows from it any more.
    unsafe { libc::freeaddrinfo(list) };
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_its_own_answer_and_one_of_the_other_family_is_none() {
        assert_eq!(
            ipv6_of("2600::7").expect("literal"),
            ["2600::7".parse::<Ipv6Addr>().expect("address")]
        );
        assert_eq!(
            ipv6_of("192.0.2.7").expect("a definite answer"),
            Vec::<Ipv6Addr>::new()
        );
        assert!(ipv6_of("a\0b").is_err());
    }
}
