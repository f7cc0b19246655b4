//! Wake-ups between controllers that share a PostgreSQL: one NOTIFY for many, on a connection of its own, after the commit.
//!
//! Inside a write transaction NOTIFY would take a lock that all commits of the server wait for. A lost one is harmless: everybody sweeps.

use std::collections::BTreeSet;
use std::time::Duration;

use sqlx::postgres::PgListener;
use sqlx::{Pool, Postgres};
use tokio::sync::broadcast::{self, error::RecvError};

use crate::wake::{Wake, Wakes};

/// Name of the channel.
const CHANNEL: &str = "kiln";
/// Wake-ups of this long share one NOTIFY.
const GATHER: Duration = Duration::from_millis(10);
/// Longest payload; the server's bound is 8000 bytes.
const PAYLOAD_MAX: usize = 7000;
/// Wait before a listener that failed listens again.
const AGAIN: Duration = Duration::from_secs(1);
/// Marks wake-ups that came from elsewhere, so that they are not sent back.
const SENDER_DIGITS: usize = 16;

/// Starts both directions; they end with the pool.
pub(crate) fn start(pool: &Pool<Postgres>, wakes: &Wakes) {
    let me = sender_name();
    tokio::spawn(tell(pool.clone(), wakes.elsewhere.subscribe(), me.clone()));
    tokio::spawn(listen(pool.clone(), wakes.here.clone(), me));
}

fn sender_name() -> String {
    use std::hash::{BuildHasher as _, RandomState};
    let name = format!("{:016x}", RandomState::new().hash_one(std::process::id()));
    name.chars().take(SENDER_DIGITS).collect()
}

async fn tell(pool: Pool<Postgres>, mut wakes: broadcast::Receiver<Wake>, me: String) {
    loop {
        let mut words = BTreeSet::new();
        match wakes.recv().await {
            Ok(wake) => drop(words.insert(word(&wake))),
            Err(RecvError::Lagged(_)) => drop(words.insert("*".to_owned())),
            Err(RecvError::Closed) => return,
        }
        tokio::time::sleep(GATHER).await;
        while let Ok(wake) = wakes.try_recv() {
            words.insert(word(&wake));
        }
        let joined = words.into_iter().collect::<Vec<_>>().join(" ");
        let joined = if joined.len() > PAYLOAD_MAX {
            "*"
        } else {
            &joined
        };
        let payload = format!("{me} {joined}");
        let sent = sqlx::query("select pg_notify($1, $2)")
            .bind(CHANNEL)
            .bind(payload)
            .execute(&pool)
            .await;
        if let Err(error) = sent {
            if pool.is_closed() {
                return;
            }
            tracing::debug!(%error, "a wake-up was not sent");
        }
    }
}

async fn listen(pool: Pool<Postgres>, wakes: broadcast::Sender<Wake>, me: String) {
    while !pool.is_closed() {
        if let Err(error) = listen_once(&pool, &wakes, &me).await
            && !pool.is_closed()
        {
            tracing::debug!(%error, "listening for wake-ups failed, trying again");
        }
        tokio::select! {
            () = pool.close_event() => return,
            () = tokio::time::sleep(AGAIN) => {}
        }
    }
}

async fn listen_once(
    pool: &Pool<Postgres>,
    wakes: &broadcast::Sender<Wake>,
    me: &str,
) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.ignore_pool_close_event(false);
    listener.listen(CHANNEL).await?;
    // Something may have happened before.
    let _nobody = wakes.send(Wake::Everything);
    loop {
        let notification = tokio::select! {
            () = pool.close_event() => return Ok(()),
            notification = listener.recv() => notification?,
        };
        let mut words = notification.payload().split(' ');
        if words.next() == Some(me) {
            continue;
        }
        for wake in words.filter_map(read) {
            let _nobody = wakes.send(wake);
        }
    }
}

/// A wake-up as a word.
fn word(wake: &Wake) -> String {
    match wake {
        Wake::Queue(pool) => format!("q:{pool}"),
        Wake::Job(job) => format!("j:{job}"),
        Wake::Worker(worker) => format!("w:{worker}"),
        Wake::Lead(pool) => format!("l:{pool}"),
        Wake::Outbox => "o".to_owned(),
        Wake::Everything => "*".to_owned(),
    }
}

fn read(word: &str) -> Option<Wake> {
    match word.split_once(':') {
        Some(("q", pool)) => pool.parse().ok().map(Wake::Queue),
        Some(("l", pool)) => pool.parse().ok().map(Wake::Lead),
        Some(("j", job)) => job.parse().ok().map(Wake::Job),
        Some(("w", worker)) => worker.parse().ok().map(Wake::Worker),
        Some(_) => None,
        None if word == "o" => Some(Wake::Outbox),
        None => Some(Wake::Everything),
    }
}
