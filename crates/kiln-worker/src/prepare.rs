//! A source on this host becomes a build: planned, every FROM pinned, its digest computed, what it may reach decided.
//!
//! Pure but for reading the folder: no machine, no network.

use std::path::Path;

use kiln_core::job::ImageBuild;
use kiln_core::{AllowRule, FailureClass, ImageRef, NetworkPolicy};
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
    /// Which registries those are.
    pub registries: RegistriesOf<'a>,
}

/// Whose registries a build reaches besides what it was allowed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RegistriesOf<'a> {
    /// Those of its runtimes.
    Runtime,
    /// Those of its runtimes, as far as the policy in its own untrusted commit leaves them.
    RuntimeWithin(&'a NetworkPolicy),
    /// None: a policy names all that it reaches.
    Nobody,
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
    let needed = wishes.registries != RegistriesOf::Nobody && !runtimes.is_empty();
    if site.registries.is_none() && needed {
        let message = "which hosts builds may reach for packages is not known yet";
        return Err(Failure::new(FailureClass::Usage, message)
            .hint("run `kiln setup` once, or `kiln registries discover`"));
    }
    let network = reached(wishes.allow, wishes.registries, site.rules(&runtimes));
    check_lockfiles(&plan, &network, wishes.registries)?;
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

fn reached(
    allow: &NetworkPolicy,
    of: RegistriesOf<'_>,
    registries: Vec<AllowRule>,
) -> NetworkPolicy {
    let registries = match of {
        RegistriesOf::Nobody => return allow.clone(),
        RegistriesOf::Runtime => registries,
        RegistriesOf::RuntimeWithin(within) => {
            let left = NetworkPolicy::from_rules(registries)
                .spelled_out()
                .and(within);
            left.rules().to_vec()
        }
    };
    let all = registries.into_iter().chain(allow.rules().iter().cloned());
    NetworkPolicy::from_rules(all).spelled_out()
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
fn check_lockfiles(
    plan: &Plan,
    network: &NetworkPolicy,
    by: RegistriesOf<'_>,
) -> Result<(), Failure> {
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
    let hint = match by {
        // A flag only narrows a policy.
        RegistriesOf::Nobody => format!(
            "name them in phases.dependencies.network.allow of the policy: {}",
            hosts.join(", ")
        ),
        RegistriesOf::Runtime | RegistriesOf::RuntimeWithin(_) => {
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
    fn the_file_of_an_untrusted_commit_takes_registries_away() {
        let rule = |text: &str| -> AllowRule { text.parse().expect("a rule") };
        let registries = || vec![rule("a.example.org:443"), rule("b.example.org:443")];
        let allow = NetworkPolicy::from_rules([rule("c.example.org:443/tls")]);
        let of = |of| -> Vec<String> {
            let network = reached(&allow, of, registries());
            network.rules().iter().map(ToString::to_string).collect()
        };
        assert_eq!(of(RegistriesOf::Nobody), ["c.example.org:443/tls"]);
        assert_eq!(of(RegistriesOf::Runtime).len(), 3);
        let within = ["b.example.org:443/tls", "evil.example.net:443/tls"];
        let within = NetworkPolicy::from_rules(within.map(rule));
        assert_eq!(
            of(RegistriesOf::RuntimeWithin(&within)),
            ["b.example.org:443/tls", "c.example.org:443/tls"]
        );
        assert_eq!(
            of(RegistriesOf::RuntimeWithin(&NetworkPolicy::Isolated)).len(),
            1
        );
        assert_eq!(
            of(RegistriesOf::RuntimeWithin(&NetworkPolicy::Open)).len(),
            3
        );
        assert_eq!(
            reached(&allow, RegistriesOf::RuntimeWithin(&within), vec![]),
            allow
        );
    }

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
