//! SQLite's only writer, with group commit: transactions that wait while one is synced to disk share the next sync.
//!
//! Each runs between savepoints, so that one that fails takes nothing of its neighbours with it; nobody hears of success before
//! the shared commit is on disk. A caller that goes away does not undo what it asked for.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use sqlx::{Connection as _, SqliteConnection};
use tokio::sync::{mpsc, oneshot};

use super::{Conn, Tx, args};
use crate::clock::Clock;
use crate::database::slowly;
use crate::error::DbError;
use crate::wake::Wakes;

/// Transactions that wait for the writer; more make their callers wait.
const WAITING_MAX: usize = 1024;
/// Transactions that share one commit.
const GROUP_MAX: usize = 256;

/// Told when the commit is on disk, or why it is not.
type Reply = Box<dyn FnOnce(Result<(), DbError>) + Send>;

/// A transaction on its way to the writer.
trait Work: Send {
    fn run<'t>(self: Box<Self>, tx: &'t mut Tx) -> BoxFuture<'t, Ran>;
    fn fail(self: Box<Self>, error: DbError);
    fn doing(&self) -> &'static str;
}

/// What came of one transaction, before the commit.
enum Ran {
    /// It waits for the commit.
    Done(Reply),
    /// It failed and changed nothing; the caller was told. For its neighbours, if it takes them with it.
    Undone(DbError),
}

struct Job<F, T> {
    doing: &'static str,
    body: F,
    reply: oneshot::Sender<Result<T, DbError>>,
}

impl<F, T> Work for Job<F, T>
where
    F: for<'t> Fn(&'t mut Tx) -> BoxFuture<'t, Result<T, DbError>> + Send + Sync + 'static,
    T: Send + 'static,
{
    fn run<'t>(self: Box<Self>, tx: &'t mut Tx) -> BoxFuture<'t, Ran> {
        Box::pin(async move {
            let Self { body, reply, .. } = *self;
            match body(tx).await {
                Ok(value) => Ran::Done(Box::new(move |committed| {
                    let _gone = reply.send(committed.map(|()| value));
                })),
                Err(error) => {
                    let for_others = error.of_neighbour();
                    let _gone = reply.send(Err(error));
                    Ran::Undone(for_others)
                }
            }
        })
    }

    fn fail(self: Box<Self>, error: DbError) {
        let _gone = self.reply.send(Err(error));
    }

    fn doing(&self) -> &'static str {
        self.doing
    }
}

/// Who is told after a commit, and how much later than need be.
struct Told {
    wakes: Wakes,
    delay: Duration,
}

enum Order {
    Work(Box<dyn Work>),
    Close(oneshot::Sender<()>),
}

/// The way to the writer. Clones share it.
#[derive(Clone)]
pub(crate) struct Writer {
    orders: mpsc::Sender<Order>,
}

impl Writer {
    /// Starts the writer on its connection.
    pub(crate) fn start(
        conn: SqliteConnection,
        clock: &Arc<dyn Clock>,
        wakes: Wakes,
        delay: Duration,
    ) -> Self {
        let (orders, queue) = mpsc::channel(WAITING_MAX);
        let tx = Tx::new(Conn::Writer(conn), "begin", clock);
        let told = Told { wakes, delay };
        tokio::spawn(serve(tx, queue, told));
        Self { orders }
    }

    /// Runs a transaction and waits until it is on disk.
    pub(crate) async fn write<F, T>(&self, doing: &'static str, body: F) -> Result<T, DbError>
    where
        F: for<'t> Fn(&'t mut Tx) -> BoxFuture<'t, Result<T, DbError>> + Send + Sync + 'static,
        T: Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(Job { doing, body, reply });
        let sent = self.orders.send(Order::Work(job)).await;
        sent.map_err(|_| DbError::Closed)?;
        answer.await.map_err(|_| DbError::Closed)?
    }

    /// Waits for what was asked before, then closes the file.
    pub(crate) async fn close(&self) {
        let (reply, answer) = oneshot::channel();
        if self.orders.send(Order::Close(reply)).await.is_ok() {
            let _closed = answer.await;
        }
    }
}

async fn serve(mut tx: Tx, mut queue: mpsc::Receiver<Order>, told: Told) {
    while let Some(order) = queue.recv().await {
        let closing = match order {
            Order::Work(work) => group(&mut tx, work, &mut queue, &told).await,
            Order::Close(reply) => Some(reply),
        };
        if let Some(reply) = closing {
            // What came after the close finds the channel closed.
            drop(queue);
            close(tx).await;
            let _gone = reply.send(());
            return;
        }
    }
    close(tx).await;
}

async fn close(tx: Tx) {
    if let Conn::Writer(conn) = tx.conn
        && let Err(error) = conn.close().await
    {
        tracing::warn!(%error, "the database file did not close cleanly");
    }
}

/// One commit for this transaction and all that wait already. Gives the order to close, if that came.
async fn group(
    tx: &mut Tx,
    first: Box<dyn Work>,
    queue: &mut mpsc::Receiver<Order>,
    told: &Told,
) -> Option<oneshot::Sender<()>> {
    tx.doing = first.doing();
    if let Err(error) = tx.exec("begin immediate", args![]).await {
        first.fail(error);
        return None;
    }
    let mut closing = None;
    let mut replies = Vec::new();
    let mut broken = None;
    let mut next = Some(first);
    while let Some(work) = next.take() {
        if let Err(error) = one(tx, work, &mut replies).await {
            broken = Some(error);
            break;
        }
        if replies.len() < GROUP_MAX {
            match queue.try_recv() {
                Ok(Order::Work(work)) => next = Some(work),
                Ok(Order::Close(reply)) => closing = Some(reply),
                Err(_) => {}
            }
        }
    }
    end(tx, broken, replies, told).await;
    closing
}

/// One transaction between savepoints. An error here means that the whole group cannot go on, and is what its others are told.
async fn one(tx: &mut Tx, work: Box<dyn Work>, replies: &mut Vec<Reply>) -> Result<(), DbError> {
    tx.doing = work.doing();
    tx.now = None;
    let woken = tx.wakes.len();
    if let Err(error) = tx.exec("savepoint one", args![]).await {
        let for_others = error.of_neighbour();
        work.fail(error);
        return Err(for_others);
    }
    match work.run(tx).await {
        Ran::Done(reply) => {
            replies.push(reply);
            tx.exec("release one", args![]).await?;
        }
        Ran::Undone(for_others) => {
            tx.wakes.truncate(woken);
            // A full disk may have ended the whole transaction: then there is nothing to go back to, and that is why.
            let undone = async {
                tx.exec("rollback to one", args![]).await?;
                tx.exec("release one", args![]).await
            };
            if undone.await.is_err() {
                return Err(for_others);
            }
        }
    }
    Ok(())
}

async fn end(tx: &mut Tx, broken: Option<DbError>, replies: Vec<Reply>, told: &Told) {
    tx.doing = "commit";
    slowly(told.delay).await;
    let committed = match broken {
        Some(error) => Err(error),
        None => tx.exec("commit", args![]).await.map(drop),
    };
    let woken = std::mem::take(&mut tx.wakes);
    match committed {
        Ok(()) => {
            for reply in replies {
                reply(Ok(()));
            }
            told.wakes.send(woken);
        }
        Err(error) => {
            // SQLite may have ended the transaction itself (a full disk): then there is nothing to undo.
            if let Err(error) = tx.exec("rollback", args![]).await {
                tracing::debug!(%error, "nothing to roll back");
            }
            for reply in replies {
                reply(Err(error.of_neighbour()));
            }
        }
    }
}
