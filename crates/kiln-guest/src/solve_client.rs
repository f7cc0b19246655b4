//! The build client: `kiln-solve` of the root disk stays beside BuildKit, warm in every clone; this program, called as [`NAME`], passes one
//! build to it and its progress back.
//!
//! Protocol: the header of `machine-image/buildkit/kiln-solve/main.go`. A root disk without the client is an older one: it has `buildctl`.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

/// The name under which this program is the connector.
pub(crate) const NAME: &str = "kiln-solve";
/// Where the host finds the connector.
pub(crate) const PATH: &str = "/run/kiln/kiln-solve";
/// The client in the root disk.
pub(crate) const PROGRAM: &str = "/usr/local/bin/kiln-solve";
/// Where the client listens: in the directory of BuildKit's own socket, which no step sees.
pub(crate) const SOCKET: &str = "/run/buildkit/kiln-solve.sock";
/// Longest line of progress.
const LINE_MAX: u64 = 16 * 1024 * 1024;
/// Exit code when the client cannot be reached.
const UNREACHABLE: u8 = 125;

/// `kiln-solve REQUEST`: the request is one line of JSON.
pub(crate) fn main(arguments: &[OsString]) -> ExitCode {
    let [request] = arguments else {
        crate::log::raw("error: kiln-solve takes one request");
        return ExitCode::from(crate::USAGE);
    };
    match pass(
        Path::new(SOCKET),
        request.as_bytes(),
        &mut io::stdout().lock(),
    ) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            crate::log::raw(&format!("error: the build client does not answer: {error}"));
            ExitCode::from(UNREACHABLE)
        }
    }
}

/// Gives whether the build is done; its last words went out as a line that begins with `error: `.
fn pass(socket: &Path, request: &[u8], out: &mut impl Write) -> io::Result<bool> {
    if request.contains(&b'\n') {
        return Err(io::Error::other("the request is more than one line"));
    }
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(request)?;
    stream.write_all(b"\n")?;
    let mut lines = BufReader::with_capacity(64 * 1024, stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        lines.by_ref().take(LINE_MAX).read_until(b'\n', &mut line)?;
        match line.split_first() {
            Some((b's', progress)) if progress.ends_with(b"\n") => out.write_all(progress)?,
            Some((b'd', _)) => return out.flush().map(|()| true),
            Some((b'e', words)) => {
                out.write_all(b"error: ")?;
                out.write_all(words)?;
                return out.flush().map(|()| false);
            }
            _ => return Err(io::Error::other("it ended in the middle of a build")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn passed(answer: &'static [u8]) -> (io::Result<bool>, String) {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("s");
        let door = UnixListener::bind(&socket).expect("a socket");
        let client = std::thread::spawn(move || {
            let (mut stream, _) = door.accept().expect("a connection");
            let mut request = [0; 3];
            stream.read_exact(&mut request).expect("the request");
            assert_eq!(&request, b"{}\n");
            stream.write_all(answer).expect("written");
        });
        let mut out = Vec::new();
        let done = pass(&socket, b"{}", &mut out);
        client.join().expect("the client");
        (done, String::from_utf8(out).expect("text"))
    }

    #[test]
    fn progress_passes_and_the_last_line_decides() {
        let (done, out) = passed(b"s{\"a\":1}\ns{}\nd\n");
        assert_eq!(
            (done.expect("passed"), out.as_str()),
            (true, "{\"a\":1}\n{}\n")
        );
        let (done, out) = passed(b"s{}\nefailed to solve: x\n");
        assert_eq!(
            (done.expect("passed"), out.as_str()),
            (false, "{}\nerror: failed to solve: x\n")
        );
    }

    #[test]
    fn a_client_that_ends_early_is_no_success() {
        for answer in [b"".as_slice(), b"s{}\n", b"s{\"cut\":", b"?\n"] {
            assert!(passed(answer).0.is_err(), "{answer:?}");
        }
        let missing = pass(Path::new("/nonexistent/socket"), b"{}", &mut Vec::new());
        assert!(missing.is_err());
        assert!(pass(Path::new("/nonexistent"), b"{}\n{}", &mut Vec::new()).is_err());
    }
}
