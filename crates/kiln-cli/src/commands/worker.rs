//! `kiln worker`: this host runs jobs of a controller.

use std::path::PathBuf;
use std::sync::Arc;

use kiln_core::{FailureClass, WorkerId};
use kiln_proto::fleet::{Join, Joined, NO_SECRET};
use kiln_telemetry::otlp::Tracer;
use kiln_worker::fleet::client::{Client, LinkError, REQUEST_TIMEOUT};
use kiln_worker::fleet::daemon::{self, Offer};
use kiln_worker::fleet::http::Target;
use kiln_worker::fleet::identity::{ControllerUrl, Identity, IdentityError};
use kiln_worker::fleet::job::Workshop;
use kiln_worker::fleet::local::LocalJobs;
use kiln_worker::registry::RegistryAccess;
use tokio_util::sync::CancellationToken;

use super::operator::Operator;
use crate::args::WorkerArgs;
use crate::error::{CliError, Result, chain};
use crate::show::Screen;

pub(super) async fn run(args: WorkerArgs, screen: Screen, cancel: CancellationToken) -> Result<u8> {
    let operator = Operator::load()?;
    let folder = operator.home.data.join("worker");
    let known = Identity::open(&folder).map_err(|error| refused(&error))?;
    let worker = match (&args.controller, &args.join) {
        (Some(url), Some(_)) => {
            if let Some(known) = &known {
                return Err(CliError::usage(format!(
                    "this host is worker {} of {} already",
                    known.worker(),
                    known.controller().host
                ))
                .hint(format!(
                    "to leave it, remove {}; joining {url} needs a new token then",
                    folder.display()
                )));
            }
            // Before this host is looked at: a wrong word is said at once.
            let _legal = controller_url(url)?;
            own_name(args.name.as_deref())?
        }
        _ => match &known {
            Some(known) => known.worker(),
            None => {
                return Err(CliError::usage("this host has not joined a controller")
                    .hint("give --controller URL and --join TOKEN once"));
            }
        },
    };
    tell_other_guest(&operator, screen);
    let registry = operator.registry().await?;
    let nowhere = Target::Socket(PathBuf::new());
    let shop = workshop(&operator, registry, nowhere, worker.clone()).await?;
    let facts = daemon::facts(&shop, args.machines);
    let identity = match (known, args.controller, args.join) {
        (None, Some(url), Some(token)) => {
            let joined = Identity::join(
                &folder,
                controller_url(&url)?,
                &token,
                worker,
                facts.clone(),
            )
            .await;
            joined.map_err(|error| refused(&error))?
        }
        (Some(known), _, _) => known,
        (None, _, _) => return Err(CliError::usage("this host has not joined a controller")),
    };
    let target = identity.target().map_err(|error| refused(&error))?;
    let client = Client::new(target, identity.worker());
    if identity.has_expired() {
        let renewed = identity.renew(&client).await;
        renewed.map_err(|error| refused(&error))?;
    }
    let shop = Arc::new(Workshop {
        client: client.clone(),
        authority: Some(identity.authority_pem().map_err(|error| refused(&error))?),
        tracer: tracer(args.otlp.as_deref())?,
        ..shop
    });
    let controller = identity.controller();
    tell(
        &identity.worker(),
        &format!("https://{}:{}", controller.host, controller.port),
        screen,
    );
    let renewing = identity.keep_renewed(&client, &cancel);
    let offer = Offer {
        facts,
        takes_jobs: true,
        own: false,
    };
    let served = tokio::select! {
        served = daemon::serve(shop, offer, cancel.clone()) => served,
        () = renewing => Ok(()),
    };
    served.map_err(|ended| ended_error(&ended)).map(|()| 0)
}

/// How a worker beside a controller is set up.
pub(super) struct Beside<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// Most machines at a time.
    pub(super) machines: u32,
    /// Collector of spans.
    pub(super) otlp: Option<&'a str>,
}

/// A worker beside a controller of the same home, over its private socket, until `cancel`.
///
/// # Errors
/// When this host is not set up, or the controller refuses.
pub(super) async fn beside(
    operator: &Operator,
    target: Target,
    own: Beside<'_>,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<()> {
    tell_other_guest(operator, screen);
    let worker = own_name(Some(own.name))?;
    let registry = operator.registry().await?;
    let shop = Arc::new(Workshop {
        tracer: tracer(own.otlp)?,
        ..workshop(operator, registry, target, worker.clone()).await?
    });
    let facts = daemon::facts(&shop, own.machines);
    let join = Join {
        worker: worker.clone(),
        token: String::new(),
        csr: String::new(),
        labels: std::collections::BTreeMap::new(),
        facts: facts.clone(),
    };
    let joined = shop
        .client
        .call::<_, Joined>("/worker/v1/join", None, &join, REQUEST_TIMEOUT);
    joined.await.map_err(|error| link(&error))?;
    tell(&worker, "the controller of this home", screen);
    let offer = Offer {
        facts,
        takes_jobs: true,
        own: false,
    };
    let served = daemon::serve(shop, offer, cancel.clone()).await;
    served.map_err(|ended| ended_error(&ended))
}

