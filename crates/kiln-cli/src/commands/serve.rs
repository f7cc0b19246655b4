//! `kiln serve`: one controller on this host, with its registry, and a worker beside it if asked.

use std::path::{Path, PathBuf};

use kiln_controller::api::{ApiConfig, ListenConfig};
use kiln_controller::server::{self, Running, ServeConfig, StartError, Tls};
use kiln_controller::webhooks::ReceiverPolicy;
use kiln_core::{FailureClass, PoolName};
use kiln_db::{DatabaseUrl, Retention};
use kiln_telemetry::metrics::Prefix;
use kiln_worker::fleet::http::Target;
use tokio_util::sync::CancellationToken;

use super::operator::Operator;
use super::worker;
use crate::args::ServeArgs;
use crate::error::{CliError, OrInfrastructure as _, Result, chain};
use crate::show::Screen;

/// Name of the worker that `--with-worker` starts.
const OWN_WORKER: &str = "here";
/// Machines of that worker at a time.
const OWN_MACHINES: u32 = 8;

/// Where a home's controller keeps what is its own.
pub(crate) fn folder(operator: &Operator) -> PathBuf {
    operator.home.data.join("controller")
}

pub(super) async fn run(args: ServeArgs, screen: Screen, cancel: CancellationToken) -> Result<u8> {
    let operator = Operator::load()?;
    let with_worker = args.with_worker;
    let scheme = match args.insecure_plain_http {
        true => "http",
        false => "https",
    };
    let running = start(&operator, args).await?;
    tell(&running, scheme, screen);
    let worked = match with_worker {
        false => {
            cancel.cancelled().await;
            Ok(())
        }
        true => {
            let target = Target::Socket(running.socket.clone());
            worker::beside(&operator, target, OWN_WORKER, OWN_MACHINES, screen, &cancel).await
        }
    };
    running.stop().await;
    worked.map(|()| 0)
}

async fn start(operator: &Operator, args: ServeArgs) -> Result<Running> {
    operator.home.prepare().or_infrastructure()?;
    let database = args.database.as_deref().map(database).transpose()?;
    let tls = tls(&args)?;
    let registry = operator.registry().await?.host;
    let registry_address = args.listen.first().map(|address| match args.names.first() {
        Some(name) => format!("{name}:{}", address.port()),
        None => address.to_string(),
    });
    let config = ServeConfig {
        folder: folder(operator),
        database,
        listen: args.listen,
        tls,
        sockets: ListenConfig {
            plain_is_fine: args.insecure_plain_http,
            ..ListenConfig::default()
        },
        api: ApiConfig::default(),
        issuer: args
            .names
            .first()
            .cloned()
            .unwrap_or_else(|| "kiln".to_owned()),
        trusted: Vec::new(),
        registry,
        registry_address,
        pool: PoolName::default_pool(),
        metrics: args.metrics,
        prefix: Prefix::default(),
        receivers: ReceiverPolicy::default(),
        retention: Retention::default(),
        generation: kiln_proto::fleet::GENERATION,
    };
    let ca = config.folder.join("authority.pem");
    let running = server::start(config).await;
    let running = running.map_err(|error| refused(&error))?;
    // For `--ca` of those who ask this server from elsewhere; it is no secret.
    std::fs::write(ca, running.controller.access.authority().pem()).or_infrastructure()?;
    Ok(running)
}

fn database(text: &str) -> Result<DatabaseUrl> {
    // The URL may hold a password: only the reason is shown.
    let parsed = text.parse();
    parsed.map_err(|error: kiln_db::ParseUrlError| CliError::usage(format!("--database: {error}")))
}

fn tls(args: &ServeArgs) -> Result<Tls> {
    if args.insecure_plain_http {
        return Ok(Tls::Plain);
    }
    if let (Some(chain), Some(key)) = (&args.tls_cert, &args.tls_key) {
        let read = |path: &Path| {
            std::fs::read(path)
                .map_err(|error| CliError::usage(format!("could not read {path:?}: {error}")))
        };
        return Ok(Tls::Given {
            chain: read(chain)?,
            key: read(key)?,
        });
    }
    let mut names = args.names.clone();
    for address in &args.listen {
        if !address.ip().is_unspecified() {
            names.push(address.ip().to_string());
        }
    }
    names.push("localhost".to_owned());
    Ok(Tls::Own(names))
}

fn refused(error: &StartError) -> CliError {
    let (class, hint) = match error {
        StartError::Taken(_) => (
            FailureClass::Usage,
            Some("stop it, or set KILN_HOME to another directory"),
        ),
        StartError::Listen(_) | StartError::Names | StartError::Tls(_) => {
            (FailureClass::Usage, None)
        }
        _ => (FailureClass::Infrastructure, None),
    };
    let told = CliError::new(class, chain(error));
    match hint {
        Some(hint) => told.hint(hint),
        None => told,
    }
}

fn tell(running: &Running, scheme: &str, screen: Screen) {
    let value = serde_json::json!({
        "event": "serving", "addresses": running.addresses, "socket": running.socket,
    });
    screen.data(&value, || {
        let addresses: Vec<String> = running
            .addresses
            .iter()
            .map(|address| format!("  {scheme}://{address}\n"))
            .collect();
        format!(
            "serving kiln's queue; Ctrl-C ends it\n{}  private socket {}",
            addresses.concat(),
            running.socket.display()
        )
    });
}
