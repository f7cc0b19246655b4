//! `kiln port-forward`: ports of this host that lead into a kept machine, until this command ends.

use std::sync::Arc;

use kiln_core::FailureClass;
use kiln_worker::kept::ask::Ask;
use kiln_worker::kept::client::{self, AskError};
use kiln_worker::kept::keeper::CONNECTIONS_MAX;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{Machine, ask, refused};
use crate::args::{ForwardArgs, ServerArgs};
use crate::commands::run_ports::{Said, listen};
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::Screen;

pub(in crate::commands) async fn run(
    args: ForwardArgs,
    said: &ServerArgs,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    let machine = Machine::named(said, &args.id).await?;
    // One that cannot be reached is told before anybody connects.
    let _shown = ask(machine.reach(), &Ask::Show).await?;
    let listeners = listen(Said::Word, &args.ports).await?;
    // What is over the keeper's bound waits here.
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX / 2));
    let mut tasks = tokio::task::JoinSet::new();
    for (listener, port) in listeners {
        let address = listener.local_addr().or_infrastructure()?;
        screen.note(&format!(
            "{address} leads to port {port} of {}",
            machine.id()
        ));
        let (machine, slots) = (machine.clone(), Arc::clone(&slots));
        tasks.spawn(async move { serve(&machine, listener, port, &slots, screen).await });
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
    machine: &Machine,
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
            () = gone.cancelled() => return format!("{} is gone", machine.id()),
        };
        let Ok((peer, _)) = accepted else { continue };
        let (machine, gone) = (machine.clone(), gone.clone());
        tokio::spawn(async move {
            let _slot = slot;
            match one(&machine, peer, port).await {
                Ok(()) => {}
                // A server that has no way just now may have one for the next.
                Err(error @ AskError::NoWay(_)) => {
                    let error = refused(error);
                    screen.note(&error.message);
                    if error.class == FailureClass::Usage {
                        gone.cancel();
                    }
                }
                Err(AskError::Refused(refused)) => screen.note(&refused.message),
                Err(_) => gone.cancel(),
            }
        });
    }
}

async fn one(machine: &Machine, mut peer: TcpStream, port: u16) -> Result<(), AskError> {
    let (_begins, mut stream) = client::ask(machine.reach(), &Ask::Forward { port }).await?;
    let _slow_network = peer.set_nodelay(true);
    // Each direction to its own end; a broken connection is its two ends' to see.
    let _ended = kiln_proto::relay::join(&mut stream, &mut peer, || {}).await;
    Ok(())
}
