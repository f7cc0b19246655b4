//! The public HTTP interface: `/v1`, and hypeman's build routes. Everything a user or service asks of a controller comes in here.
//!
//! A handler proves who calls ([`caller`]), asks whether they may, checks what they say ([`ask`]), and says what came of it
//! ([`view`], [`problem`]). OpenAPI is generated from the handlers. Read next: [`ports`] (what it needs), [`listen`] (the sockets).

mod again;
mod artifacts;
mod ask;
mod audit;
mod builds;
pub(crate) mod caller;
mod cursor;
mod docs;
mod events;
mod extract;
pub(crate) mod health;
mod holds;
mod hypeman;
mod images;
mod incidents;
mod job_ways;
mod jobs;
pub(crate) mod limits;
pub mod listen;
mod logs;
mod machine_ways;
mod machines;
mod policy;
mod ports;
mod problem;
mod queues;
mod retention;
mod runs;
mod scheduling;
mod secrets;
mod sessions;
pub(crate) mod shield;
mod tenants;
mod tokens;
mod trust;
mod upload;
mod view;
mod webhooks;
mod workers;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use kiln_db::Database;
use tokio::sync::{Semaphore, SemaphorePermit};
use utoipa::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use again::command_line;
pub use ask::{AttendAsk, BuildAsk, Common, KeepAsk, RunAsk};
pub use audit::AuditView;
pub use holds::HoldView;
pub use images::ImageView;
pub use incidents::IncidentView;
pub use limits::{ApiConfig, KeptBounds};
pub use listen::{ListenConfig, ListenError, Sockets};
pub use machines::{EndedView, MachineView, StatsView};
pub(crate) use policy::policy_notes;
pub use policy::{GrantsError, PolicyAsk, read_grants};
pub use ports::{Backend, LogPiece, Pieces, SecretsUnheld, SourceRefused, Trouble};
pub use problem::{Fault, Problem, ProblemBody};
pub use retention::{AgingView, RetentionPlanView, RetentionView};
pub use scheduling::SchedulerView;
pub use secrets::{ScopeView, SecretView};
pub use tokens::TokenClaims;
pub use view::{
    ArtifactView, AttemptView, JobLine, JobView, LimitsView, List, OutcomeView, QueueView,
    RoomView, TenantView, TokenView, UsageView, WorkerView,
};
pub use webhooks::{DeliveryView, WebhookView};

use crate::access::Access;
use limits::{Rates, Slots};

/// Followers that look into the database at the same time: fewer than it has connections.
const LOOKS_MAX: usize = 2;
/// Audit rows about strangers per second, in the long run.
const STRANGER_ROWS_PER_S: u32 = 5;
/// And at once.
const STRANGER_ROWS_BURST: u32 = 100;

/// State of the public API.
pub(crate) struct Api {
    backend: Arc<dyn Backend>,
    pub(crate) config: ApiConfig,
    pub(crate) rates: Rates,
    pub(crate) strangers: Rates,
    pub(crate) open: Arc<Slots>,
    pub(crate) uploads: Arc<Slots>,
    pub(crate) followers: Arc<Slots>,
    pub(crate) machine_ways: Arc<Slots>,
    /// Whether the operator's file of grants was there when it was last looked for.
    pub(crate) grants_there: AtomicBool,
    looks: Semaphore,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Api {
    fn new(backend: Arc<dyn Backend>, config: ApiConfig) -> Arc<Self> {
        Arc::new(Self {
            rates: Rates::new(config.requests_per_s, config.requests_burst),
            strangers: Rates::new(STRANGER_ROWS_PER_S, STRANGER_ROWS_BURST),
            open: Slots::new(config.open_per_token),
            uploads: Slots::new(config.uploads_per_tenant),
            followers: Slots::new(config.followers_per_tenant),
            machine_ways: Slots::new(config.kept.ways_max),
            looks: Semaphore::new(LOOKS_MAX),
            grants_there: AtomicBool::new(
                config
                    .grants
                    .as_ref()
                    .is_some_and(|path| path.symlink_metadata().is_ok()),
            ),
            backend,
            config,
        })
    }

    /// A follower's turn to look into the database. They are many and wake at once: who asks for something must not wait behind them all.
    pub(crate) async fn look(&self) -> Option<SemaphorePermit<'_>> {
        self.looks.acquire().await.ok()
    }

    pub(crate) fn db(&self) -> &Database {
        self.backend.db()
    }

