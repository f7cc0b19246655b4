//! `kiln registry`: the built-in registry as the user's own tools see it.

mod credentials;
mod port;

use std::net::SocketAddr;
use std::time::Duration;

use kiln_core::{ByteSize, FailureClass, ImageRef, TenantName};
use kiln_store::host::{HostConfig, HostRegistry, LoopbackState};
use kiln_store::registry::{ErrorKind, LoopbackConfig, Reference, RepoName, UserAuthority};
use serde::Serialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::operator::Operator;
use super::reference;
use super::table::{Table, counted, left, right, wide};
use crate::args::RegistryCommand;
use crate::environment;
use crate::error::{CliError, OrInfrastructure as _, Result};
use crate::show::{Screen, ShownPath as _};

pub(super) use credentials::AuthFiles;
pub(super) use port::holder as port_holder;

/// How often a process that waits for the registry's owner to end looks again.
const TAKE_OVER_POLL: Duration = Duration::from_millis(500);

pub(super) async fn run(
    verb: RegistryCommand,
    screen: Screen,
    cancel: CancellationToken,
) -> Result<u8> {
    let operator = Operator::load()?;
    match verb {
        RegistryCommand::Serve {
            listen,
            anonymous_pull,
        } => {
            let anonymous = anonymous_pull || operator.config.registry.anonymous_pull;
            serve(&operator, listen, anonymous, screen, &cancel).await?;
        }
        RegistryCommand::Login { address } => login(&operator, address, screen).await?,
        RegistryCommand::Logout => logout(&operator, screen).await?,
        RegistryCommand::List { all } => list(&operator, all, screen).await?,
        RegistryCommand::Rm { references } => {
            let registry = operator.registry().await?;
            for reference in &references {
                remove(&registry.host, reference, screen).await?;
            }
        }
        RegistryCommand::Gc { grace } => {
            let collected = operator
                .registry()
                .await?
                .host
                .gc(grace)
                .await
                .or_infrastructure()?;
            screen.data(&collected, || {
                match collected.contents + collected.links + collected.uploads {
                    0 => "nothing to remove".to_owned(),
                    _ => format!(
                        "removed {}, {} and {}, {} freed",
                        counted(collected.contents, "blob"),
                        counted(collected.links, "link"),
                        counted(collected.uploads, "unfinished upload"),
                        ByteSize(collected.bytes)
                    ),
                }
            });
        }
    }
    Ok(0)
}

/// The loopback door of this host's user.
fn door(address: SocketAddr, anonymous_pull: bool) -> LoopbackConfig {
    let own = RepoName::tenant_tree(&TenantName::local());
    let trees = vec![own.as_str().to_owned(), "shared".to_owned()];
    LoopbackConfig {
        address,
        user: UserAuthority::embedded("local", &TenantName::local()),
        anonymous_pull: if anonymous_pull { trees } else { Vec::new() },
    }
}

