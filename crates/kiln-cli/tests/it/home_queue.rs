//! Without a server every command goes through the queue of its home, whose controller runs in one of them: what happens when that one ends.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;

use serde_json::Value;

use crate::annex::Annex;
use crate::support::{Started, app, until};

/// A run that has said it started; it says `over` after so many seconds.
fn started(annex: &Annex, seconds: u32) -> Started {
    let script = format!("echo started; sleep {seconds}; echo over");
    let mut running = annex.start(&["run", "--", "sh", "-c", &script]);
    let mut first = [0; 8];
    let stdout = running.child.stdout.as_mut().expect("piped");
    stdout.read_exact(&mut first).expect("started");
    running
}

fn jobs(annex: &Annex) -> Vec<Value> {
    let listed = annex.run(&["job", "list", "--json"]).exits(0).out;
    let line = |line: &str| serde_json::from_str(line).expect("JSON");
    listed.lines().map(line).collect()
}

#[test]
fn a_command_outlives_the_one_that_had_the_controller() {
    let Some(annex) = Annex::open() else { return };
    let first = started(&annex, 600);
    // Longer than a lease lives without a controller that renews it.
    let second = started(&annex, 18);
    assert_eq!(jobs(&annex).len(), 2);
    first.signal("KILL");
    first.end();
    let said = second.end().exits(0);
    assert_eq!(said.out, "over\n");
    // What the killed one held ended when its controller was taken over; it is not tried again.
    let lost = until("the end of the killed command's job", || {
        let over = jobs(&annex)
            .into_iter()
            .all(|job| job["state"] == "finished");
        over.then(|| jobs(&annex))
    });
    let classes: Vec<_> = lost
        .iter()
        .map(|job| job["outcome"]["class"].clone())
        .collect();
    assert_eq!(classes, [Value::Null, "lost".into()], "newest first");
    // Its machine's folder goes with the next command that starts a machine.
    annex.run(&["run", "--", "true"]).exits(0);
    annex.is_well();
}

#[test]
fn a_command_makes_room_for_a_server_and_goes_on() {
    let Some(annex) = Annex::open() else { return };
    let running = started(&annex, 5);
    let mut server = annex.start(&["serve", "--json"]);
    let out = server.child.stdout.take().expect("piped");
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line).expect("a line");
    let said: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(said["event"], "serving", "{said}");
    annex
        .run(&["serve"])
        .exits(2)
        .says("another kiln controller");
    assert_eq!(running.end().exits(0).out, "over\n");
    assert_eq!(jobs(&annex)[0]["outcome"]["verdict"], "passed");
    server.signal("TERM");
    server.child.wait().expect("ends");
    assert_eq!(jobs(&annex).len(), 1, "its jobs stay");
    annex.is_well();
}

#[test]
fn a_suspended_command_holds_up_nobody_and_goes_on() {
    let Some(annex) = Annex::open() else { return };
    let first = started(&annex, 3);
    first.signal("TSTP");
    let status = format!("/proc/{}/stat", first.child.id());
    until("the command to be suspended", || {
        let stat = std::fs::read_to_string(&status).ok()?;
        stat.contains(") T ").then_some(())
    });
    annex.run(&["run", "--", "echo", "meanwhile"]).exits(0);
    // Longer than a lease of a fleet's worker and its grace.
    let second = started(&annex, 22);
    assert_eq!(second.end().exits(0).out, "over\n");
    first.signal("CONT");
    assert_eq!(first.end().exits(0).out, "over\n");
    let verdicts = jobs(&annex)
        .into_iter()
        .map(|job| job["outcome"]["verdict"].clone());
    assert!(
        verdicts.clone().all(|verdict| verdict == "passed"),
        "{:?}",
        verdicts.collect::<Vec<_>>()
    );
    annex.is_well();
}

/// A fake collector: takes everything, and gives the bodies it got.
fn fake_collector() -> (u16, std::sync::mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    let port = listener.local_addr().expect("address").port();
    let (sender, bodies) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        while let Ok((line, _)) = listener.accept() {
            let mut reader = BufReader::new(line);
            let mut length = 0;
            loop {
                let mut head = String::new();
                reader.read_line(&mut head).expect("a line");
                let head = head.trim().to_ascii_lowercase();
                if let Some(text) = head.strip_prefix("content-length:") {
                    length = text.trim().parse().expect("a number");
                }
                if head.is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).expect("a body");
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            let sent = sender.send(String::from_utf8(body).expect("text"));
            let answered = reader.into_inner().write_all(answer);
            if sent.is_err() || answered.is_err() {
                return;
            }
        }
    });
    (port, bodies)
}

