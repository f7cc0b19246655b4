//! Room on the host: who does not fit waits and says for what, and a waiter that was killed holds nothing.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use serde_json::json;

use crate::annex::Annex;
use crate::support::until;

/// Entries of the ledger whose name begins so.
fn entries(ledger: &Path, begin: &str) -> Vec<String> {
    let names = fs::read_dir(ledger).into_iter().flatten().flatten();
    names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(begin))
        .collect()
}

#[test]
fn who_waits_for_room_says_for_what_and_goes_on_when_there_is_some() {
    let Some(annex) = Annex::open() else { return };
    let ledger = annex.home.join("ledger");
    fs::create_dir_all(&ledger).expect("folder");
    // A machine of somebody else's that holds all memory there could be, for as long as its process holds the lock.
    let path = ledger.join("lease-00000000000000000001-00000000.json");
    let mut holder = File::create_new(&path).expect("entry");
    holder.lock().expect("lock");
    let need = json!({ "cpu_milli": 1000, "memory": 1_u64 << 40 });
    let page = json!({ "who": "a large machine", "need": need, "passes": 0 });
    holder
        .write_all(page.to_string().as_bytes())
        .expect("written");
    let waits = || until("a waiter", || entries(&ledger, "wait-").pop());
    let killed = annex.start(&["run", "--", "true"]);
    let first = waits();
    killed.signal("KILL");
    drop(killed);
    let waiting = annex.start(&["run", "--", "echo", "through"]);
    // The dead one's place went with it, as soon as somebody looked.
    until("its successor alone", || {
        let names = entries(&ledger, "wait-");
        (names.len() == 1 && names[0] != first).then_some(())
    });
    fs::remove_file(&path).expect("removed");
    drop(holder);
    let said = waiting.end().exits(0);
    assert_eq!(said.out, "through\n");
    assert!(
        said.err.contains("waiting for room on this host")
            && said.err.contains("of memory: 1 machine holds 1.0 TiB"),
        "{}",
        said.err
    );
    for begin in ["wait-", "lease-"] {
        let left = entries(&ledger, begin);
        assert!(left.is_empty(), "{left:?}");
    }
    annex.is_clear();
}
