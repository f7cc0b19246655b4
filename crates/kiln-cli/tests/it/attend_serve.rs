//! Input, terminals and ports of runs through `kiln serve` with a worker: real machines.

use std::io::{Read as _, Write as _};
use std::process::Stdio;

use crate::annex::Annex;
use crate::kept::typed;
use crate::serve::serve;
use crate::support::{Kiln, free_port, get, path, until};

/// Sends this to a command's standard input, as a pipe does; gives its output and code.
fn piped(kiln: &Kiln, args: &[&str], input: &[u8]) -> (Vec<u8>, i32) {
    let mut command = kiln.command(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("starts");
    let (mut stdin, mut stdout) = (
        child.stdin.take().expect("piped"),
        child.stdout.take().expect("piped"),
    );
    let input = input.to_vec();
    let sending = std::thread::spawn(move || stdin.write_all(&input));
    let mut output = Vec::new();
    stdout.read_to_end(&mut output).expect("reads");
    sending.join().expect("sent").expect("taken");
    let status = child.wait().expect("ends");
    (output, status.code().unwrap_or(-1))
}

/// An HTTP server of the machine image, as small as they come.
const SERVES: &str = r#"perl -MSocket -e 'socket(S, PF_INET, SOCK_STREAM, 0); setsockopt(S, SOL_SOCKET, SO_REUSEADDR, 1);
    bind(S, sockaddr_in(8000, INADDR_ANY)) or die; listen(S, 5); $| = 1; print "listens\n";
    while (accept(C, S)) { sysread(C, $ask, 4096); syswrite(C, "HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nserved"); close(C) }'"#;

#[test]
fn a_run_through_a_server_has_input_a_terminal_and_ports() {
    let Some(kiln) = Annex::open() else { return };
    let (server, at) = serve(&kiln, free_port());
    let small = ["--no-source", "--cpus", "1", "--memory", "512M"];
    let on = [&["--server", at.as_str(), "run"][..], &small].concat();

    // Any bytes, more than is on its way at a time; the end of input is the end.
    let input: Vec<u8> = (0..700_000_u32)
        .map(|n| (n.wrapping_mul(n) >> 7) as u8)
        .collect();
    let words = [&on[..], &["--", "sh", "-c", "cat; exit 7"]].concat();
    let (output, code) = piped(&kiln, &words, &input);
    assert_eq!(code, 7);
    assert!(output == input, "{} of {} bytes", output.len(), input.len());

    let terminal = format!(
        "{} --server {at} run {} -t -- sh -i",
        path(&kiln.program),
        small.join(" ")
    );
    let keys = [
        ("# ", "test -t 0 && echo a-\"tty\"; stty size\r"),
        ("33 101", "exit 6\r"),
    ];
    let (code, all) = typed(&kiln, &terminal, &keys, || {});
    assert!(code == 6 && all.contains("a-tty"), "{code} {all}");
    assert!(all.contains(" icanon"), "the terminal is given back: {all}");

    // A port; and whoever holds the command is killed: it ends, and nothing of it stays.
    let port = free_port();
    let publish = format!("{port}:8000");
    let words = [&on[..], &["-p", &publish, "--", "sh", "-c", SERVES]].concat();
    let mut serving = kiln.start(&words);
    serving.until_it_prints("listens");
    let got = until("an answer", || get(port, "/"));
    assert!(got.0 == 200 && got.1.ends_with("served"), "{got:?}");
    serving.signal("KILL");
    drop(serving);
    until("its end", || kiln.vmms().is_empty().then_some(()));
    let newest = until("its record", || {
        let said = kiln.run(&["--server", &at, "job", "show", "--json"]);
        let job: serde_json::Value = serde_json::from_str(said.exits(0).out.trim()).ok()?;
        (job["state"] == "finished").then_some(job)
    });
    assert_eq!(newest["outcome"]["class"], "cancelled", "{newest}");

    for flag in ["-i", "-t", "-p=1:1"] {
        let words = [&on[..], &[flag, "--detach", "--", "true"]].concat();
        kiln.run(&words).exits(2).says("--detach");
    }
    server.signal("INT");
    server.end().exits(0);
}