async fn serve(
    operator: &Operator,
    listen: SocketAddr,
    anonymous: bool,
    screen: Screen,
    cancel: &CancellationToken,
) -> Result<()> {
    if !listen.ip().is_loopback() {
        return Err(CliError::usage(format!(
            "--listen {listen}: only loopback addresses, because the registry speaks plain HTTP"
        ))
        .hint("127.0.0.1:5080 is the default"));
    }
    operator.home.prepare().or_infrastructure()?;
    let config = HostConfig {
        loopback: Some(door(listen, anonymous)),
        ..HostConfig::default()
    };
    let registry = HostRegistry::open_or_attach(&operator.home.registry(), config)
        .await
        .or_infrastructure()?;
    let mut told = None;
    loop {
        let about = registry.about().await.or_infrastructure()?;
        let waits = match (registry.is_owner().await, about.loopback) {
            (true, LoopbackState::Open(address)) => {
                tell_served(address, anonymous, screen);
                break;
            }
            (true, LoopbackState::Failed(why)) => return Err(not_opened(listen, &why)),
            (true, LoopbackState::Off) => {
                return Err(not_opened(listen, "the door was not asked for"));
            }
            (false, LoopbackState::Open(address)) => (
                about.pid,
                format!(
                    "kiln process {} serves the registry at {address} already; this one waits, and takes over at {listen} when it ends; Ctrl-C ends the waiting",
                    about.pid
                ),
            ),
            (false, _) => (
                about.pid,
                format!(
                    "kiln process {} uses the registry without serving it; it is served at {listen} when that one ends; Ctrl-C ends the waiting",
                    about.pid
                ),
            ),
        };
        if told.as_ref() != Some(&waits) {
            let (owner, why) = &waits;
            let value = json!({ "event": "waiting", "owner": owner, "why": why });
            screen.data(&value, || why.clone());
            told = Some(waits);
        }
        tokio::select! {
            () = tokio::time::sleep(TAKE_OVER_POLL) => {}
            () = cancel.cancelled() => return Ok(()),
        }
    }
    cancel.cancelled().await;
    Ok(())
}

fn not_opened(listen: SocketAddr, why: &str) -> CliError {
    let error = CliError::new(
        FailureClass::Infrastructure,
        match port_holder(listen) {
            Some(holder) => format!("port {} is taken by {holder}", listen.port()),
            None => why.to_owned(),
        },
    );
    error.hint(
        "choose another with --listen 127.0.0.1:PORT, and log in again with the same --address",
    )
}

fn tell_served(address: SocketAddr, anonymous: bool, screen: Screen) {
    let value = json!({ "event": "serving", "address": address, "anonymous_pull": anonymous });
    screen.data(&value, || {
        let login = match anonymous {
            true => "anybody on this host may pull; to push: ",
            false => "log in once: ",
        };
        format!(
            "serving kiln's registry at {address}; Ctrl-C ends it\n  {login}kiln registry login --address {address}\n  \
             docker pull {address}/t/local/NAME:TAG\n  skopeo inspect --tls-verify=false docker://{address}/t/local/NAME:TAG",
        )
    });
}

fn auth_files() -> Result<AuthFiles> {
    AuthFiles::find(&environment::var)
        .ok_or_else(|| CliError::usage("HOME is not set, so there is no place for credentials"))
}

async fn login(operator: &Operator, address: SocketAddr, screen: Screen) -> Result<()> {
    let registry = operator.registry().await?;
    let (user, secret) = registry.host.credentials().or_infrastructure()?;
    let written = auth_files()?.login(address, user, secret.reveal())?;
    let value = json!({ "address": address, "user": user, "files": written.files });
    screen.data(&value, || {
        let files: Vec<String> = written
            .files
            .iter()
            .map(|path| format!("  {}\n", path.shown()))
            .collect();
        format!("wrote the token for {address} into\n{}", files.concat())
    });
    for warning in written.warnings {
        screen.note(&format!("warning: {warning}"));
    }
    Ok(())
}

async fn logout(operator: &Operator, screen: Screen) -> Result<()> {
    let mut files = Vec::new();
    if operator.home.registry().is_dir() {
        let (user, secret) = operator
            .registry()
            .await?
            .host
            .credentials()
            .or_infrastructure()?;
        files = auth_files()?.logout(user, secret.reveal())?;
    }
    screen.data(&json!({ "files": files }), || match files.as_slice() {
        [] => "no token of this registry was found".to_owned(),
        files => files
            .iter()
            .map(|path| format!("removed the token from {}\n", path.shown()))
            .collect(),
    });
    Ok(())
}

#[derive(Serialize)]
struct Image {
    repository: RepoName,
    tag: String,
    digest: kiln_core::Digest,
    bytes: u64,
}

