//! Words of `kiln serve`.

use std::path::PathBuf;

use clap::Args;

/// Options of `kiln serve`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  kiln serve --with-worker\n  kiln serve --listen 0.0.0.0:8443 --name ci.example.org\n  \
kiln serve --listen 0.0.0.0:8443 --name ci.example.org \\\n      \
--database postgres://kiln@db.example.org/kiln\n  \
kiln serve --listen 10.0.0.2:8443 --name ci.example.org \\\n      \
--database postgres://kiln@db.example.org/kiln --store s3://kiln/ci\n\n\
What an operator decides once is [limits] and [controller] in kiln.toml; docs/guides/server.md."
)]
pub(crate) struct ServeArgs {
    /// Address and port to listen on, besides the private socket; may be given more than once
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Vec<std::net::SocketAddr>,
    /// DNS name or address that others reach this server by; may be given more than once
    #[arg(long = "name", value_name = "HOST")]
    pub names: Vec<String>,
    /// Certificate chain to show, PEM, instead of one that kiln's own authority signs
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Speak plain HTTP, also where others can listen in
    #[arg(long, conflicts_with = "tls_cert")]
    pub insecure_plain_http: bool,
    /// Database: sqlite:PATH or postgres://USER@HOST/NAME; a file of the home without
    #[arg(
        long,
        value_name = "URL",
        env = "KILN_DATABASE",
        hide_env_values = true
    )]
    pub database: Option<String>,
    /// Bucket for logs and uploaded sources, s3://BUCKET/FOLDER?endpoint=https://HOST:PORT&region=NAME; the home without. Its key is
    /// in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
    #[arg(long, value_name = "URL", env = "KILN_STORE", hide_env_values = true)]
    pub store: Option<String>,
    /// Key of the bucket: a file with access_key_id = "..." and secret_access_key = "...", which nobody else may read
    #[arg(long, value_name = "FILE", requires = "store")]
    pub store_key: Option<PathBuf>,
    /// Authority that signed the bucket's certificate, PEM, when the host does not trust it already
    #[arg(long, value_name = "FILE", requires = "store")]
    pub store_ca: Option<PathBuf>,
    /// Speak plain HTTP to the bucket, also where others can listen in
    #[arg(long, requires = "store")]
    pub store_plain_http: bool,
    /// Where other controllers of the database reach this one; the first --listen address without
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_host_port)]
    pub advertise: Option<String>,
    /// Take over a database whose controllers are gone, with other keys or another store than theirs
    #[arg(long, requires = "database")]
    pub adopt_database: bool,
    /// Show /metrics at this address, plain HTTP and without a token
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics: Option<std::net::SocketAddr>,
    /// First word of the metrics' names: kiln or hypeman
    #[arg(long, value_name = "NAME", default_value = "kiln")]
    pub metrics_prefix: kiln_telemetry::metrics::Prefix,
    /// Send spans of jobs to this OpenTelemetry collector (OTLP over HTTP), http://HOST:4318
    #[arg(long, value_name = "URL")]
    pub otlp: Option<String>,
    /// Encrypt logs and artifacts where they lie, with a key below controller/keys
    #[arg(long)]
    pub encrypt_logs: bool,
    /// Run jobs on this host, too
    #[arg(long)]
    pub with_worker: bool,
}

/// `HOST:PORT`, as it is put into a URL.
fn parse_host_port(text: &str) -> Result<String, String> {
    let wrong = || "write HOST:PORT".to_owned();
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let bare = host.trim_matches(['[', ']']);
    let legal = !bare.is_empty()
        && bare
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-.:".contains(&b))
        && (host.starts_with('[') || !host.contains(':'));
    match (legal, port.parse::<u16>()) {
        (true, Ok(1..)) => Ok(text.to_owned()),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_with_ports() {
        for bad in ["", "a", "a:0", ":1", "::1:80", "a/b:1", "a:x"] {
            assert!(parse_host_port(bad).is_err(), "{bad}");
        }
        assert!(
            parse_host_port("[::1]:80").is_ok() && parse_host_port("ci.example.org:8443").is_ok()
        );
    }
}
