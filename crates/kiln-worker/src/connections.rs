//! What a machine's gateway is bounded by: bytes each way and connections at once, as its job's policy says, on both sides of the channel.

use std::num::NonZeroU64;
use std::sync::Arc;

use kiln_core::{JobRequest, NetworkPolicy};
use kiln_network::Limits;
use kiln_network::gateway::GatewayConfig;
use kiln_network::record::EgressLog;
use kiln_proto::Session;
use kiln_proto::msg::{CONNECTIONS_MOST, OTHER_STREAMS, Order};

use crate::event::Events;
use crate::kept::Handover;
use crate::orders;

/// What one machine's gateway is bounded by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Bounds {
    bytes_out_and_in_per_second: [Option<NonZeroU64>; 2],
    connections: Option<u32>,
}

impl Bounds {
    /// Of a job's machine.
    pub(crate) fn of(request: &JobRequest) -> Self {
        let policy = request.policy.as_ref();
        Self {
            bytes_out_and_in_per_second: request.bytes_out_and_in_per_second(),
            connections: policy.and_then(|policy| policy.connections_max),
        }
    }

    /// Of one that stays.
    pub(crate) fn of_kept(handover: &Handover) -> Self {
        Self {
            bytes_out_and_in_per_second: handover.bytes_out_and_in_per_second,
            connections: handover.connections_max,
        }
    }

    /// A gateway's beginning: what may be reached, where decisions go, and these bounds.
    pub(crate) fn gateway(self, network: NetworkPolicy, egress: &Arc<EgressLog>) -> GatewayConfig {
        let mut config = GatewayConfig::new(network, Arc::clone(egress) as _);
        let [bytes_out, bytes_in] = self.bytes_out_and_in_per_second;
        config.limits.bytes_out_per_second = bytes_out;
        config.limits.bytes_in_per_second = bytes_in;
        if let Some(most) = self.connections {
            // Fewer than usual, or more.
            let most = usize::try_from(most.min(CONNECTIONS_MOST)).unwrap_or(1);
            config.limits.connections_max = most.max(1);
        }
        config
    }

    /// Makes room for more connections than usual in the channel and in the guest.
    pub(crate) async fn allow(self, session: &Session, events: &Events) {
        allow(session, self.connections, events).await;
    }
}