async fn list(operator: &Operator, all: bool, screen: Screen) -> Result<()> {
    let mut images = Vec::new();
    if operator.home.registry().is_dir() {
        let host = operator.registry().await?.host;
        for repository in host.list_repositories(None).await.or_infrastructure()? {
            if all || !repository.is_under("quarantine") {
                images.extend(images_of(&host, repository, screen).await?);
            }
        }
    }
    if images.is_empty() {
        screen.note("no images yet; try `kiln build`");
    } else if screen.json() {
        for image in &images {
            screen.data(image, String::new);
        }
    } else {
        screen.text(&table(&images, screen.width()));
    }
    Ok(())
}

async fn images_of(
    host: &HostRegistry,
    repository: RepoName,
    screen: Screen,
) -> Result<Vec<Image>> {
    let mut images = Vec::new();
    let tags = match host.list_tags(&repository).await {
        Ok(tags) => tags,
        // Removed in the meantime.
        Err(error) if error.is_not_found() => Vec::new(),
        Err(error) => return Err(CliError::infrastructure(&error)),
    };
    for tag in tags {
        match host
            .get_manifest(&repository, &Reference::Tag(tag.clone()))
            .await
        {
            Ok(stored) => {
                let (digest, bytes) = (stored.digest, bytes_of(&stored.bytes));
                images.push(Image {
                    repository: repository.clone(),
                    tag,
                    digest,
                    bytes,
                });
            }
            Err(error) if error.is_not_found() => {}
            // The others are still to be seen.
            Err(error) if error.kind() == ErrorKind::Corrupt => screen.note(&format!(
                "{repository}:{tag} is damaged: build or push it again, or remove it; `kiln doctor --scrub` reads the rest"
            )),
            Err(error) => return Err(CliError::infrastructure(&error)),
        }
    }
    Ok(images)
}

