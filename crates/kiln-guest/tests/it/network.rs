//! Names and connections through the channel.

use std::time::{Duration, Instant};

use kiln_proto::codec;
use kiln_proto::msg::{Connect, ConnectReply, ExecRequest, Forward, Resolve, ResolveReply, kind};
use kiln_proto::session::Session;
use kiln_proto::stream::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::host::{Ran, exec, request, sh};
use crate::vm::{Spec, Vm};

/// Knows `*.example`; connects to port 80 only, where it sends back what it gets, in capitals, until the end.
async fn serve(mut incoming: Incoming) {
    while let Some(inbound) = incoming.next().await {
        tokio::spawn(async move {
            let mut stream = inbound.stream;
            match inbound.kind {
                kind::RESOLVE => {
                    let asked: Resolve = serde_json::from_slice(&inbound.payload).unwrap();
                    let known = asked.host.ends_with(".example");
                    codec::write_msg(&mut stream, &ResolveReply { known })
                        .await
                        .unwrap();
                }
                kind::CONNECT => {
                    let asked: Connect = serde_json::from_slice(&inbound.payload).unwrap();
                    if asked.port == 81 {
                        let reply = ConnectReply::Refused {
                            reason: "port".to_owned(),
                        };
                        codec::write_msg(&mut stream, &reply).await.unwrap();
                    } else {
                        codec::write_msg(&mut stream, &ConnectReply::Connected)
                            .await
                            .unwrap();
                        stream
                            .write_all(format!("{}\n", asked.host).as_bytes())
                            .await
                            .unwrap();
                        let mut text = [0; 100];
                        while let Ok(count @ 1..) = stream.read(&mut text).await {
                            text.make_ascii_uppercase();
                            stream.write_all(&text[..count]).await.unwrap();
                        }
                    }
                }
                _ => {
                    let mut events = Vec::new();
                    let _end = stream.read_to_end(&mut events).await;
                    return;
                }
            }
            let _gone = stream.shutdown().await;
        });
    }
}

async fn bash(session: &Session, script: &str) -> Ran {
    let request = ExecRequest {
        timeout_ms: 20_000,
        ..request(&["bash", "-c", script])
    };
    exec(session, &request, &[]).await
}

#[tokio::test]
async fn names_lead_to_the_host_and_nothing_else_leads_anywhere() {
    let Some(vm) = Vm::start(&Spec {
        root: true,
        ..Spec::default()
    }) else {
        return;
    };
    let (session, _, incoming) = vm.session().await;
    tokio::spawn(serve(incoming));
    let seen = sh(
        &session,
        "ip addr; ip route show table local; cat /etc/resolv.conf",
    )
    .await;
    println!("{}", seen.ok());

    let found = bash(
        &session,
        "getent ahosts one.example; getent ahosts two.example; getent ahosts one.example",
    )
    .await;
    assert!(
        found.ok().contains("198.18.0.2 ") && found.out.contains("198.18.0.3 "),
        "{found:?}"
    );
    let unknown = bash(&session, "getent ahosts nobody.invalid").await;
    assert_eq!(unknown.exit.unwrap().code, Some(2));

    let begun = Instant::now();
    let echo = bash(
        &session,
        "exec 3<>/dev/tcp/one.example/80; echo hello >&3; head -2 <&3",
    )
    .await;
    println!("connect: {:?}", begun.elapsed());
    assert_eq!(echo.ok(), "one.example\nHELLO\n");
    let begun = Instant::now();
    for (target, why) in [
        ("one.example/81", "refused by the host"),
        ("198.18.7.7/80", "an address without a name"),
        ("198.18.0.1/80", "the nameserver's address"),
        ("10.1.2.3/80", "no route"),
        ("127.0.0.1/80", "nobody listens"),
    ] {
        let ran = bash(
            &session,
            &format!("exec 3<>/dev/tcp/{target} && read -t 5 x <&3 && echo got $x"),
        )
        .await;
        assert_ne!(ran.exit.as_ref().unwrap().code, Some(0), "{why}: {ran:?}");
        println!("{why}: {}", ran.err.trim());
    }
    assert!(begun.elapsed() < Duration::from_secs(60));
    // DNS over TCP.
    let tcp = bash(&session, r"printf '\0\035\x12\x34\1\0\0\1\0\0\0\0\0\0\3one\7example\0\0\1\0\1' > /tmp/q; exec 3<>/dev/tcp/198.18.0.1/53; cat /tmp/q >&3; head -c 47 <&3 | od -An -tu1").await;
    println!("{tcp:?}");
    let bytes: String = tcp.out.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(bytes.ends_with("198 18 0 2"), "{bytes}");
}

#[tokio::test]
async fn the_host_reaches_ports_of_the_machine() {
    let Some(vm) = Vm::start(&Spec {
        root: true,
        ..Spec::default()
    }) else {
        return;
    };
    let (session, _, incoming) = vm.session().await;
    tokio::spawn(serve(incoming));
    let payload = serde_json::to_vec(&Forward { port: 9418 }).unwrap();
    let mut nobody = session.open(kind::FORWARD, &payload).await.unwrap();
    let reply: ConnectReply = codec::read_msg(&mut nobody, 4096).await.unwrap();
    assert!(matches!(reply, ConnectReply::Refused { .. }));

    // Reads until the end, then answers in capitals: half-closes must pass.
    let server = session.clone();
    tokio::spawn(async move {
        let script = "socket(S, PF_INET, SOCK_STREAM, 0); bind(S, sockaddr_in(9418, INADDR_LOOPBACK)) or die; \
            listen(S, 5); while (accept(C, S)) { local $/; my $all = <C>; print C uc $all; close C }";
        exec(&server, &request(&["perl", "-MSocket", "-e", script]), &[]).await
    });
    let stream = loop {
        let mut stream = session.open(kind::FORWARD, &payload).await.unwrap();
        match codec::read_msg(&mut stream, 4096).await.unwrap() {
            ConnectReply::Connected => break stream,
            ConnectReply::Refused { reason } => {
                assert!(vm.age() < Duration::from_secs(60), "{reason}")
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let text = vec![b'a'; 3 << 20];
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sent = text.clone();
    let send = tokio::spawn(async move {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let mut answer = Vec::new();
    reader.read_to_end(&mut answer).await.unwrap();
    send.await.unwrap();
    assert!(
        answer == text.to_ascii_uppercase(),
        "{} bytes came back",
        answer.len()
    );
}
