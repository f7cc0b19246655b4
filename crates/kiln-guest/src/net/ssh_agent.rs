//! SSH agents of the host as sockets in the machine, for BuildKit's `RUN --mount=type=ssh`.
//!
//! Only carries bytes: the host decides whether there is an agent, and what may be asked of it. The sockets lie where only
//! BuildKit and its client look, not in any step.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use kiln_proto::msg::{SSH_AGENTS_MAX, SshAgent, kind, ssh_agent_socket};
use kiln_proto::relay::relay;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::relay::ACCEPT_PAUSE;
use crate::error::{Context, SysError};
use crate::log;
use crate::state::Guest;

/// Connections to all agents at the same time. More wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 16;

/// Listens in every place from now on.
pub(super) fn start(guest: &Arc<Guest>) -> Result<(), SysError> {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    for place in 0..SSH_AGENTS_MAX {
        let socket = ssh_agent_socket(place);
        let what = || format!("listen at {socket}");
        let folder = Path::new(&socket).parent().unwrap_or(Path::new("/"));
        let mut private = std::fs::DirBuilder::new();
        private.recursive(true).mode(0o700);
        private.create(folder).context(what)?;
        let listener = UnixListener::bind(&socket).context(what)?;
        tokio::spawn(accept(
            Arc::clone(guest),
            listener,
            place,
            Arc::clone(&room),
        ));
    }
    Ok(())
}

async fn accept(guest: Arc<Guest>, listener: UnixListener, place: u8, room: Arc<Semaphore>) {
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((program, _)) => {
                let guest = Arc::clone(&guest);
                tokio::spawn(async move {
                    let _permit = permit;
                    let _counted = guest.count_stream();
                    carry(&guest, program, place).await;
                });
            }
            Err(error) => {
                log::warn(&format!("connections to SSH agents: {error}"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Ends when either side ends.
async fn carry(guest: &Guest, mut program: UnixStream, place: u8) {
    let Some(session) = guest.net.session() else {
        return;
    };
    let Ok(payload) = serde_json::to_vec(&SshAgent { place }) else {
        return;
    };
    if let Ok(mut host) = session.open(kind::SSH_AGENT, &payload).await
        && let Err(error) = relay(&mut host, &mut program).await
    {
        log::debug(&format!("a connection to an SSH agent: {error}"));
    }
}
