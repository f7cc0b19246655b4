//! Ports of this host that lead into the machine of a run.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tokio::net::TcpListener;

use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::Screen;

/// Ports of this host, and those of the machine that they lead to.
pub(super) fn ports(listeners: &[(TcpListener, u16)]) -> Result<Vec<(u16, u16)>> {
    let pair = |(listener, guest): &(TcpListener, u16)| {
        let address = listener.local_addr().or_infrastructure()?;
        Ok((address.port(), *guest))
    };
    listeners.iter().map(pair).collect()
}

/// Says which ports of this host lead into the machine, also where the system chose one. Nobody listens at their other end yet.
pub(super) fn announce(listeners: &[(TcpListener, u16)], screen: Screen) -> Result<()> {
    for (listener, guest) in listeners {
        let address = listener.local_addr().or_infrastructure()?;
        screen.note(&format!(
            "http://{address} leads to port {guest} of the machine, from when a program listens there"
        ));
    }
    Ok(())
}

/// Where a pair of ports stood on the command line.
#[derive(Clone, Copy, Debug)]
pub(super) enum Said {
    /// After `--publish`.
    Publish,
    /// As a word of `kiln port-forward`.
    Word,
}

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Publish => "--publish ",
            Self::Word => "",
        })
    }
}

/// Binds every published port before anything starts.
pub(super) async fn listen(said: Said, words: &[String]) -> Result<Vec<(TcpListener, u16)>> {
    let mut listeners = Vec::new();
    for word in words {
        let (address, guest) = published(said, word)?;
        let listener = TcpListener::bind(address).await.map_err(|error| {
            CliError::usage(format!(
                "{said}{word}: could not listen on {address}: {error}"
            ))
            .hint("another program may use it: name another port before the colon, for example 8081:3000")
        })?;
        listeners.push((listener, guest));
    }
    Ok(listeners)
}

/// `HOST:GUEST` or `ADDRESS:HOST:GUEST`; the address is loopback unless it is given.
fn published(said: Said, word: &str) -> Result<(SocketAddr, u16)> {
    let usage = || {
        CliError::usage(format!(
            "{said}{word:?}: write HOST:GUEST, for example 8080:3000"
        ))
    };
    let (front, guest) = word.rsplit_once(':').ok_or_else(usage)?;
    let (address, host) = match front.rsplit_once(':') {
        Some((address, host)) => (
            address
                .trim_matches(['[', ']'])
                .parse::<IpAddr>()
                .map_err(|_| usage())?,
            host,
        ),
        None => (IpAddr::V4(Ipv4Addr::LOCALHOST), front),
    };
    // A number that is no port is told as one. The host's may be 0: then the system chooses.
    let port = |text: &str, least: u16| {
        let is_number = !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit());
        match text.parse::<u16>() {
            Ok(port) if port >= least => Ok(port),
            _ if is_number => Err(CliError::usage(format!(
                "{said}{word:?}: {text} is no port: ports are 1 to 65535"
            ))),
            _ => Err(usage()),
        }
    };
    let host = port(host, 0)?;
    let guest = port(guest, 1)?;
    Ok((SocketAddr::new(address, host), guest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_ports() {
        let local = published(Said::Publish, "8080:3000").expect("legal");
        assert_eq!(local, ("127.0.0.1:8080".parse().expect("address"), 3000));
        assert_eq!(
            published(Said::Publish, "0.0.0.0:80:3000")
                .expect("legal")
                .0
                .to_string(),
            "0.0.0.0:80"
        );
        for bad in ["8080", "a:1", "1:0", "1:70000", ":"] {
            assert!(published(Said::Publish, bad).is_err(), "{bad}");
        }
        let told = published(Said::Word, "foo").expect_err("no ports");
        assert!(told.message.starts_with("\"foo\": write"), "{told:?}");
        for (word, port) in [("99999:1", "99999"), ("1:70000", "70000"), ("1:0", "0")] {
            let told = published(Said::Publish, word).expect_err(word);
            let want = format!("--publish {word:?}: {port} is no port: ports are 1 to 65535");
            assert_eq!(told.message, want);
        }
    }
}
