//! Who listens on a port of this host: proc(5), `net/tcp` and the descriptors of processes.

use std::fs;
use std::net::SocketAddr;

/// Processes whose descriptors are looked at, at most.
const PROCESSES_MAX: usize = 20_000;
/// State of a listening socket in `net/tcp`.
const LISTEN: &str = "0A";

/// `name (process N)` of the program that listens there, as far as this user may know.
pub(crate) fn holder(address: SocketAddr) -> Option<String> {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .flat_map(|text| listening(&text, address.port()))
        .collect();
    let links: Vec<String> = inodes
        .iter()
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    let processes = fs::read_dir("/proc").ok()?.flatten().take(PROCESSES_MAX);
    for process in processes {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let fds = fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let holds = |fd: fs::DirEntry| {
            fs::read_link(fd.path())
                .is_ok_and(|to| links.iter().any(|link| to.as_os_str() == link.as_str()))
        };
        if fds.into_iter().any(holds) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            let name: String = name.trim().chars().take(32).collect();
            return Some(format!("{name} (process {pid})"));
        }
    }
    (!links.is_empty()).then(|| "another user's program".to_owned())
}

/// Inodes of sockets that listen on a port, from the text of `net/tcp`.
fn listening(text: &str, port: u16) -> Vec<String> {
    let wanted = format!(":{port:04X}");
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (local, state) = (words.nth(1)?, words.nth(1)?);
            let inode = words.nth(5)?;
            (local.ends_with(&wanted) && state == LISTEN).then(|| inode.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_read() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
             0: 0100007F:13D8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0\n\
             1: 0100007F:13D8 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 100 0\n";
        assert_eq!(listening(text, 5080), ["4711"]);
        assert!(listening(text, 5081).is_empty());
    }

    #[test]
    fn this_process_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let found = holder(address).expect("we listen");
        assert!(
            found.ends_with(&format!("(process {})", std::process::id())),
            "{found}"
        );
        drop(listener);
        assert_eq!(holder(address), None);
    }
}
