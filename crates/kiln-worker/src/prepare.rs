//! A source on this host becomes a build: planned, every FROM pinned, its digest computed, what it may reach decided.
//!
//! Pure but for reading the folder: no machine, no network.

use std::path::Path;

use kiln_core::job::ImageBuild;
use kiln_core::{FailureClass, ImageRef, NetworkPolicy};
use kiln_image::context::{self, ContextError, Tree};
use kiln_image::plan::{Options, Plan, PlanError};
use kiln_network::registries::Runtime;

use crate::failure::Failure;
use crate::orders::chain;
use crate::site::Site;

/// Places of refused hosts that a message names.
const MENTIONS_MAX: usize = 10;

/// A build that is ready to be sent to a machine.
#[derive(Debug)]
pub struct Prepared {
    /// What is built, exactly.
    pub build: ImageBuild,
    /// What it may reach.
    pub network: NetworkPolicy,
    /// Runtimes whose registries it uses.
    pub runtimes: Vec<Runtime>,
    /// The files behind the source's digest.
    pub tree: Tree,
}

/// What is asked for besides the folder.
#[derive(Debug)]
pub struct Wishes<'a> {
    /// Dockerfile, stage and build arguments.
    pub options: Options,
    /// Names the image gets, within the tenant.
    pub tags: Vec<ImageRef>,
    /// Names of secrets it may ask for.
    pub secrets: Vec<String>,
    /// Neither use nor feed the cache.
    pub no_cache: bool,
    /// What it may reach besides its runtimes' registries.
    pub allow: &'a NetworkPolicy,
    /// It reaches nothing besides `allow`: not those registries either.
    pub only: bool,
}

/// Plans the folder and prepares its build.
///
/// # Errors
/// Usage for a folder that cannot be planned or sent, policy for bases and hosts that are not admitted.
pub fn prepare(dir: &Path, wishes: Wishes<'_>, site: &Site) -> Result<Prepared, Failure> {
    let plan = kiln_image::plan::plan(dir, &wishes.options, &site.bases)
        .map_err(|error| plan_failure(&error))?;
    if let Some(base) = plan.unbaked().first() {
        let message = format!("the base {} is not there yet", base.written);
        return Err(Failure::new(FailureClass::Usage, message).hint("run `kiln setup` once"));
    }
    let extra: Vec<&str> = plan.extra_ignores.iter().map(String::as_str).collect();
    let tree = Tree::open(
        &dir.join(&plan.root),
        plan.dockerfile_path.as_deref(),
        &extra,
        context::Limits::default(),
    )
    .map_err(|error| source_failure(&error))?;
    let packed = context::digest(&tree).map_err(|error| source_failure(&error))?;
    let runtimes = runtimes(&plan);
    if site.registries.is_none() && !runtimes.is_empty() && !wishes.only {
        let message = "which hosts builds may reach for packages is not known yet";
        return Err(Failure::new(FailureClass::Usage, message)
            .hint("run `kiln setup` once, or `kiln registries discover`"));
    }
    let network = match wishes.only {
        true => wishes.allow.clone(),
        false => {
            let rules = site.rules(&runtimes).into_iter();
            NetworkPolicy::from_rules(rules.chain(wishes.allow.rules().iter().cloned()))
                .spelled_out()
        }
    };
    check_lockfiles(&plan, &network, wishes.only)?;
    let bases = plan.bases.iter();
    let build = ImageBuild {
        source: packed.digest,
        dockerfile: plan.dockerfile.clone(),
        target: wishes.options.target,
        build_args: wishes.options.build_args,
        secrets: wishes.secrets,
        bases: bases
            .map(|base| (base.written.clone(), base.reference.clone()))
            .collect(),
        tags: wishes.tags,
        no_cache: wishes.no_cache,
    };
    Ok(Prepared {
        build,
        network,
        runtimes,
        tree,
    })
}

fn runtimes(plan: &Plan) -> Vec<Runtime> {
    Runtime::ALL
        .into_iter()
        .filter(|runtime| plan.registries.iter().any(|name| name == runtime.name()))
        .collect()
}

