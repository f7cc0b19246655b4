//! `kiln serve`: one controller on this host, with its registry, and a worker beside it if asked.

use std::path::{Path, PathBuf};

use kiln_controller::access::shown::IdentityFiles;
use kiln_controller::api::ListenConfig;
use kiln_controller::server::{self, Running, ServeConfig, SharedError, Sharing, StartError, Tls};
use kiln_core::{FailureClass, PoolName};
use kiln_db::{DatabaseUrl, OpenOptions};
use kiln_store::BucketError;
use kiln_store::logs::{S3Credentials, S3Target};
use kiln_worker::fleet::http::Target;
use tokio_util::sync::CancellationToken;

use super::operator::Operator;
use super::{home_queue, worker};
use crate::args::ServeArgs;
use crate::environment;
use crate::error::{CliError, OrInfrastructure as _, Result, chain};
use crate::show::{Screen, ShownPath as _};

/// Name of the worker that `--with-worker` starts.
const OWN_WORKER: &str = "here";
/// Machines of that worker at a time.
const OWN_MACHINES: u32 = 8;

pub(super) async fn run(args: ServeArgs, screen: Screen, cancel: CancellationToken) -> Result<u8> {
    let operator = Operator::load()?;
    let settings = &operator.config.controller;
    let args = ServeArgs {
        otlp: args.otlp.or_else(|| settings.otlp().map(str::to_owned)),
        encrypt_logs: args.encrypt_logs || settings.encrypt_logs,
        ..args
    };
    nameless(&args, screen);
    let (with_worker, otlp) = (args.with_worker, args.otlp.clone());
    let scheme = match args.insecure_plain_http {
        true => "http",
        false => "https",
    };
    let own = args.tls_cert.is_none() && !args.insecure_plain_http;
    let running = start(&operator, args).await?;
    let authority = (own && !running.addresses.is_empty()).then(|| authority_file(&operator));
    tell(&running, scheme, authority.as_deref(), screen);
    let working = async {
        if !with_worker {
            cancel.cancelled().await;
            return Ok(());
        }
        let target = Target::Socket(running.socket.clone());
        let own = worker::Beside {
            name: OWN_WORKER,
            machines: OWN_MACHINES,
            otlp: otlp.as_deref(),
        };
        worker::beside(&operator, target, own, screen, &cancel).await
    };
    let (folder, db) = (operator.home.controller(), &running.controller.db);
    let worked = tokio::select! {
        worked = working => worked,
        never = home_queue::bury(&folder, db) => match never {},
    };
    running.stop().await;
    worked.map(|()| 0)
}

async fn start(operator: &Operator, args: ServeArgs) -> Result<Running> {
    operator.home.prepare().or_infrastructure()?;
    let said = &operator.config.controller;
    let (mut api, retention) = (said.api(&operator.config.limits)?, said.retention()?);
    // A mistake in it is told now, and not to the first who asks for something.
    let _legal = crate::policy_file::grants(&operator.home.config)?;
    let grants = operator.home.config.join(kiln_policy::GRANT_FILE);
    let _used = kiln_controller::api::read_grants(&grants)
        .map_err(|error| CliError::usage(error.to_string()))?;
    api.grants = Some(grants);
    let database = args.database.as_deref().map(database).transpose()?;
    let sharing = sharing(&args)?;
    let tls = tls(&args);
    for issuer in &said.issuers {
        let wrong = |error| CliError::usage(format!("controller.issuers in kiln.toml: {error}"));
        issuer.check().map_err(wrong)?;
    }
    let registry = operator.registry().await?.host;
    let registry_address = args.listen.first().map(|address| match args.names.first() {
        Some(name) => format!("{name}:{}", address.port()),
        None => address.to_string(),
    });
    let config = ServeConfig {
        folder: operator.home.controller(),
        database,
        sharing,
        listen: args.listen,
        tls,
        sockets: ListenConfig {
            plain_is_fine: args.insecure_plain_http,
            ..ListenConfig::default()
        },
        api,
        issuer: args
            .names
            .first()
            .cloned()
            .unwrap_or_else(|| "kiln".to_owned()),
        trusted: said.issuers.clone(),
        registry,
        registry_address,
        pool: PoolName::default_pool(),
        metrics: args.metrics,
        prefix: args.metrics_prefix,
        otlp: args.otlp,
        encrypt_logs: args.encrypt_logs,
        receivers: said.receivers(),
        retention,
        generation: kiln_proto::fleet::GENERATION,
    };
    let ca = authority_file(operator);
    let lock = home_queue::make_room(&config.folder).await?;
    let running = server::start_locked(config, OpenOptions::default(), lock).await;
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

/// What it shares with other controllers of its database.
fn sharing(args: &ServeArgs) -> Result<Sharing> {
    let store = match &args.store {
        None => None,
        Some(url) => {
            let wrong = |error| CliError::usage(format!("--store: {}", chain(&error)));
            let key = bucket_key(args.store_key.as_deref())?;
            let mut target = S3Target::from_url(url, key).map_err(wrong)?;
            target.allow_http = args.store_plain_http;
            target.extra_roots = args.store_ca.as_deref().map(read).transpose()?;
            Some(target)
        }
    };
    Ok(Sharing {
        store,
        advertise: args.advertise.clone(),
        adopt: args.adopt_database,
    })
}

/// Key of a bucket in a file.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    access_key_id: String,
    secret_access_key: String,
    #[serde(default)]
    session_token: Option<String>,
}

