//! `kiln build --push REF`: the host sends a verified image to another registry, with the user's own login.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_core::{ByteSize, FailureClass, ImageRef};
use kiln_network::gateway::proxy::ProxyConfig;
use kiln_store::HostRegistry;
use kiln_store::image::VerifiedImage;
use kiln_store::registry::RepoName;
use kiln_store::remote::{
    CertificateSources, CredentialSources, ProxyServer, PushEvent, RemoteConfig, RemoteError,
    RemoteRegistry, Target,
};

use super::operator::Operator;
use crate::environment;
use crate::error::{CliError, Result, chain};
use crate::show::Screen;

/// Pushes an image of kiln's own registry to `target`.
///
/// # Errors
/// Usage for the reference and the login, infrastructure for the network and the other registry. The image stays in
/// kiln's own registry.
pub(super) async fn push(
    operator: &Operator,
    registry: &HostRegistry,
    repo: &RepoName,
    image: &VerifiedImage,
    target: &ImageRef,
    screen: Screen,
) -> Result<()> {
    let target = Target::new(target).map_err(|error| shown(&error))?;
    let remote = remote(operator, &target).await?;
    screen.note(&format!("pushing to {target}"));
    let tell = move |event: PushEvent| tell(&event, screen);
    let pushed = remote
        .push(registry, repo, image, tell)
        .await
        .map_err(|error| shown(&error))?;
    let value = serde_json::json!({
        "event": "pushed", "reference": target.to_string(), "digest": pushed.manifest,
        "sent": pushed.sent, "present": pushed.present,
    });
    screen.data(&value, || {
        let (sent, present) = (ByteSize(pushed.sent), ByteSize(pushed.present));
        format!(
            "pushed {target}\n  digest {}\n  {sent} sent, {present} there already",
            pushed.manifest
        )
    });
    Ok(())
}

/// The way to another registry, as this host's user goes it: login, proxy, certificates.
///
/// # Errors
/// When a login or a certificate that should be there cannot be read.
pub(super) async fn remote(operator: &Operator, target: &Target) -> Result<RemoteRegistry> {
    let env = environment::all().into_iter().collect();
    let credential = CredentialSources::from_env(&env)
        .find(target)
        .await
        .map_err(|source| RemoteError::Credentials {
            registry: target.registry().to_owned(),
            source,
        })
        .map_err(|error| shown(&error))?;
    let proxy = operator.proxy()?;
    let ca_bundle = CertificateSources::from_env(&env)
        .bundle_for(target, operator.ca_bundle()?)
        .map_err(|error| shown(&error))?;
    let config = RemoteConfig {
        ca_bundle,
        proxy: Some(Arc::new(move |host: &str, port: u16| {
            proxy_for(&proxy, host, port)
        })),
        ..RemoteConfig::default()
    };
    RemoteRegistry::new(&config, target.clone(), credential).map_err(|error| shown(&error))
}

fn tell(event: &PushEvent, screen: Screen) {
    match event {
        PushEvent::Sending { digest, size } => {
            screen.note(&format!(
                "   {} {:>9} sending",
                digest.short(12),
                ByteSize(*size).to_string()
            ));
        }
        PushEvent::Present { digest, size } => {
            screen.note(&format!(
                "   {} {:>9} there already",
                digest.short(12),
                ByteSize(*size).to_string()
            ));
        }
        PushEvent::Again { why } => screen.note(&format!("   trying again: {why}")),
        _ => {}
    }
}

/// A failure of another registry, as the user is told.
pub(super) fn shown(error: &RemoteError) -> CliError {
    let class = match error {
        RemoteError::Cancelled => FailureClass::Cancelled,
        error if error.is_usage() => FailureClass::Usage,
        _ => FailureClass::Infrastructure,
    };
    let shown = CliError::new(class, chain(error));
    match error.hint() {
        Some(hint) => shown.hint(hint),
        None => shown,
    }
}

/// The operator's proxy for a host and port.
fn proxy_for(proxy: &ProxyConfig, host: &str, port: u16) -> Option<ProxyServer> {
    let url = proxy.hop(host, port)?.url;
    let login = url.authorization().and_then(|header| {
        let bytes = STANDARD.decode(header.strip_prefix("Basic ")?).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        let (user, password) = text.split_once(':')?;
        Some((user.to_owned(), password.to_owned()))
    });
    Some(ProxyServer {
        host: url.host().to_owned(),
        port: url.port(),
        login,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxys_login_is_taken_apart() {
        let proxy = ProxyConfig::new(
            None,
            Some("http://ann:p%40ss@proxy.example.org:3128"),
            Some("near.example.org"),
        );
        let proxy = proxy.expect("legal");
        let far = proxy_for(&proxy, "registry.example.org", 443).expect("a proxy");
        assert_eq!((far.host.as_str(), far.port), ("proxy.example.org", 3128));
        assert_eq!(far.login, Some(("ann".to_owned(), "p@ss".to_owned())));
        assert_eq!(proxy_for(&proxy, "near.example.org", 443), None);
    }

    #[test]
    fn whose_fault_it_is() {
        let short = Target::new(&"app:1".parse().expect("legal")).expect_err("no registry");
        let error = shown(&short);
        assert_eq!((error.exit_code(), error.hints.len()), (2, 1));
        let down = RemoteError::Protocol {
            registry: "r.example.org".to_owned(),
            why: "x".to_owned(),
        };
        assert_eq!(shown(&down).exit_code(), 3);
    }
}