    pub(crate) fn access(&self) -> &Access {
        self.backend.access()
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Of this host's clock: for tokens, never for leases.
    #[expect(clippy::unused_self, reason = "a test may give it another clock")]
    pub(crate) fn now_ms(&self) -> u64 {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| {
                u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
            })
    }
}

/// The document's own words; paths and schemas come from the handlers.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "kiln",
        description = "Builds and runs in fresh microVMs. Every answer that is no success is an RFC 9457 problem with a stable `code`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    security(("token" = [])),
)]
struct Document;

fn handlers() -> OpenApiRouter<Arc<Api>> {
    let mut document = Document::openapi();
    let components = document.components.get_or_insert_default();
    components.add_security_scheme(
        "token",
        SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)),
    );
    OpenApiRouter::with_openapi(document)
        .routes(routes!(builds::create))
        .routes(routes!(runs::create))
        .routes(routes!(jobs::list))
        .routes(routes!(jobs::show, jobs::cancel))
        .routes(routes!(jobs::retry))
        .routes(routes!(incidents::end))
        .routes(routes!(events::follow))
        .routes(routes!(logs::read))
        .routes(routes!(machines::list))
        .routes(routes!(machines::show, machines::remove))
        .routes(routes!(machines::stats))
        .routes(routes!(machines::console))
        .routes(routes!(machines::incident))
        .routes(routes!(machine_ways::open))
        .routes(routes!(job_ways::open))
        .routes(routes!(artifacts::list))
        .routes(routes!(artifacts::fetch))
        .routes(routes!(workers::list))
        .routes(routes!(workers::show, workers::remove))
        .routes(routes!(workers::change))
        .routes(routes!(queues::list, queues::create))
        .routes(routes!(queues::change))
        .routes(routes!(tenants::list, tenants::create))
        .routes(routes!(tenants::change))
        .routes(routes!(tenants::usage))
        .routes(routes!(retention::show, retention::set))
        .routes(routes!(retention::plan))
        .routes(routes!(holds::list))
        .routes(routes!(holds::set, holds::clear))
        .routes(routes!(scheduling::show, scheduling::set))
        .routes(routes!(tokens::list, tokens::create))
        .routes(routes!(tokens::create_join))
        .routes(routes!(tokens::revoke))
        .routes(routes!(sessions::exchange))
        .routes(routes!(sessions::who_am_i))
        .routes(routes!(webhooks::list, webhooks::create))
        .routes(routes!(webhooks::show, webhooks::change, webhooks::remove))
        .routes(routes!(webhooks::rotate))
        .routes(routes!(webhooks::notify_secret))
        .routes(routes!(webhooks::deliveries))
        .routes(routes!(webhooks::replay))
        .routes(routes!(audit::list))
        .routes(routes!(images::list))
        .routes(routes!(images::remove))
        .routes(routes!(secrets::list))
        .routes(routes!(secrets::show, secrets::set, secrets::remove))
        .routes(routes!(secrets::rotate))
        .routes(routes!(secrets::scope))
        .routes(routes!(secrets::accesses))
        .routes(routes!(hypeman::create, hypeman::list))
        .routes(routes!(hypeman::show, hypeman::cancel))
        .routes(routes!(hypeman::events))
}

/// The OpenAPI 3.1 document of the public API.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = handlers().into_openapi();
    name_operations(&mut document);
    document
}

/// Gives every operation a name of its own, for programs that are generated from the document: `get_v1_jobs_id`.
fn name_operations(document: &mut utoipa::openapi::OpenApi) {
    for (path, item) in &mut document.paths.paths {
        let words: Vec<&str> = path
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|word| !word.is_empty())
            .collect();
        let operations = [
            ("get", &mut item.get),
            ("post", &mut item.post),
            ("put", &mut item.put),
            ("delete", &mut item.delete),
        ];
        for (method, operation) in operations {
            if let Some(operation) = operation {
                operation.operation_id = Some(format!("{method}_{}", words.join("_")));
            }
        }
    }
}

/// Every public route, behind its shields. Serve it with [`listen`], which says who is at the other end of a connection.
pub fn router(backend: Arc<dyn Backend>, config: ApiConfig) -> Router {
    let api = Api::new(backend, config);
    let (router, mut document) = handlers().split_for_parts();
    name_operations(&mut document);
    let router = router
        .merge(docs::routes(&document))
        .route("/.well-known/jwks.json", axum::routing::get(sessions::jwks))
        .fallback(shield::nothing_here)
        .method_not_allowed_fallback(shield::other_methods)
        .with_state(Arc::clone(&api))
        .merge(health::router(api.db().clone()));
    shield::around(router, &api)
}