/// Compressed bytes an image manifest names: config and layers.
fn bytes_of(manifest: &[u8]) -> u64 {
    let manifest: Value = serde_json::from_slice(manifest).unwrap_or_default();
    let layers = manifest["layers"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let sizes = layers
        .iter()
        .chain([&manifest["config"]])
        .filter_map(|part| part["size"].as_u64());
    sizes.fold(0, u64::saturating_add)
}

fn table(images: &[Image], width: Option<usize>) -> String {
    let mut table = Table::new(&[
        wide("REPOSITORY"),
        left("TAG"),
        left("DIGEST"),
        right("SIZE"),
    ])
    .within(width);
    for image in images {
        let tag = image.tag.chars().take(24).collect();
        table.row([
            image.repository.to_string(),
            tag,
            image.digest.short(12),
            ByteSize(image.bytes).to_string(),
        ]);
    }
    table.render()
}

/// Removes a tag, and the image with its last tag.
async fn remove(host: &HostRegistry, wanted: &ImageRef, screen: Screen) -> Result<()> {
    let full = reference::existing(wanted)?;
    if full.repository.starts_with("shared/") {
        return Err(CliError::new(
            FailureClass::Policy,
            format!("{full} is one of kiln's bases"),
        )
        .hint("`kiln bases bake` replaces them; `kiln uninstall` removes everything"));
    }
    let repo: RepoName = full.repository.parse().or_infrastructure()?;
    let missing = |error: kiln_store::host::HostError| match error.is_not_found() {
        true => CliError::usage(format!("there is no image {full} here"))
            .hint("`kiln registry list` shows what there is"),
        false => CliError::infrastructure(&error),
    };
    let named = match (&full.digest, &full.tag) {
        (Some(digest), _) => Reference::Digest(*digest),
        (None, tag) => tag
            .as_deref()
            .unwrap_or("latest")
            .parse()
            .or_infrastructure()?,
    };
    let digest = host.resolve(&repo, &named).await.map_err(missing)?;
    let mut others = 0;
    for tag in host.list_tags(&repo).await.map_err(missing)? {
        let tag = Reference::Tag(tag);
        let same = tag != named
            && host
                .resolve(&repo, &tag)
                .await
                .is_ok_and(|other| other == digest);
        others += usize::from(same);
    }
    let whole = others == 0 || matches!(named, Reference::Digest(_));
    let gone = if whole {
        Reference::Digest(digest)
    } else {
        named
    };
    host.delete(&repo, &gone).await.map_err(missing)?;
    let value = json!({ "removed": full, "digest": digest, "image": whole });
    screen.data(&value, || match whole {
        true => format!("removed {full}; `kiln registry gc` frees its bytes"),
        false => format!("removed the tag {full}; the image has {others} more"),
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::Digest;

    #[test]
    fn the_list_fits() {
        let image = Image {
            repository: "t/local/node-express".parse().expect("name"),
            tag: "latest".to_owned(),
            digest: Digest::of(b"m"),
            bytes: 61 << 20,
        };
        let text = table(&[image], Some(80));
        let digest = Digest::of(b"m").short(12);
        assert_eq!(
            text.lines().nth(1),
            Some(format!("t/local/node-express  latest  {digest}  61.0 MiB").as_str())
        );
    }

    #[test]
    fn sizes_come_from_the_manifest() {
        let manifest =
            json!({"config": {"size": 10}, "layers": [{"size": 5}, {"size": 7}, {}]}).to_string();
        assert_eq!(bytes_of(manifest.as_bytes()), 22);
        assert_eq!(bytes_of(b"junk"), 0);
    }

    #[tokio::test]
    async fn a_taken_port_is_named_with_its_holder() {
        let dir = tempfile::tempdir().expect("temp dir");
        let stranger = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = stranger.local_addr().expect("address");
        let operator = Operator {
            home: kiln_worker::home::Home::below(dir.path()),
            config: crate::config::Config::default(),
            registries: None,
        };
        let cancel = CancellationToken::new();
        let error = serve(&operator, address, false, Screen::new(true), &cancel)
            .await
            .expect_err("taken");
        let own = format!("port {} is taken by", address.port());
        assert!(error.message.starts_with(&own), "{error:?}");
        assert!(
            error
                .message
                .contains(&format!("process {}", std::process::id())),
            "{error:?}"
        );
        assert_eq!(error.exit_code(), 3);
        let outside = "192.0.2.1:5080".parse().expect("address");
        assert_eq!(
            serve(&operator, outside, false, Screen::new(true), &cancel)
                .await
                .expect_err("public")
                .exit_code(),
            2
        );
    }

    #[tokio::test]
    async fn the_last_tag_takes_the_image_with_it() {
        let dir = tempfile::tempdir().expect("temp dir");
        let host = HostRegistry::open_or_attach(dir.path(), HostConfig::default())
            .await
            .expect("open");
        let repo: RepoName = "t/local/app".parse().expect("name");
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [],
        });
        let bytes = manifest.to_string().into_bytes();
        let tag = |tag: &str| Reference::Tag(tag.to_owned());
        let media = "application/vnd.oci.image.index.v1+json";
        host.put_manifest(&repo, &tag("latest"), media, bytes.clone())
            .await
            .expect("put");
        host.tag(&repo, "v1", &Digest::of(&bytes))
            .await
            .expect("tag");
        let reference = |text: &str| text.parse::<ImageRef>().expect("legal");
        remove(&host, &reference("app"), Screen::new(true))
            .await
            .expect("removes");
        assert!(host.resolve(&repo, &tag("v1")).await.is_ok());
        let again = remove(&host, &reference("app"), Screen::new(true))
            .await
            .expect_err("gone");
        assert_eq!(again.exit_code(), 2);
        remove(&host, &reference("app:v1"), Screen::new(true))
            .await
            .expect("removes");
        assert!(
            host.resolve(&repo, &Reference::Digest(Digest::of(&bytes)))
                .await
                .is_err()
        );
        assert_eq!(
            remove(&host, &reference("shared/node"), Screen::new(true))
                .await
                .expect_err("base")
                .exit_code(),
            4
        );
    }
}
