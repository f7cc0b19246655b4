//! Resolving and dialling, behind traits so that tests need no network. The address check is not in here: it
//! stands between the two, in the gateway.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::BoxFuture;

/// Most addresses of one name that are tried.
pub const ADDRESSES_MAX: usize = 8;
/// How long an attempt runs before the next address is tried beside it (RFC 8305 §5).
pub const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Most threads that wait for the host's resolver, those included whose asker gave up.
pub const THREADS_MAX: usize = 2 * super::RESOLVES_MAX;

/// A byte stream with both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + ?Sized> Duplex for T {}

/// Any byte stream.
pub type BoxedDuplex = Box<dyn Duplex>;

/// Turns a name into addresses.
pub trait Resolver: Send + Sync {
    /// Every address of the name, best first.
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>>;

    /// The name's IPv6 addresses. None means that there are none for certain; an error, that nobody knows.
    fn resolve_ipv6<'a>(&'a self, host: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async move {
            match self.resolve(host).await {
                Ok(mut addrs) => {
                    addrs.retain(IpAddr::is_ipv6);
                    Ok(addrs)
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
                Err(error) => Err(error),
            }
        })
    }
}

/// Opens a connection to an address that was checked.
pub trait Dialer: Send + Sync {
    /// Connects to exactly this address.
    fn dial(&self, addr: SocketAddr) -> BoxFuture<'static, io::Result<BoxedDuplex>>;
}

/// The host's own resolver (hosts file, DNS, whatever it is set to).
#[derive(Clone, Copy, Debug)]
pub struct SystemResolver;

/// Questions whose threads still wait, asked for or not any more.
static QUESTIONS: LazyLock<Arc<Semaphore>> =
    LazyLock::new(|| Arc::new(Semaphore::new(THREADS_MAX)));

impl Resolver for SystemResolver {
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        let ask = |host: &str| {
            let addrs = (host, 0_u16).to_socket_addrs()?;
            Ok(unique(addrs.map(|addr| addr.ip())))
        };
        Box::pin(on_a_thread(host, ask))
    }

    fn resolve_ipv6<'a>(&'a self, host: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        let ask = |host: &str| {
            let addrs = super::addrinfo::ipv6_of(host)?;
            Ok(unique(addrs.into_iter().map(IpAddr::from)))
        };
        Box::pin(on_a_thread(host, ask))
    }
}

/// Asks on a thread of its own, of which there are at most [`THREADS_MAX`].
async fn on_a_thread(
    host: &str,
    ask: impl FnOnce(&str) -> io::Result<Vec<IpAddr>> + Send + 'static,
) -> io::Result<Vec<IpAddr>> {
    let permit = Arc::clone(&QUESTIONS)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let host = host.to_owned();
    // The permit goes with the thread: a caller that gave up does not free it.
    let answer = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        ask(&host)
    });
    answer.await.map_err(io::Error::other)?
}

fn unique(addrs: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut unique: Vec<IpAddr> = Vec::new();
    for addr in addrs {
        if !unique.contains(&addr) {
            unique.push(addr);
        }
    }
    unique
}

/// TCP from the host.
#[derive(Clone, Copy, Debug)]
pub struct TcpDialer;

impl Dialer for TcpDialer {
    fn dial(&self, addr: SocketAddr) -> BoxFuture<'static, io::Result<BoxedDuplex>> {
        Box::pin(async move {
            let stream = TcpStream::connect(addr).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as BoxedDuplex)
        })
    }
}

/// The order in which addresses are tried: families alternate, starting with the resolver's favourite.
fn happy_order(addrs: &[SocketAddr]) -> Vec<SocketAddr> {
    let Some(first) = addrs.first() else {
        return Vec::new();
    };
    let (mut same, mut other): (Vec<&SocketAddr>, Vec<&SocketAddr>) = addrs
        .iter()
        .partition(|addr| addr.is_ipv4() == first.is_ipv4());
    same.reverse();
    other.reverse();
    let mut order = Vec::new();
    while order.len() < ADDRESSES_MAX {
        let before = order.len();
        order.extend(same.pop().copied());
        order.extend(other.pop().copied());
        if order.len() == before {
            break;
        }
    }
    order.truncate(ADDRESSES_MAX);
    order
}

