//! Brings every TCP connection to a synthetic address to one listening socket.
//!
//! A BPF program of type `sk_lookup` (Linux 5.9, kernel documentation `bpf/prog_sk_lookup`) is asked which
//! socket takes a new connection. Ours gives all of 198.18.0.0/15 except the nameserver's address to our socket,
//! whatever the port. The accepted socket's own address is then the address the program meant. No packet filter, no
//! connection tracking, no module, and no userland tool is needed for it.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::{NAMESERVER, NETWORK, PREFIX};
use crate::error::{Context, SysError};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

/// Helpers by number (`linux/bpf.h`).
const HELPER_MAP_LOOKUP: i32 = 1;
const HELPER_SK_RELEASE: i32 = 86;
const HELPER_SK_ASSIGN: i32 = 124;

/// Offsets in `struct bpf_sk_lookup`.
const CTX_FAMILY: i16 = 8;
const CTX_PROTOCOL: i16 = 12;
const CTX_LOCAL_IP4: i16 = 40;

const VERDICT_PASS: i32 = 1;

/// One instruction of the machine in `linux/bpf.h`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Insn {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn insn(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Insn {
    Insn {
        code,
        registers: dst | src << 4,
        offset,
        immediate,
    }
}

const fn load_word(dst: u8, src: u8, offset: i16) -> Insn {
    insn(0x61, dst, src, offset, 0)
}

const fn copy(dst: u8, src: u8) -> Insn {
    insn(0xbf, dst, src, 0, 0)
}

const fn set(dst: u8, value: i32) -> Insn {
    insn(0xb7, dst, 0, 0, value)
}

/// 32-bit comparison; jumps over `skip` instructions when they differ.
const fn unless_equal(dst: u8, value: i32, skip: i16) -> Insn {
    insn(0x56, dst, 0, skip, value)
}

const fn if_equal(dst: u8, value: i32, skip: i16) -> Insn {
    insn(0x16, dst, 0, skip, value)
}

const fn call(helper: i32) -> Insn {
    insn(0x85, 0, 0, 0, helper)
}

/// An address as the program sees it: network byte order, loaded as a native word.
fn word(address: Ipv4Addr) -> i32 {
    i32::from_ne_bytes(address.octets())
}

/// The program. Jumps lead to the last two instructions.
fn program(map: RawFd) -> Vec<Insn> {
    let mask = Ipv4Addr::from(u32::MAX << (32 - PREFIX));
    let mut code = vec![
        copy(6, 1),
        load_word(2, 1, CTX_FAMILY),
        unless_equal(2, libc::AF_INET, 0),
        load_word(2, 1, CTX_PROTOCOL),
        unless_equal(2, libc::IPPROTO_TCP, 0),
        load_word(2, 1, CTX_LOCAL_IP4),
        if_equal(2, word(NAMESERVER), 0),
        insn(0x54, 2, 0, 0, word(mask)),
        unless_equal(2, word(NETWORK), 0),
        // The socket at index 0 of the map.
        insn(0x62, 10, 0, -4, 0),
        insn(0x18, 1, 1, 0, map),
        insn(0, 0, 0, 0, 0),
        copy(2, 10),
        insn(0x07, 2, 0, 0, -4),
        call(HELPER_MAP_LOOKUP),
        insn(0x15, 0, 0, 0, 0),
        copy(7, 0),
        copy(1, 6),
        copy(2, 7),
        set(3, 0),
        call(HELPER_SK_ASSIGN),
        copy(1, 7),
        call(HELPER_SK_RELEASE),
    ];
    let end = code.len();
    for (at, insn) in code.iter_mut().enumerate() {
        if matches!(insn.code, 0x56 | 0x16 | 0x15) {
            insn.offset = (end - at - 1) as i16;
        }
    }
    code.extend([set(0, VERDICT_PASS), insn(0x95, 0, 0, 0, 0)]);
    code
}

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct MapUpdate {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    kind: u32,
    insn_count: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[expect(unsafe_code, reason = "no crate here has bpf(2)")]
fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    let pointer: *const T = attributes;
    // SAFETY: the attributes are plain integers of the stated size; addresses in them are of buffers that the
    // callers keep alive over the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

#[expect(unsafe_code, reason = "takes a descriptor from bpf(2)")]
fn bpf_fd<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: the kernel just made this descriptor for us, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn number(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Gives all connections to synthetic addresses to `listener`, for as long as the machine runs.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn attach(listener: &TcpListener) -> Result<(), SysError> {
    attach_to(listener).context(|| "steer connections to names".to_owned())
}

fn attach_to(listener: &TcpListener) -> io::Result<()> {
    let map = MapCreate {
        kind: BPF_MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
        ..MapCreate::default()
    };
    let map = bpf_fd(BPF_MAP_CREATE, &map)?;
    let (key, value) = (0_u32, u64::from(number(listener)));
    let update = MapUpdate {
        map: number(&map),
        key: (&raw const key).addr() as u64,
        value: (&raw const value).addr() as u64,
        ..MapUpdate::default()
    };
    bpf(BPF_MAP_UPDATE_ELEM, &update)?;
    let insns = program(map.as_raw_fd());
    let license = c"Apache-2.0";
    let load = ProgLoad {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        insn_count: insns.len() as u32,
        insns: insns.as_ptr().addr() as u64,
        license: license.as_ptr().addr() as u64,
        name: *b"kiln_names\0\0\0\0\0\0",
        expected_attach_type: BPF_SK_LOOKUP,
        ..ProgLoad::default()
    };
    let program = bpf_fd(BPF_PROG_LOAD, &load)?;
    let namespace = std::fs::File::open("/proc/self/ns/net")?;
    let link = LinkCreate {
        program: number(&program),
        target: number(&namespace),
        attach_type: BPF_SK_LOOKUP,
        ..LinkCreate::default()
    };
    // The link ends with its descriptor: keep it for ever.
    std::mem::forget(bpf_fd(BPF_LINK_CREATE, &link)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_jumps_lead_to_the_verdict() {
        let code = program(5);
        let verdict = code.len() - 2;
        assert_eq!(code[verdict], set(0, VERDICT_PASS));
        let jumps: Vec<_> = code
            .iter()
            .enumerate()
            .filter(|(_, insn)| matches!(insn.code, 0x56 | 0x16 | 0x15))
            .map(|(at, insn)| at + 1 + insn.offset as usize)
            .collect();
        assert_eq!(jumps, [verdict; 5]);
        assert_eq!(size_of::<Insn>(), 8);
        assert_eq!(size_of::<ProgLoad>(), 72);
    }
}
