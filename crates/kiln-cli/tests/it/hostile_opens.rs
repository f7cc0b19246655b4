//! A real guest that opens connections and streams without end: the host refuses what is beyond its bounds, stays small, and serves its other
//! machines. Only with `KILN_TEST_LONG`, as `make test-hostile` sets it: an emulated guest takes its time for each.

use kiln_proto::frame::Frame;
use kiln_proto::msg::kind;
use kiln_proto::session::STREAMS_MAX;
use serde_json::Value;

use crate::annex::Annex;
use crate::faults_large::high_water;
use crate::fleet_kill::asked;
use crate::kept::kept;
use crate::serve::{SMALL, serve};
use crate::support::{free_port, until};

/// Connections of a program, each to another port, of which the policy allows none.
const CONNECTIONS: u32 = 10_000;
/// Streams that its root opens in the channel itself, without waiting for an answer.
const STREAMS: u32 = 100_000;
/// Most that all of it may add to the memory of the server and its worker, which are one process: less than a kibibyte for each.
const MEMORY_KIB_MAX: u64 = 64 << 10;

/// Opens `COUNT` connections, some at once, and hears how each ended.
const PROGRAM: &str = r#"
my $at = inet_aton("good.test") or die "it has no address";
my @open;
my $ends = sub { my $one = shift @open; sysread($one, my $byte, 1) and die "it was let through"; close $one };
for my $n (1 .. COUNT) {
  socket(my $one, PF_INET, SOCK_STREAM, 6) or die "socket: $!";
  # Where the refusal is quick enough, this hears it already.
  connect($one, sockaddr_in(9000 + $n, $at)) or next;
  push @open, $one;
  $ends->() if @open == 64;
}
$ends->() while @open;
print "all were refused\n";
"#;

/// Takes the channel from PID 1 by way of its descriptors (pidfd_open and pidfd_getfd), and opens `COUNT` streams that ask for nothing and never
/// end. Frames go there whole: as many as the port takes at once.
const ROOT: &str = r#"
my $init = syscall(434, 1, 0);
for my $n (0 .. 64) {
  my $port = syscall(438, $init, $n, 0);
  next if $port < 0;
  next unless readlink("/proc/self/fd/$port") =~ /vport/;
  for (my $first = 1; $first <= COUNT; $first += 2000) {
    my $frames = join "", map { pack("VCVC", 6, 2, 2_000_000 + 2 * $_, 66) } $first .. $first + 1999;
    select(undef, undef, undef, 0.01) until syscall(1, $port, $frames, length $frames) == length $frames;
  }
  last;
}
sleep 1000;
"#;

#[test]
fn a_guest_that_opens_without_end_is_refused_and_its_host_serves_others() {
    if asked("KILN_TEST_LONG").is_none() {
        return;
    }
    let mut frame = Vec::new();
    let (stream, kind) = (0x0403_0201, kind::EVENTS);
    let payload = b"";
    Frame::Open {
        stream,
        kind,
        payload,
    }
    .encode_into(&mut frame);
    assert_eq!(frame, [6, 0, 0, 0, 2, 1, 2, 3, 4, 66], "as root packs it");

    let Some(annex) = Annex::open() else { return };
    let (server, at) = serve(&annex, free_port());
    let on = |args: &[&str]| annex.run(&[&["--server", at.as_str()], args].concat());
    let start = |args: &[&str]| annex.start(&[&["--server", at.as_str()], args].concat());
    let stays = ["--server", at.as_str(), "--keep=30m", "--no-source"];
    let beside = kept(&annex, 0, &[&stays[..], &SMALL].concat(), &["true"]);
    let is_served = || {
        let script = "head -c 1000000 /dev/urandom | wc -c";
        let served = on(&["exec", &beside, "--", "sh", "-c", script]);
        assert_eq!(served.exits(0).out, "1000000\n");
    };
    is_served();
    let status = format!("/proc/{}/status", server.child.id());
    let memory = || high_water(&status).expect("the server lives");
    let before = memory();
    let run = ["run", "--no-source", "--timeout", "15m"];
    let run = [&run[..], &SMALL].concat();

    // A program that does what any may do, and its machine's guest with it.
    let opens = PROGRAM.replace("COUNT", &CONNECTIONS.to_string());
    let rule = "good.test:8080/raw";
    let program = ["--allow", rule, "--", "perl", "-MSocket", "-e", &opens];
    let mut flood = start(&[&run[..], &program].concat());
    while flood.child.try_wait().expect("waited").is_none() {
        is_served();
    }
    assert_eq!(flood.end().exits(0).out, "all were refused\n");
    let told = on(&["--json", "job", "egress"]).exits(0).out;
    let lines = told.lines().map(serde_json::from_str);
    let lines: Vec<Value> = lines.collect::<Result<_, _>>().expect("JSON");
    let sum = lines.iter().find(|line| line["event"] == "egress");
    let refused = &sum.expect("a sum")["totals"]["decisions"]["port"];
    assert_eq!(refused, CONNECTIONS, "each was decided: {told}");

    // Its root asks nobody: more streams than may be open are the end of its machine, and of nothing else.
    let opens = ROOT.replace("COUNT", &STREAMS.to_string());
    let root = ["--", "perl", "-e", &opens];
    let ended = start(&[&run[..], &root].concat()).end().exits(5);
    ended.says(&format!("beyond {STREAMS_MAX} open streams"));
    is_served();
    on(&[&run[..], &["--", "true"]].concat()).exits(0);
    let grown = memory().saturating_sub(before);
    assert!(grown < MEMORY_KIB_MAX, "{grown} KiB more than {before}");
    on(&["machine", "rm", &beside]).exits(0);
    // What it reached is handed in afterwards; a server that stops before leaves that to the next.
    let records = annex.home.join("machine-records");
    until("its record handed in", || {
        let left = std::fs::read_dir(&records).map_or(0, Iterator::count);
        (left == 0).then_some(())
    });
    server.signal("INT");
    server.end().exits(0);
    annex.is_clear();
}