/// After an update: jobs that need what is new would fail on this host, one after another.
fn tell_other_guest(operator: &Operator, screen: Screen) {
    if super::setup::is_of_another_guest(&operator.home) {
        screen.note(
            "warning: the machine image has another guest than this kiln, and may fail at what is new: run `kiln setup`",
        );
    }
}

/// What jobs are run with on this host.
///
/// # Errors
/// When this host is not set up.
pub(super) async fn workshop(
    operator: &Operator,
    registry: RegistryAccess,
    target: Target,
    worker: WorkerId,
) -> Result<Workshop> {
    let host = operator.host().await?;
    Ok(Workshop {
        spool: host.home.cache.join("spool"),
        host,
        registry,
        site: operator.site()?,
        client: Client::new(target, worker),
        local: LocalJobs::default(),
        authority: None,
        tracer: Tracer::off(),
        watch: super::kept::watch::of_worker,
    })
}

/// Where a worker's spans go.
///
/// # Errors
/// When the address is none.
pub(super) fn tracer(url: Option<&str>) -> Result<Tracer> {
    let Some(url) = url else {
        return Ok(Tracer::off());
    };
    // A worker has no metrics of its own: what is dropped is in its log.
    let dropped = Arc::new(|spans| tracing::warn!(spans, "spans were dropped"));
    let started = Tracer::start(url, "kiln-worker", dropped);
    started.map_err(|error| CliError::usage(format!("--otlp: {error}")))
}

fn controller_url(text: &str) -> Result<ControllerUrl> {
    text.parse().map_err(|error: IdentityError| refused(&error))
}

fn own_name(name: Option<&str>) -> Result<WorkerId> {
    let given = name.map(str::to_owned);
    let text = given.unwrap_or_else(|| {
        let host = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .to_lowercase();
        let short = host.split('.').next().unwrap_or_default();
        let legal = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        short
            .chars()
            .map(legal)
            .collect::<String>()
            .trim_matches('-')
            .to_owned()
    });
    text.parse().map_err(|error| {
        CliError::usage(format!("{error}")).hint("give the worker a name with --name")
    })
}

fn tell(worker: &WorkerId, controller: &str, screen: Screen) {
    let value =
        serde_json::json!({ "event": "working", "worker": worker, "controller": controller });
    screen.data(&value, || {
        format!("worker {worker} takes jobs of {controller}; Ctrl-C ends it")
    });
}

fn refused(error: &IdentityError) -> CliError {
    match error {
        IdentityError::Url(_) | IdentityError::Token => CliError::usage(error.to_string()),
        IdentityError::Link(error) => link(error),
        _ => CliError::new(FailureClass::Infrastructure, chain(error)),
    }
}

/// A controller that does not do what a worker asks.
pub(super) fn link(error: &LinkError) -> CliError {
    let class = match error {
        // What was asked makes no sense, or names what is not there.
        LinkError::Refused { status: 400, .. } => FailureClass::Usage,
        LinkError::Refused { .. } => FailureClass::Policy,
        _ => FailureClass::Infrastructure,
    };
    CliError::new(class, chain(error))
}

/// What this home's own controller says of a job: nobody on this host thinks of it as somebody else.
pub(super) fn own(error: &LinkError) -> CliError {
    let LinkError::Refused { code, message, .. } = error else {
        return link(error);
    };
    let refused = CliError {
        message: message.clone(),
        ..link(error)
    };
    // "there is no secret NAME ..."
    let name = message
        .split(' ')
        .skip_while(|word| *word != "secret")
        .nth(1);
    match name {
        Some(name) if code == NO_SECRET => refused.hint(format!(
            "`kiln secret set {name}` puts it there, from standard input"
        )),
        _ => refused,
    }
}

fn ended_error(ended: &daemon::Ended) -> CliError {
    CliError::new(FailureClass::Policy, ended.to_string())
        .hint("join again with a new token, if that was not meant")
}