/// Nobody answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Failed {
    /// Why, in a sentence.
    pub(super) error: String,
    /// The address that this is said of.
    pub(super) last: Option<SocketAddr>,
}

/// Connects to the first address that answers; a new attempt starts when one fails or is slow.
///
/// # Errors
/// When no address answered before the deadline.
pub(super) async fn dial_any(
    dialer: &Arc<dyn Dialer>,
    addrs: &[SocketAddr],
    deadline: Instant,
) -> Result<(BoxedDuplex, SocketAddr), Failed> {
    let mut waiting = happy_order(addrs).into_iter();
    let mut attempts = JoinSet::new();
    let mut failed = Failed {
        error: "no address to try".to_owned(),
        last: None,
    };
    let mut next_at = Instant::now();
    let mut more = true;
    loop {
        if more && (attempts.is_empty() || Instant::now() >= next_at) {
            match waiting.next() {
                Some(addr) => {
                    let dialling = dialer.dial(addr);
                    attempts.spawn(async move { (addr, timeout_at(deadline, dialling).await) });
                    next_at = Instant::now() + ATTEMPT_DELAY;
                }
                None => more = false,
            }
        }
        if attempts.is_empty() && !more {
            return Err(failed);
        }
        tokio::select! {
            Some(ended) = attempts.join_next() => match ended {
                Ok((addr, Ok(Ok(stream)))) => return Ok((stream, addr)),
                Ok((addr, Ok(Err(error)))) => {
                    let error = error.to_string();
                    failed = Failed { error, last: Some(addr) };
                }
                Ok((addr, Err(_))) => {
                    let error = "no connection in time".to_owned();
                    return Err(Failed { error, last: Some(addr) });
                }
                Err(error) => failed.error = error.to_string(),
            },
            () = sleep_until(next_at), if more => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_alternate_and_the_number_is_bounded() {
        let addr = |text: &str| -> SocketAddr { text.parse().expect("address") };
        let (a6, b6) = (addr("[2600::1]:1"), addr("[2600::2]:1"));
        let (a4, b4) = (addr("8.8.8.8:1"), addr("9.9.9.9:1"));
        assert_eq!(happy_order(&[a6, b6, a4, b4]), [a6, a4, b6, b4]);
        assert_eq!(happy_order(&[a4, b4, a6]), [a4, a6, b4]);
        assert_eq!(happy_order(&[]), []);
        let many: Vec<SocketAddr> = (0..40).map(|p| SocketAddr::new(a4.ip(), p)).collect();
        assert_eq!(happy_order(&many).len(), ADDRESSES_MAX);
    }

    /// The first address hangs, the second refuses, the third answers.
    struct Uneven;

    impl Dialer for Uneven {
        fn dial(&self, addr: SocketAddr) -> BoxFuture<'static, io::Result<BoxedDuplex>> {
            Box::pin(async move {
                match addr.port() {
                    1 => std::future::pending().await,
                    2 => Err(io::ErrorKind::ConnectionRefused.into()),
                    _ => Ok(Box::new(tokio::io::duplex(1).0) as BoxedDuplex),
                }
            })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_hanging_address_does_not_hold_the_others_up() {
        let dialer: Arc<dyn Dialer> = Arc::new(Uneven);
        let addr = |port| SocketAddr::new("8.8.8.8".parse().expect("address"), port);
        let start = Instant::now();
        let deadline = start + Duration::from_secs(20);
        let (_, reached) = dial_any(&dialer, &[addr(1), addr(2), addr(3)], deadline)
            .await
            .map_err(|failed| failed.error)
            .expect("third answers");
        assert_eq!(reached, addr(3));
        assert!(
            start.elapsed() <= ATTEMPT_DELAY * 3,
            "{:?}",
            start.elapsed()
        );
        let failed = dial_any(&dialer, &[addr(1), addr(2)], deadline).await;
        assert_eq!(
            failed.err().map(|failed| failed.error).as_deref(),
            Some("no connection in time")
        );
        let refused = dial_any(&dialer, &[addr(2)], deadline).await;
        assert_eq!(
            refused.err().map(|failed| (failed.error, failed.last)),
            Some(("connection refused".to_owned(), Some(addr(2))))
        );
    }
}