/// Makes room for more connections than usual in the channel and in the guest. A guest of an older image has fewer: told, not fatal.
async fn allow(session: &Session, most: Option<u32>, events: &Events) {
    let usual = u32::try_from(Limits::default().connections_max).unwrap_or(u32::MAX);
    let Some(most) = most.filter(|most| *most > usual) else {
        return;
    };
    let most = most.min(CONNECTIONS_MOST);
    session.peer_may_open(usize::try_from(most).unwrap_or(0) + OTHER_STREAMS);
    let order = Order::SetConnections { most };
    let done = orders::call_done(
        session,
        "take more connections",
        &order,
        orders::ORDER_TIMEOUT,
    );
    if let Err(failure) = done.await {
        let why = orders::chain(&failure);
        events
            .warn(format!(
                "the machine has fewer connections than its policy allows: {why}"
            ))
            .await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kiln_core::job::{AppliedPolicy, TrustClass};
    use kiln_core::{ByteSize, Digest, Dispatch, JobKind, TenantName};
    use kiln_proto::msg::{CallResult, GuestError, GuestErrorCode, OrderReply, kind};
    use kiln_proto::{CloseReason, Hello, Inbound, Incoming, ProtocolError, SessionLimits, codec};
    use tokio::io::AsyncWriteExt as _;
    use tokio::sync::mpsc;

    use super::*;
    use crate::event::Event;
    use crate::kept::sample;

    /// Longest wait for a session.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Both ends of a channel, whose guest answers every order alike.
    struct Channel {
        host: Session,
        /// Streams that the guest opens.
        incoming: Incoming,
        guest: Session,
        /// Orders that the guest got.
        ordered: mpsc::UnboundedReceiver<Order>,
    }

    impl Channel {
        async fn open(answer: CallResult) -> Self {
            let (near, far) = tokio::io::duplex(64 * 1024);
            let hello = Hello::new("0.1.0-test", "boot", &["egress"]);
            let (host, guest) = tokio::join!(
                Session::connect(near, SessionLimits::default(), PATIENCE),
                Session::accept(far, hello, SessionLimits::default()),
            );
            let (host, _hello, incoming) = host.expect("a session");
            let (guest, mut orders) = guest.expect("a session");
            let (sender, ordered) = mpsc::unbounded_channel();
            tokio::spawn(async move {
                while let Some(Inbound {
                    payload,
                    mut stream,
                    ..
                }) = orders.next().await
                {
                    let order = serde_json::from_slice(&payload).expect("an order");
                    let _test_over = sender.send(order);
                    let _host_gone = codec::write_msg(&mut stream, &answer).await;
                    let _host_gone = stream.shutdown().await;
                }
            });
            Self {
                host,
                incoming,
                guest,
                ordered,
            }
        }
    }

    fn connections(connections: Option<u32>) -> Bounds {
        Bounds {
            bytes_out_and_in_per_second: [None; 2],
            connections,
        }
    }

    #[tokio::test]
    async fn more_connections_than_usual_have_room_on_both_sides_of_the_channel() {
        let usual = u32::try_from(Limits::default().connections_max).expect("few");
        let mut channel = Channel::open(Ok(OrderReply::Done)).await;
        let (events, mut told) = Events::channel();
        // For as many as usual, or fewer, there is room already.
        for most in [None, Some(3), Some(usual)] {
            connections(most).allow(&channel.host, &events).await;
        }
        assert!(channel.ordered.try_recv().is_err());
        let most = usual + 44;
        connections(Some(most)).allow(&channel.host, &events).await;
        let ordered = channel.ordered.recv().await;
        assert_eq!(ordered, Some(Order::SetConnections { most }));
        assert!(told.try_recv().is_err(), "nothing is missing");

        // So many streams and those for everything else, and not one more.
        let room = usize::try_from(most).expect("few") + OTHER_STREAMS;
        channel.guest.may_open(room + 1);
        let mut open = Vec::new();
        for _ in 0..room {
            let opened = channel.guest.open(kind::EVENTS, b"").await.expect("opens");
            open.push((opened, channel.incoming.next().await.expect("arrives")));
        }
        assert_eq!(channel.host.close_reason(), None);
        let _beyond = channel.guest.open(kind::EVENTS, b"").await.expect("sent");
        let closed = channel.host.closed().await;
        assert!(
            matches!(closed, CloseReason::Protocol(ProtocolError::TooManyStreams { max, .. }) if max == room),
            "{closed:?}"
        );
    }

    #[tokio::test]
    async fn a_guest_that_has_no_room_for_more_is_told_of_and_nobody_asks_for_more_than_there_is() {
        let refused = GuestError {
            code: GuestErrorCode::Invalid,
            message: "no such order".to_owned(),
        };
        let mut channel = Channel::open(Err(refused)).await;
        let (events, mut told) = Events::channel();
        connections(Some(u32::MAX))
            .allow(&channel.host, &events)
            .await;
        let most = CONNECTIONS_MOST;
        let ordered = channel.ordered.recv().await;
        assert_eq!(ordered, Some(Order::SetConnections { most }));
        let told = told.try_recv().expect("a warning");
        assert!(
            matches!(&told, Event::Warning { text } if text.contains("fewer connections than its policy allows")
                && text.contains("no such order")),
            "{told:?}"
        );
        assert_eq!(channel.host.close_reason(), None, "told, not fatal");
    }

    #[test]
    fn what_a_policy_says_bounds_the_gateway_of_a_job_and_of_a_machine_that_stays() {
        let mut request = JobRequest {
            id: "r0abc".parse().expect("an id"),
            tenant: TenantName::local(),
            kind: JobKind::Run(Box::default()),
            network: NetworkPolicy::Open,
            limits: kiln_core::job::Limits {
                cpus: 1,
                memory: ByteSize::mib(512),
                disk: ByteSize::gib(1),
                timeout_ms: 1_000,
            },
            trust: TrustClass::Untrusted,
            network_bits: None,
            dispatch: Dispatch::default(),
            traceparent: None,
            policy: Some(AppliedPolicy {
                name: None,
                file: Digest::of(b"file"),
                hash: Digest::of(b"hash"),
                upload_bits: Some(8_000),
                download_bits: Some(16_000),
                connections_max: Some(3),
                output_bytes_max: None,
                processes_max: None,
                disk_bytes_per_second: None,
                open_files_max: None,
                learn: false,
                decided_us: None,
            }),
        };
        let egress = Arc::new(EgressLog::new());
        let shown = |bounds: Bounds| {
            let limits = bounds.gateway(NetworkPolicy::Open, &egress).limits;
            let [out, into] = [limits.bytes_out_per_second, limits.bytes_in_per_second];
            let each = [out, into].map(|bytes| bytes.map(NonZeroU64::get));
            (each, limits.connections_max)
        };
        let said = ([Some(1_000), Some(2_000)], 3);
        assert_eq!(shown(Bounds::of(&request)), said);
        let mut stays = sample("r0abc-1-run").machine;
        stays.bytes_out_and_in_per_second = request.bytes_out_and_in_per_second();
        stays.connections_max = Some(3);
        assert_eq!(shown(Bounds::of_kept(&stays)), said);
        // Never more than the channel has room for, and never none.
        for (asked, got) in [(u32::MAX, CONNECTIONS_MOST as usize), (0, 1)] {
            if let Some(policy) = &mut request.policy {
                policy.connections_max = Some(asked);
            }
            assert_eq!(shown(Bounds::of(&request)).1, got);
        }
        request.policy = None;
        let usual = Limits::default().connections_max;
        assert_eq!(shown(Bounds::of(&request)), ([None, None], usual));
    }
}