/// Why a folder has no plan.
#[must_use]
pub fn plan_failure(error: &PlanError) -> Failure {
    let failure = Failure::new(error.class(), chain(error));
    match error.hint() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// Why a folder cannot be the source of a build.
pub(crate) fn source_failure(error: &ContextError) -> Failure {
    Failure {
        hint: error.hint(),
        ..Failure::new(error.class(), chain(error))
    }
}

/// Why a folder cannot be what a command works on.
pub(crate) fn folder_failure(error: &ContextError) -> Failure {
    Failure {
        hint: error.hint_of_run(),
        ..source_failure(error)
    }
}

/// A lockfile that names hosts the build may not reach is an error that lists them, before anything starts.
fn check_lockfiles(plan: &Plan, network: &NetworkPolicy, by_policy: bool) -> Result<(), Failure> {
    let refused: Vec<_> = plan
        .hosts_named
        .iter()
        .filter(|mention| !network.knows_host(&mention.host))
        .collect();
    if refused.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = refused
        .iter()
        .take(MENTIONS_MAX)
        .map(|mention| format!("  {}:{} names {}", mention.file, mention.line, mention.host))
        .collect();
    let mut hosts: Vec<&str> = refused
        .iter()
        .map(|mention| mention.host.as_str())
        .collect();
    hosts.sort_unstable();
    hosts.dedup();
    let hint = match by_policy {
        // A flag only narrows a policy.
        true => format!(
            "name them in phases.dependencies.network.allow of the policy: {}",
            hosts.join(", ")
        ),
        false => {
            let flags: Vec<String> = hosts.iter().map(|host| format!("--allow {host}")).collect();
            format!("admit them with {}", flags.join(" "))
        }
    };
    let message = format!(
        "lockfiles name hosts that this build may not reach:\n{}",
        lines.join("\n")
    );
    Err(Failure::new(FailureClass::Policy, message).hint(hint))
}

/// A name of an image from a folder's or repository's name, below the tenant's tree.
#[must_use]
pub fn image_of(tenant: &kiln_core::TenantName, folder: &str) -> ImageRef {
    let mut name = String::new();
    for c in folder.to_lowercase().chars() {
        if c.is_ascii_lowercase() || c.is_ascii_digit() {
            name.push(c);
        } else if !name.is_empty() && !name.ends_with('-') {
            name.push('-');
        }
    }
    let name = name.trim_end_matches('-');
    let name = if name.is_empty() { "app" } else { name };
    let name: String = name.chars().take(NAME_CHARS_MAX).collect();
    ImageRef {
        registry: None,
        repository: format!("t/{tenant}/{}", name.trim_end_matches('-')),
        tag: Some("latest".to_owned()),
        digest: None,
    }
}

/// A name that somebody gave an image, below the tenant's tree; `t/TENANT/NAME` of their own is fine, too.
///
/// # Errors
/// Usage for names of other registries or with a digest, policy for another tenant's or shared ones.
pub fn in_tenant(tenant: &kiln_core::TenantName, image: &ImageRef) -> Result<ImageRef, Failure> {
    if image.registry.is_some() || image.digest.is_some() {
        let message = format!("the image name {image} is not a name within the tenant");
        return Err(Failure::new(FailureClass::Usage, message).hint("write for example shop:1.4"));
    }
    let tree = format!("t/{tenant}/");
    let foreign = ["t/", "shared/"]
        .iter()
        .any(|tree| image.repository.starts_with(tree));
    let repository = match image.repository.starts_with(&tree) {
        true => image.repository.clone(),
        false if foreign => {
            let message = format!("the image name {image} is not below {tree}");
            return Err(Failure::new(FailureClass::Policy, message));
        }
        false => format!("{tree}{}", image.repository),
    };
    let tag = image.tag.clone().or_else(|| Some("latest".to_owned()));
    Ok(ImageRef {
        registry: None,
        repository,
        tag,
        digest: None,
    })
}

/// Longest image name made of a folder's name.
const NAME_CHARS_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_stay_below_their_tenant() {
        let tenant: kiln_core::TenantName = "acme".parse().expect("a name");
        let named = |text: &str| in_tenant(&tenant, &text.parse().expect("a reference"));
        for (given, full) in [
            ("shop", "t/acme/shop:latest"),
            ("shop:v1", "t/acme/shop:v1"),
            ("web/shop", "t/acme/web/shop:latest"),
            ("t/acme/shop:v2", "t/acme/shop:v2"),
        ] {
            assert_eq!(named(given).expect(given).to_string(), full);
        }
        for (bad, class) in [
            ("t/other/shop", FailureClass::Policy),
            ("shared/node:20-build", FailureClass::Policy),
            ("registry.example.org/shop", FailureClass::Usage),
        ] {
            assert_eq!(named(bad).expect_err(bad).class, class, "{bad}");
        }
    }
}
