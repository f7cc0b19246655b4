//! What the simulated guest can be made to do, beyond what every driver does: scripts, connections out and in.

use kiln_machine::driver::{Driver as _, Start};
use kiln_machine::sim::{ExecEnd, Script, SimConfig, SimDriver};
use kiln_proto::msg::{Connect, ConnectReply, Forward, Resolve, ResolveReply, kind};
use kiln_proto::{Incoming, Session, SessionLimits, read_msg, write_msg};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::host::{Host, request};
use crate::life::{DEADLINE, Sim};

/// A host that knows one name and says hello on each connection to it.
async fn serve(mut incoming: Incoming) {
    while let Some(inbound) = incoming.next().await {
        let mut stream = inbound.stream;
        match inbound.kind {
            kind::RESOLVE => {
                let ask: Resolve = serde_json::from_slice(&inbound.payload).expect("json");
                let known = ask.host == "known.example";
                write_msg(&mut stream, &ResolveReply { known })
                    .await
                    .expect("sent");
                stream.shutdown().await.expect("ended");
            }
            kind::CONNECT => {
                let ask: Connect = serde_json::from_slice(&inbound.payload).expect("json");
                let reply = match ask.host == "known.example" && ask.port == 443 {
                    true => ConnectReply::Connected,
                    false => ConnectReply::Refused {
                        reason: "not allowed".to_owned(),
                    },
                };
                write_msg(&mut stream, &reply).await.expect("sent");
                let _ = stream.write_all(b"hello from outside").await;
                let _ = stream.shutdown().await;
            }
            _ => {}
        }
    }
}

fn script() -> Script {
    Script::default()
        .reply(&["node", "--version"], "v20.0.0\n", 0)
        .on(&["fetch"], |call| {
            Box::pin(async move {
                let host = call.request.argv[1].clone();
                let guest = call.guest().clone();
                if !guest.resolve(&host).await.expect("an answer") {
                    return ExecEnd::Code(6);
                }
                let port = call.request.argv[2].parse().expect("a port");
                match guest.connect(&host, port).await {
                    Ok(mut stream) => {
                        let mut text = Vec::new();
                        stream.read_to_end(&mut text).await.expect("read");
                        call.stdout(&text).await.expect("sent");
                        ExecEnd::Code(0)
                    }
                    Err(refused) => {
                        call.stderr(refused.message.as_bytes()).await.expect("sent");
                        ExecEnd::Code(7)
                    }
                }
            })
        })
        .listen(8080, |mut stream| {
            Box::pin(async move {
                let _ = stream.write_all(b"page").await;
                let _ = stream.shutdown().await;
            })
        })
}

#[tokio::test(start_paused = true)]
async fn scripts_reach_out_and_are_reached() {
    let sim = Sim::new();
    let config = SimConfig {
        script: script(),
        ..SimConfig::default()
    };
    let driver = SimDriver::new(sim.home.path(), config);
    let machine = driver.launch(&sim.spec("m"), Start::Cold).await;
    let machine = machine.expect("launched");
    let channel = machine.channel().await.expect("a channel");
    let connected = Session::connect(channel, SessionLimits::default(), DEADLINE).await;
    let (session, hello, incoming) = connected.expect("a session");
    let server = tokio::spawn(serve(incoming));
    // A second host object would take the channel away: its orders go over the same session.
    let host = Host::borrowing(session, hello, DEADLINE);
    let ran = host.exec(&["node", "--version"]).await.expect("ran");
    assert_eq!(ran.text(), "v20.0.0");
    let ran = host.exec(&["fetch", "known.example", "443"]).await;
    assert_eq!(ran.expect("ran").text(), "hello from outside");
    for (name, port, code) in [("other.example", "443", 6), ("known.example", "80", 7)] {
        let ran = host.exec(&["fetch", name, port]).await.expect("ran");
        assert_eq!(ran.exit.code, Some(code));
    }
    let mut stream = host
        .open(kind::FORWARD, &Forward { port: 8080 })
        .await
        .expect("opened");
    let reply: ConnectReply = read_msg(&mut stream, 4096).await.expect("reply");
    assert_eq!(reply, ConnectReply::Connected);
    let mut page = String::new();
    stream.read_to_string(&mut page).await.expect("read");
    assert_eq!(page, "page");
    let mut stream = host
        .open(kind::FORWARD, &Forward { port: 81 })
        .await
        .expect("opened");
    let reply: ConnectReply = read_msg(&mut stream, 4096).await.expect("reply");
    assert!(matches!(reply, ConnectReply::Refused { .. }));
    assert!(machine.destroy().await.leaks.is_empty());
    server.abort();
}

#[tokio::test(start_paused = true)]
async fn commands_keep_their_limits() {
    let sim = Sim::new();
    let machine = sim.driver.launch(&sim.spec("m"), Start::Cold).await;
    let machine = machine.expect("launched");
    let host = Host::connect(&*machine, DEADLINE).await.expect("hello");
    let mut slow = request(&["sleep", "1000"]);
    slow.timeout_ms = 500;
    let ran = host.exec_with(slow, b"").await.expect("ran");
    assert!(ran.exit.timed_out && ran.exit.signal == Some(libc::SIGKILL));
    let mut loud = request(&["head", "-c", "100000", "/dev/zero"]);
    loud.output_bytes_max = 1000;
    let ran = host.exec_with(loud, b"").await.expect("ran");
    assert_eq!((ran.stdout.len(), ran.exit.output_dropped), (1000, 99_000));
    assert!(machine.destroy().await.leaks.is_empty());
}
