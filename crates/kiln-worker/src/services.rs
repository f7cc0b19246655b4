//! What a machine's guest may ask of the host: names, connections, and a place for its events.
//!
//! Everything arrives on streams the guest opens; each is served by its own task, bounded in number by the
//! session's limits. A question that breaks the protocol is counted and answered with a reset; the worker ends the job.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use kiln_network::gateway::Gateway;
use kiln_proto::codec;
use kiln_proto::msg::{Connect, ConnectReply, GuestEvent, Resolve, ResolveReply, SshAgent, kind};
use kiln_proto::{Inbound, Incoming, Stream};
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::event::Events;
use crate::ssh_agent::SshAgents;

/// Most bytes of one guest event.
const EVENT_BYTES_MAX: usize = 16 * 1024;
/// Most events of the guest's own log that are shown per session.
const GUEST_LOG_LINES_MAX: u64 = 500;
/// Reset code for a stream that makes no sense.
const RESET_PROTOCOL: u16 = 16;
/// Reset code for a connection to an SSH agent that there is not, or that broke.
const RESET_NO_AGENT: u16 = 17;

/// Serves one machine's guest until its session ends.
#[derive(Debug)]
pub struct Services {
    gateway: Gateway,
    events: Events,
    log_lines: AtomicU64,
    oom_kills: watch::Sender<u64>,
    fault: watch::Sender<Option<String>>,
    ssh_agents: OnceLock<SshAgents>,
}

impl Services {
    /// Services behind this gateway.
    #[must_use]
    pub fn new(gateway: Gateway, events: Events) -> Arc<Self> {
        Arc::new(Self {
            gateway,
            events,
            log_lines: AtomicU64::new(0),
            oom_kills: watch::Sender::new(0),
            fault: watch::Sender::new(None),
            ssh_agents: OnceLock::new(),
        })
    }

    /// The gateway, to narrow it.
    #[must_use]
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// Lends SSH agents to this machine, once; without this there are none.
    pub fn lend(&self, agents: SshAgents) {
        let _lent_already = self.ssh_agents.set(agents);
    }

    /// Processes the guest's kernel killed for memory, as the guest tells it.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        *self.oom_kills.borrow()
    }

    /// The first thing the guest asked that breaks the protocol.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        self.fault.borrow().clone()
    }

    /// Starts serving. The task ends with the session.
    pub fn serve(self: &Arc<Self>, mut incoming: Incoming) -> JoinHandle<()> {
        let services = Arc::clone(self);
        tokio::spawn(async move {
            while let Some(inbound) = incoming.next().await {
                let services = Arc::clone(&services);
                tokio::spawn(async move { services.stream(inbound).await });
            }
        })
    }

    async fn stream(&self, inbound: Inbound) {
        let Inbound {
            kind,
            payload,
            stream,
        } = inbound;
        match kind {
            kind::CONNECT => match serde_json::from_slice::<Connect>(&payload) {
                Ok(connect) => self.connect(&connect, stream).await,
                Err(error) => self.broken(stream, &format!("a connect request: {error}")),
            },
            kind::RESOLVE => match serde_json::from_slice::<Resolve>(&payload) {
                Ok(question) => self.resolve(&question, stream).await,
                Err(error) => self.broken(stream, &format!("a name question: {error}")),
            },
            kind::EVENTS => self.guest_events(stream).await,
            kind::SSH_AGENT => match serde_json::from_slice::<SshAgent>(&payload) {
                Ok(asked) => self.ssh_agent(&asked, stream).await,
                Err(error) => self.broken(stream, &format!("an agent request: {error}")),
            },
            other => self.broken(stream, &format!("a stream of unknown kind {other}")),
        }
    }

    async fn connect(&self, connect: &Connect, mut stream: Stream) {
        match self.gateway.connect(&connect.host, connect.port).await {
            Ok(admitted) => {
                let sent = codec::write_msg(&mut stream, &ConnectReply::Connected).await;
                if sent.is_ok() {
                    let _report = admitted.relay(Box::new(stream)).await;
                }
            }
            Err(refusal) => {
                let reply = ConnectReply::Refused {
                    reason: refusal.to_string(),
                };
                if codec::write_msg(&mut stream, &reply).await.is_ok() {
                    let _gone = stream.shutdown().await;
                }
            }
        }
    }

    async fn ssh_agent(&self, asked: &SshAgent, mut stream: Stream) {
        let served = match self.ssh_agents.get() {
            Some(agents) => agents.serve(asked.place, &mut stream).await,
            None => Err(std::io::ErrorKind::NotFound.into()),
        };
        match served {
            Ok(()) => {
                let _gone = stream.shutdown().await;
            }
            Err(error) => {
                tracing::debug!(place = asked.place, %error, "no connection to an SSH agent");
                stream.reset(RESET_NO_AGENT, "no SSH agent");
            }
        }
    }

    async fn resolve(&self, question: &Resolve, mut stream: Stream) {
        let known = self.gateway.knows(&question.host);
        if codec::write_msg(&mut stream, &ResolveReply { known })
            .await
            .is_ok()
        {
            let _gone = stream.shutdown().await;
        }
    }

    async fn guest_events(&self, mut stream: Stream) {
        loop {
            match codec::next_msg::<GuestEvent, _>(&mut stream, EVENT_BYTES_MAX).await {
                Ok(Some(event)) => self.guest_event(event),
                Ok(None) => return,
                // How the session ended is said where that is known.
                Err(codec::CodecError::Io(_)) => return,
                Err(error) if error.is_peer_fault() => {
                    return self.broken(stream, &format!("an event: {error}"));
                }
                Err(_) => return,
            }
        }
    }

    fn guest_event(&self, event: GuestEvent) {
        match event {
            GuestEvent::OomKill { count, .. } => {
                self.oom_kills.send_if_modified(|seen| {
                    let more = count > *seen;
                    *seen = (*seen).max(count);
                    more
                });
            }
            GuestEvent::Log { level, message } => {
                if self.log_lines.fetch_add(1, Ordering::Relaxed) < GUEST_LOG_LINES_MAX {
                    tracing::debug!(target: "kiln_guest", level, message, "guest");
                    if level == "error" {
                        let text =
                            format!("guest: {}", message.chars().take(300).collect::<String>());
                        self.events.tell_now(crate::event::Event::Warning { text });
                    }
                }
            }
            GuestEvent::Unknown => {}
        }
    }

    fn broken(&self, stream: Stream, what: &str) {
        self.fault.send_if_modified(|fault| {
            let first = fault.is_none();
            fault.get_or_insert_with(|| what.to_owned());
            first
        });
        stream.reset(RESET_PROTOCOL, "not a request this host knows");
    }
}
