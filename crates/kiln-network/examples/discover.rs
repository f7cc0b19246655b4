//! Asks this host's package managers and prints the `registries.toml` they lead to, and how well it worked.
//!
//! `cargo run -p kiln-network --example discover`. With `--shape`, host names are replaced by numbers.
#![expect(clippy::print_stdout, reason = "an example prints")]

use std::collections::BTreeSet;
use std::time::Instant;

use kiln_network::registries::probe::HostProbe;
use kiln_network::registries::{Registries, Runtime, discover, merge};

#[expect(clippy::disallowed_methods, reason = "an example has no configuration")]
fn main() -> anyhow::Result<()> {
    let start = Instant::now();
    let found = discover(&HostProbe::new(std::env::vars().collect()), &|_, _| None);
    let mut text = merge(None, &found.registries)?;
    let read = Registries::parse(&text)?;
    anyhow::ensure!(merge(Some(&text), &found.registries)? == text, "not stable");
    let mut notes = found.notes.join("\n");
    if std::env::args().any(|arg| arg == "--shape") {
        let rules = Runtime::ALL.iter().flat_map(|runtime| read.rules(*runtime));
        let hosts: BTreeSet<String> = rules.map(|rule| rule.host().to_owned()).collect();
        let mut hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
        hosts.sort_by_key(|host| std::cmp::Reverse(host.len()));
        for (at, host) in hosts.iter().enumerate() {
            text = text.replace(host, &format!("<host {at}>"));
            notes = notes.replace(host, &format!("<host {at}>"));
        }
    }
    println!("{text}\nnotes:\n{notes}\ntook {:?}", start.elapsed());
    Ok(())
}
