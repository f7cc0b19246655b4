//! Where a database is: `sqlite:PATH` or `postgres://...`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use sqlx::postgres::{PgConnectOptions, PgSslMode};

/// Where a database is. Its text shows no password.
#[derive(Clone)]
pub enum DatabaseUrl {
    /// A file of this host, for one controller.
    Sqlite(PathBuf),
    /// A PostgreSQL server (15 or newer), for one or several controllers.
    Postgres(PostgresUrl),
}

/// Address, account and TLS mode of a PostgreSQL server.
#[derive(Clone)]
pub struct PostgresUrl(pub(crate) Box<PgConnectOptions>);

/// Why a text is not the place of a database.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}: write sqlite:PATH or postgres://USER:PASSWORD@HOST:PORT/DATABASE")]
pub struct ParseUrlError(String);

impl FromStr for DatabaseUrl {
    type Err = ParseUrlError;

    fn from_str(text: &str) -> Result<Self, ParseUrlError> {
        if let Some(path) = text.strip_prefix("sqlite:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.is_empty() || path == ":memory:" || path.contains(['?', '\0']) {
                return Err(ParseUrlError("sqlite: needs the path of a file".to_owned()));
            }
            return Ok(Self::Sqlite(PathBuf::from(path)));
        }
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            // The engine's own words could repeat the password.
            let options = PgConnectOptions::from_str(text)
                .map_err(|_| ParseUrlError("the PostgreSQL address cannot be read".to_owned()))?;
            return Ok(Self::Postgres(PostgresUrl(Box::new(with_tls(options)))));
        }
        Err(ParseUrlError(
            "the database is neither SQLite nor PostgreSQL".to_owned(),
        ))
    }
}

/// TLS is verified or off, nothing between: off by itself on this host alone, elsewhere only by `sslmode=disable`.
fn with_tls(options: PgConnectOptions) -> PgConnectOptions {
    let host = options.get_host();
    let local = options.get_socket().is_some()
        || host.starts_with('/')
        || matches!(host, "localhost" | "127.0.0.1" | "::1" | "[::1]");
    let mode = match options.get_ssl_mode() {
        PgSslMode::Disable => PgSslMode::Disable,
        PgSslMode::Allow | PgSslMode::Prefer if local => PgSslMode::Disable,
        PgSslMode::VerifyCa => PgSslMode::VerifyCa,
        _ => PgSslMode::VerifyFull,
    };
    options.ssl_mode(mode)
}

impl DatabaseUrl {
    /// Whether several controllers can share it.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        matches!(self, Self::Postgres(_))
    }

    /// The host it is on; none when it is a file or a socket of this one.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        match self {
            Self::Postgres(url) if url.0.get_socket().is_none() => Some(url.0.get_host()),
            Self::Postgres(_) | Self::Sqlite(_) => None,
        }
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres(url) => write!(f, "{url}"),
        }
    }
}

impl fmt::Display for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = &self.0;
        write!(f, "postgres://{}", options.get_username())?;
        match options.get_socket() {
            Some(socket) => write!(f, "@{}", socket.display())?,
            None => write!(f, "@{}:{}", options.get_host(), options.get_port())?,
        }
        write!(f, "/{}", options.get_database().unwrap_or_default())
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_and_passwords_never_shown() {
        let url: DatabaseUrl = "postgres://kiln:hidden@db.invalid:5433/queue"
            .parse()
            .expect("reads");
        assert_eq!(format!("{url} {url:?}").matches("hidden").count(), 0);
        assert_eq!(url.to_string(), "postgres://kiln@db.invalid:5433/queue");
        let url: DatabaseUrl = "sqlite:/var/lib/kiln/kiln.db".parse().expect("reads");
        assert_eq!(url.to_string(), "sqlite:/var/lib/kiln/kiln.db");
        for bad in ["", "sqlite:", "sqlite::memory:", "mysql://x", "postgres:x"] {
            assert!(bad.parse::<DatabaseUrl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn tls_is_verified_unless_switched_off() {
        let mode = |text: &str| match text.parse::<DatabaseUrl>() {
            Ok(DatabaseUrl::Postgres(url)) => format!("{:?}", url.0.get_ssl_mode()),
            other => format!("{other:?}"),
        };
        assert_eq!(mode("postgres://a@db.invalid/x"), "VerifyFull");
        assert_eq!(
            mode("postgres://a@db.invalid/x?sslmode=require"),
            "VerifyFull"
        );
        assert_eq!(mode("postgres://a@db.invalid/x?sslmode=disable"), "Disable");
        assert_eq!(mode("postgres://a@127.0.0.1/x"), "Disable");
        assert_eq!(
            mode("postgres://a@127.0.0.1/x?sslmode=verify-full"),
            "VerifyFull"
        );
    }
}
