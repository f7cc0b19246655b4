//! The host's half of each order, as plain as it can be.

use kiln_proto::codec;
use kiln_proto::msg::{
    CallResult, ExecRequest, Exit, GetTree, GuestError, Order, OrderReply, Place, PutFile, PutTree,
    TreeReport, chunk, kind,
};
use kiln_proto::session::Session;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Most bytes of one answer.
const REPLY_MAX: usize = 64 * 1024;

/// Gives an order.
pub(crate) async fn try_call(session: &Session, order: &Order) -> CallResult {
    let payload = serde_json::to_vec(order).unwrap();
    let mut stream = session.open(kind::CALL, &payload).await.unwrap();
    stream.shutdown().await.unwrap();
    codec::read_msg(&mut stream, REPLY_MAX).await.unwrap()
}

/// Gives an order that must succeed.
pub(crate) async fn call(session: &Session, order: &Order) -> OrderReply {
    try_call(session, order)
        .await
        .unwrap_or_else(|error| panic!("{order:?}: {error}"))
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) out: String,
    pub(crate) err: String,
    pub(crate) exit: Result<Exit, GuestError>,
}

impl Ran {
    pub(crate) fn ok(&self) -> &str {
        assert_eq!(
            self.exit.as_ref().ok().and_then(|exit| exit.code),
            Some(0),
            "{self:?}"
        );
        &self.out
    }
}

/// A request for a command line.
pub(crate) fn shell(script: &str) -> ExecRequest {
    request(&["sh", "-c", script])
}

/// A request for a command.
pub(crate) fn request(argv: &[&str]) -> ExecRequest {
    ExecRequest {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        env: vec![("HOME".to_owned(), "/root".to_owned())],
        ..ExecRequest::default()
    }
}

/// Runs a command with these chunks as input.
pub(crate) async fn exec(session: &Session, request: &ExecRequest, input: &[(u8, &[u8])]) -> Ran {
    exec_until(session, request, "", input).await
}

/// Runs a command and sends the chunks when its standard output holds a text.
pub(crate) async fn exec_until(
    session: &Session,
    request: &ExecRequest,
    wanted: &str,
    mut input: &[(u8, &[u8])],
) -> Ran {
    let payload = serde_json::to_vec(request).unwrap();
    let mut stream = session.open(kind::EXEC, &payload).await.unwrap();
    let mut output = [Vec::new(), Vec::new()];
    loop {
        if String::from_utf8_lossy(&output[0]).contains(wanted) {
            for (tag, body) in std::mem::take(&mut input) {
                codec::write_chunk(&mut stream, *tag, body).await.unwrap();
            }
        }
        let part = codec::read_chunk(&mut stream)
            .await
            .unwrap()
            .expect("an exit");
        match part.tag {
            chunk::STDOUT | chunk::STDERR => {
                let to = &mut output[usize::from(part.tag - chunk::STDOUT)];
                let (offset, bytes) = part.body.split_first_chunk::<8>().unwrap();
                assert_eq!(u64::from_le_bytes(*offset), to.len() as u64);
                to.extend_from_slice(bytes);
            }
            tag => {
                let exit = match tag {
                    chunk::EXIT => Ok(serde_json::from_slice(&part.body).unwrap()),
                    chunk::FAILED => Err(serde_json::from_slice(&part.body).unwrap()),
                    other => panic!("chunk {other}"),
                };
                let [out, err] = output.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
                return Ran { out, err, exit };
            }
        }
    }
}

/// Runs a shell script.
pub(crate) async fn sh(session: &Session, script: &str) -> Ran {
    exec(session, &shell(script), &[]).await
}

/// Sends a tar as a tree.
pub(crate) async fn put_tree(
    session: &Session,
    order: &PutTree,
    tar: &[u8],
) -> Result<TreeReport, GuestError> {
    let payload = serde_json::to_vec(order).unwrap();
    let stream = session.open(kind::PUT_TREE, &payload).await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let send = async {
        // A refusal may come before all was taken.
        if writer.write_all(tar).await.is_ok() {
            let _refused = writer.shutdown().await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        reply = codec::read_msg(&mut reader, REPLY_MAX) => reply.unwrap(),
        () = send => unreachable!(),
    }
}

/// Sends a file.
pub(crate) async fn put_file(
    session: &Session,
    place: Place,
    bytes: &[u8],
) -> Result<TreeReport, GuestError> {
    let payload = serde_json::to_vec(&PutFile {
        place,
        bytes_max: 1 << 20,
    })
    .unwrap();
    let mut stream = session.open(kind::PUT_FILE, &payload).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream.shutdown().await.unwrap();
    codec::read_msg(&mut stream, REPLY_MAX).await.unwrap()
}

/// Fetches a tree as a tar.
pub(crate) async fn get_tree(
    session: &Session,
    path: &str,
    bytes_max: u64,
) -> std::io::Result<Vec<u8>> {
    let order = GetTree {
        path: path.to_owned(),
        bytes_max,
        entries_max: 10_000,
    };
    let payload = serde_json::to_vec(&order).unwrap();
    let mut stream = session.open(kind::GET_TREE, &payload).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut tar = Vec::new();
    stream.read_to_end(&mut tar).await.map(|_| tar)
}
