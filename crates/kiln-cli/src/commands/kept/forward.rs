//! `kiln port-forward`: ports of this host that lead into a kept machine, until this command ends.

use std::sync::Arc;

use kiln_core::FailureClass;
use kiln_worker::home::Home;
use kiln_worker::kept::Facts;
use kiln_worker::kept::ask::Ask;
use kiln_worker::kept::client::{self, AskError};
use kiln_worker::kept::keeper::CONNECTIONS_MAX;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{ask, find, home};
use crate::args::ForwardArgs;
use crate::commands::run::listen;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::Screen;

pub(in crate::commands) async fn run(
    args: ForwardArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    let home = home()?;
    let facts = find(&home, &args.id).await?;
    // One that cannot be reached is told before anybody connects.
    let _shown = ask(&home, &facts, &Ask::Show).await?;
    let listeners = listen(&args.ports).await?;
    // What is over the keeper's bound waits here.
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX / 2));
    let mut tasks = tokio::task::JoinSet::new();
    for (listener, port) in listeners {
        let address = listener.local_addr().or_infrastructure()?;
        screen.note(&format!("{address} leads to port {port} of {}", facts.id()));
        let (home, facts, slots) = (home.clone(), facts.clone(), Arc::clone(&slots));
        tasks.spawn(async move { serve(&home, &facts, listener, port, &slots, screen).await });
    }
    tokio::select! {
        Some(ended) = tasks.join_next() => {
            let why = ended.or_infrastructure()?;
            Err(CliError::new(FailureClass::Infrastructure, why))
        }
        // The usual end.
        () = cancel.cancelled() => Ok(0),
    }
}

/// Serves one port until its machine is gone; says how that shows.
async fn serve(
    home: &Home,
    facts: &Facts,
    listener: TcpListener,
    port: u16,
    slots: &Arc<Semaphore>,
    screen: Screen,
) -> String {
    let gone = CancellationToken::new();
    loop {
        let Ok(slot) = Arc::clone(slots).acquire_owned().await else {
            return "no more connections are taken".to_owned();
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = gone.cancelled() => return format!("{} is gone", facts.id()),
        };
        let Ok((peer, _)) = accepted else { continue };
        let (home, facts, gone) = (home.clone(), facts.clone(), gone.clone());
        tokio::spawn(async move {
            let _slot = slot;
            match one(&home, &facts, peer, port).await {
                Ok(()) => {}
                Err(AskError::Refused(refused)) => screen.note(&refused.message),
                Err(_) => gone.cancel(),
            }
        });
    }
}

async fn one(home: &Home, facts: &Facts, mut peer: TcpStream, port: u16) -> Result<(), AskError> {
    let (_begins, mut stream) = client::ask(&home.data, facts, &Ask::Forward { port }).await?;
    let _slow_network = peer.set_nodelay(true);
    // Each direction to its own end; a broken connection is its two ends' to see.
    let _ended = tokio::io::copy_bidirectional(&mut stream, &mut peer).await;
    Ok(())
}
