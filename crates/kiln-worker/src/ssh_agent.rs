//! The user's SSH agents, lent to the steps of one build that mount them.
//!
//! Protocol: RFC draft `draft-miller-ssh-agent`. A message is four bytes of length, a type and its content. What a guest may ask is to
//! list keys and to sign; everything else (adding, removing, locking, extensions) is answered with "failure" by the host
//! itself, so that a build can use keys while it runs and change nothing. Not here: which agents there are (the command line).

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use kiln_proto::msg::{SSH_AGENTS_MAX, ssh_agent_socket};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;

/// Longest message either side may send, bytes: OpenSSH's own bound.
const MESSAGE_BYTES_MAX: u32 = 256 * 1024;
/// Connections of one machine to its agents at the same time.
const CONNECTIONS_MAX: usize = 16;
/// Longest wait for an agent's answer: it may ask the user.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// `SSH_AGENTC_REQUEST_IDENTITIES`.
const REQUEST_IDENTITIES: u8 = 11;
/// `SSH_AGENTC_SIGN_REQUEST`.
const SIGN_REQUEST: u8 = 13;
/// `SSH_AGENT_FAILURE`, as a whole message.
const FAILURE: [u8; 5] = [0, 0, 0, 1, 5];

/// The agents of one build.
#[derive(Debug)]
pub struct SshAgents {
    sockets: Vec<(String, PathBuf)>,
    room: Semaphore,
}

impl SshAgents {
    /// Most agents of one build.
    pub const MAX: usize = SSH_AGENTS_MAX as usize;

    /// Agents by id; what is beyond [`Self::MAX`] is left out.
    #[must_use]
    pub fn new(mut sockets: Vec<(String, PathBuf)>) -> Self {
        sockets.truncate(Self::MAX);
        Self {
            sockets,
            room: Semaphore::new(CONNECTIONS_MAX),
        }
    }

    /// The sockets in the machine, by id, as BuildKit's client wants them.
    #[must_use]
    pub fn in_machine(&self) -> BTreeMap<String, String> {
        let ids = self.sockets.iter().map(|(id, _)| id.clone());
        ids.zip((0..SSH_AGENTS_MAX).map(ssh_agent_socket)).collect()
    }

    /// Serves one connection of the guest to the agent in a place until one side ends.
    ///
    /// # Errors
    /// When there is no such agent, it is not there, or a message is too long.
    pub async fn serve(
        &self,
        place: u8,
        guest: impl AsyncRead + AsyncWrite + Unpin,
    ) -> io::Result<()> {
        let (_, socket) = self
            .sockets
            .get(usize::from(place))
            .ok_or(io::ErrorKind::NotFound)?;
        let _permit = self.room.try_acquire().map_err(io::Error::other)?;
        relay(guest, UnixStream::connect(socket).await?).await
    }
}

/// Question by question.
async fn relay(
    mut guest: impl AsyncRead + AsyncWrite + Unpin,
    mut agent: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
    while let Some(question) = message(&mut guest).await? {
        if !matches!(question.get(4), Some(&(REQUEST_IDENTITIES | SIGN_REQUEST))) {
            guest.write_all(&FAILURE).await?;
            continue;
        }
        agent.write_all(&question).await?;
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, message(&mut agent)).await;
        let answer = answer.map_err(|_| io::ErrorKind::TimedOut)??;
        guest
            .write_all(&answer.ok_or(io::ErrorKind::UnexpectedEof)?)
            .await?;
        guest.flush().await?;
    }
    Ok(())
}

/// One message with its length in front; `None` at an end between messages.
async fn message(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    if from.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut length[1..]).await?;
    let bytes = u32::from_be_bytes(length);
    if !(1..=MESSAGE_BYTES_MAX).contains(&bytes) {
        return Err(io::Error::other(format!(
            "an agent's message of {bytes} bytes"
        )));
    }
    let mut message = length.to_vec();
    message.resize(4 + bytes as usize, 0);
    from.read_exact(&mut message[4..]).await?;
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the guest gets and what the agent was asked, for these bytes of the guest.
    async fn asked(bytes: &[u8], answer: &[u8]) -> (io::Result<()>, Vec<u8>, Vec<u8>) {
        let (mut program, guest) = tokio::io::duplex(1 << 20);
        let (agent, mut keys) = tokio::io::duplex(1 << 20);
        program.write_all(bytes).await.expect("fits");
        program.shutdown().await.expect("ends");
        keys.write_all(answer).await.expect("fits");
        let result = relay(guest, agent).await;
        let (mut got, mut questions) = (Vec::new(), Vec::new());
        program.read_to_end(&mut got).await.expect("reads");
        keys.read_to_end(&mut questions).await.expect("reads");
        (result, got, questions)
    }

    #[tokio::test]
    async fn keys_are_listed_and_used_and_nothing_else() {
        let list = [0, 0, 0, 1, REQUEST_IDENTITIES];
        let none = [0, 0, 0, 5, 12, 0, 0, 0, 0];
        let (result, got, questions) = asked(&list, &none).await;
        result.expect("an orderly end");
        assert_eq!(
            (got.as_slice(), questions.as_slice()),
            (&none[..], &list[..])
        );
        // Remove all, lock, an extension, add: the agent never hears of it.
        for kind in [19, 22, 27, 17, 0, 255] {
            let (result, got, questions) = asked(&[0, 0, 0, 2, kind, 7], &[]).await;
            result.expect("an orderly end");
            assert_eq!(
                (got.as_slice(), questions.len()),
                (&FAILURE[..], 0),
                "{kind}"
            );
        }
    }

    #[tokio::test]
    async fn messages_are_bounded() {
        for bytes in [[0, 0, 0, 0, 0], [0, 4, 0, 1, REQUEST_IDENTITIES], [255; 5]] {
            let (result, got, questions) = asked(&bytes, &[]).await;
            assert!(
                result.is_err() && got.is_empty() && questions.is_empty(),
                "{bytes:?}"
            );
        }
        let list = [0, 0, 0, 1, REQUEST_IDENTITIES];
        assert!(
            asked(&list, &[255; 8]).await.0.is_err(),
            "an agent that answers too much"
        );
        assert!(asked(&list[..3], &[]).await.0.is_err(), "half a message");
    }

    #[tokio::test]
    async fn places_without_an_agent_have_none() {
        let agents = SshAgents::new(vec![(
            "default".to_owned(),
            PathBuf::from("/nowhere/agent"),
        )]);
        let sockets: Vec<_> = agents.in_machine().into_iter().collect();
        assert_eq!(
            sockets,
            [("default".to_owned(), "/run/kiln/ssh/0.sock".to_owned())]
        );
        for place in [0, 1, 255] {
            let (_program, guest) = tokio::io::duplex(64);
            let error = agents.serve(place, guest).await.expect_err("none");
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{place}");
        }
    }
}