/// The bucket's key: of the file, else of the environment, else what the host's instance gives.
fn bucket_key(file: Option<&Path>) -> Result<Option<S3Credentials>> {
    if let Some(path) = file {
        use std::os::unix::fs::MetadataExt as _;
        let mode = std::fs::metadata(path).map(|meta| meta.mode());
        if mode.is_ok_and(|mode| mode & 0o077 != 0) {
            return Err(CliError::usage(format!("{path:?} can be read by others"))
                .hint("chmod 600 it, and think about replacing the key"));
        }
        let text = String::from_utf8_lossy(&read(path)?).into_owned();
        // The file's own words could repeat the key.
        let key: KeyFile = toml::from_str(&text).map_err(|_| {
            CliError::usage(format!("{path:?} is not a key of a bucket"))
                .hint("it holds two lines: access_key_id = \"...\" and secret_access_key = \"...\"")
        })?;
        return Ok(Some(S3Credentials {
            access_key_id: key.access_key_id,
            secret_access_key: key.secret_access_key,
            session_token: key.session_token,
        }));
    }
    let given = |name: &str| environment::var(name).filter(|value| !value.is_empty());
    match (given("AWS_ACCESS_KEY_ID"), given("AWS_SECRET_ACCESS_KEY")) {
        (Some(access_key_id), Some(secret_access_key)) => Ok(Some(S3Credentials {
            access_key_id,
            secret_access_key,
            session_token: given("AWS_SESSION_TOKEN"),
        })),
        (None, None) => Ok(None),
        _ => Err(CliError::usage(
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together: one is missing",
        )),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path)
        .map_err(|error| CliError::usage(format!("could not read {path:?}: {error}")))
}

fn tls(args: &ServeArgs) -> Tls {
    if args.insecure_plain_http {
        return Tls::Plain;
    }
    let mut names = args.names.clone();
    for address in &args.listen {
        if !address.ip().is_unspecified() {
            names.push(address.ip().to_string());
        }
    }
    names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
    match (&args.tls_cert, &args.tls_key) {
        (Some(chain), Some(key)) => Tls::Given {
            files: IdentityFiles {
                chain: chain.clone(),
                key: key.clone(),
            },
            names,
        },
        _ => Tls::Own(names),
    }
}

/// Why a controller did not start, for people.
pub(super) fn refused(error: &StartError) -> CliError {
    let (class, hint) = match error {
        StartError::Taken(_) => (
            FailureClass::Usage,
            Some("stop it, or set KILN_HOME to another directory"),
        ),
        StartError::Shared(SharedError::FileStore { .. }) => (
            FailureClass::Usage,
            Some(
                "stop the other one, start it with --store s3://... and --adopt-database, then this one with the same --store; docs/guides/server.md",
            ),
        ),
        StartError::Shared(SharedError::Bucket(BucketError::Target(_))) => (
            FailureClass::Usage,
            Some(
                "--store-plain-http speaks http:// to a bucket on another host, where others can listen in",
            ),
        ),
        StartError::Shared(SharedError::OtherStore { .. }) => (
            FailureClass::Usage,
            Some("give the same --store as the others"),
        ),
        StartError::Shared(SharedError::OtherKeys(_) | SharedError::NoKeys(_)) => (
            FailureClass::Usage,
            Some(
                "copy the folder controller/keys from another controller's home, or share it, before this one starts",
            ),
        ),
        StartError::Shared(SharedError::InUse(_)) => (
            FailureClass::Usage,
            Some("leave --adopt-database out, or stop that controller"),
        ),
        StartError::Listen(_) | StartError::Names | StartError::Tracer(_) | StartError::Tls(_) => {
            (FailureClass::Usage, None)
        }
        _ => return CliError::infrastructure(error),
    };
    let told = CliError::new(class, chain(error));
    match hint {
        Some(hint) => told.hint(hint),
        None => told,
    }
}

/// Says when nobody elsewhere can check the certificate, because no name of this host is in it.
fn nameless(args: &ServeArgs, screen: Screen) {
    let own = args.tls_cert.is_none() && !args.insecure_plain_http;
    let everywhere = args.listen.iter().any(|to| to.ip().is_unspecified());
    if own && everywhere && args.names.is_empty() {
        screen.note(
            "warning: without --name its certificate is for localhost alone; others need --name HOST, the name they reach it by",
        );
    }
}

/// The certificate of its own authority, for `--ca` of those who ask it from elsewhere.
fn authority_file(operator: &Operator) -> PathBuf {
    operator.home.controller().join("authority.pem")
}

fn tell(running: &Running, scheme: &str, authority: Option<&Path>, screen: Screen) {
    let value = serde_json::json!({
        "event": "serving", "addresses": running.addresses, "socket": running.socket, "authority": authority,
    });
    let trusted = authority.map_or(String::new(), |file| {
        format!(
            "  those who ask it trust {} (--ca), and have a token (`kiln token create`)\n",
            file.shown()
        )
    });
    screen.data(&value, || {
        let addresses: Vec<String> = running
            .addresses
            .iter()
            .map(|address| format!("  {scheme}://{address}\n"))
            .collect();
        format!(
            "serving kiln's queue; Ctrl-C ends it\n{}{trusted}  private socket {}",
            addresses.concat(),
            running.socket.display()
        )
    });
}