/// Whether any file below a folder holds this text.
fn holds(folder: &Path, text: &[u8]) -> bool {
    let inside = |path: &Path| match path.is_dir() {
        true => holds(path, text),
        false => std::fs::read(path)
            .is_ok_and(|bytes| bytes.windows(text.len()).any(|part| part == text)),
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).any(|path| inside(&path))
}

#[test]
fn a_homes_settings_hold_for_its_own_controller() {
    let (port, bodies) = fake_collector();
    let otlp = format!("otlp = \"http://127.0.0.1:{port}\"");
    let settings = format!("[controller]\nencrypt_logs = true\n{otlp}\n");
    let Some(annex) = Annex::open_with(&settings) else {
        return;
    };
    let script = "echo in-plain-words | tee kept.txt";
    let run = ["run", "--artifact", "kept.txt", "--", "sh", "-c", script];
    assert_eq!(annex.run(&run).exits(0).out, "in-plain-words\n");
    // Everything was sent before the command ended.
    let spans: String = bodies.try_iter().collect();
    for name in ["\"run\"", "\"attempt\"", "kiln-controller", "kiln-worker"] {
        assert!(spans.contains(name), "{name}: {spans}");
    }
    for folder in ["logs", "artifacts", "arriving"] {
        let folder = annex.home.join("controller").join(folder);
        assert!(!holds(&folder, b"in-plain-words"), "{}", folder.display());
    }
    let logs = annex.run(&["job", "logs"]).exits(0);
    assert_eq!(logs.out, "in-plain-words\n");
    let wrong = "[controller]\notlp = \"collector\"\n";
    std::fs::write(annex.home.join("config/kiln.toml"), wrong).expect("write");
    annex.run(&["job", "list"]).exits(2).says("line 2");
}

fn newest(annex: &Annex) -> String {
    jobs(annex)[0]["id"].as_str().expect("an id").to_owned()
}

#[test]
fn a_commands_own_job_is_run_again_or_refused() {
    let Some(annex) = Annex::open() else { return };
    let run = [
        "run",
        "-e",
        "WORD=again",
        "--",
        "sh",
        "-c",
        "echo $WORD; exit 7",
    ];
    annex.run(&run).exits(7);
    let first = newest(&annex);
    let again = annex.run(&["job", "retry", &first]).exits(7);
    let again = again.says(&format!("kiln: job {first} again, as r"));
    assert_eq!(again.out, "again\n");
    assert_eq!(jobs(&annex).len(), 2, "a new job");
    assert_ne!(newest(&annex), first);

    let dir = app(&[("Dockerfile", "FROM no-such-base\n")]);
    let mut piped = annex.command(&["run", "--", "cat"]);
    let file = std::fs::File::open(dir.path().join("Dockerfile")).expect("opens");
    piped.stdin(file);
    let said = crate::support::said(piped).exits(0);
    assert_eq!(said.out, "FROM no-such-base\n");
    let refused = annex.run(&["job", "retry", &newest(&annex)]).exits(2);
    refused.says("type it again: kiln run -i -- cat");
    annex.is_well();
}

#[test]
fn the_host_records_what_a_command_reached_and_took() {
    let Some(annex) = Annex::open() else { return };
    annex.run(&["run", "--", "git", "ls-remote", "https://example.org/x.git"]);
    let egress = annex.run(&["job", "egress"]).exits(0).out;
    assert!(egress.contains("--allow example.org admits it"), "{egress}");
    let shown = annex.run(&["job", "show", "--json"]).exits(0).out;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let record = &shown["record"];
    for part in [
        "policy_ms",
        "clone_ms",
        "ready_ms",
        "command_ms",
        "teardown_ms",
        "memory_peak",
        "command_memory_peak",
    ] {
        assert!(record[part].is_u64(), "{part}: {record}");
    }
    let egress = &record["egress"];
    assert_eq!(
        (&egress["reached"], &egress["refused"]),
        (&0.into(), &1.into())
    );
    let text = annex.run(&["job", "show"]).exits(0).out;
    assert!(
        text.contains("of the machine") && text.contains("0 hosts reached, 1 refused"),
        "{text}"
    );
    annex.is_well();
}
