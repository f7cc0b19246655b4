//! Package registries: known, resolvable, and not in ranges that builds may not reach; the certificates that go with them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use kiln_core::network::SpecialRange;
use kiln_machine::driver::Check;
use kiln_network::ca;
use kiln_network::gateway::HostFloor;
use kiln_network::gateway::proxy::ProxyConfig;
use kiln_network::registries::{Registries, Runtime};

use super::super::operator::{Operator, registries_path};
use super::{fail, pass, warn};
use crate::environment;
use crate::error::chain;

/// Longest time for one name.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Port that decides which proxy a name goes through.
const HTTPS: u16 = 443;

pub(super) async fn checks(operator: &Operator) -> Vec<Check> {
    let path = registries_path(&operator.home);
    let Some(registries) = &operator.registries else {
        let hint = "run `kiln registries discover`, or `kiln setup` once; builds need it";
        let found = match path.exists() {
            true => format!("{} cannot be used", path.display()),
            false => "there is no registries.toml".to_owned(),
        };
        return vec![fail("registries", found, hint), ca_bundle(operator)];
    };
    let mut checks = vec![known(registries)];
    match operator.proxy() {
        Ok(proxy) => {
            checks.push(match proxy.is_set() {
                true => pass("proxy", "the host's proxy is used"),
                false => pass("proxy", "none: names are dialled directly"),
            });
            checks.push(names(registries, &proxy).await);
        }
        Err(error) => checks.push(fail(
            "proxy",
            error.message,
            "correct [proxy] in registries.toml, or HTTPS_PROXY",
        )),
    }
    checks.push(ca_bundle(operator));
    checks
}

fn known(registries: &Registries) -> Check {
    let unknown = registries.needing_base();
    let words = |runtimes: Vec<&Runtime>| {
        runtimes
            .iter()
            .map(|runtime| runtime.name())
            .collect::<Vec<_>>()
            .join(", ")
    };
    match unknown.is_empty() {
        true => pass(
            "registries",
            format!("known for {}", words(registries.runtime.keys().collect())),
        ),
        false => warn(
            "registries",
            format!("not known for {}", words(unknown.iter().collect())),
            "write index and hosts into registries.toml, or install the tool and run `kiln registries discover`",
        ),
    }
}

/// What became of one name.
#[derive(Debug, PartialEq, Eq)]
enum Trouble {
    Unresolved(String),
    Special(String, IpAddr, SpecialRange),
}

async fn names(registries: &Registries, proxy: &ProxyConfig) -> Check {
    let rules = Runtime::ALL
        .iter()
        .flat_map(|runtime| registries.rules(*runtime));
    let mut hosts: Vec<String> = rules.map(|rule| rule.host().to_owned()).collect();
    hosts.sort();
    hosts.dedup();
    // What goes through the proxy is resolved there, and wildcards are no names.
    hosts.retain(|host| !host.starts_with("*.") && proxy.hop(host, HTTPS).is_none());
    let count = hosts.len();
    let lookups = hosts.into_iter().map(|host| {
        tokio::spawn(async move {
            let addrs = addresses(&host).await;
            (host, addrs)
        })
    });
    let mut troubles = Vec::new();
    let floor = HostFloor::new(registries.exceptions());
    for lookup in lookups.collect::<Vec<_>>() {
        if let Ok((host, addrs)) = lookup.await {
            troubles.extend(trouble(host, &addrs, &floor).await);
        }
    }
    verdict(count, &troubles)
}

/// Addresses of a name as this host resolves it; none when it does not, in time.
async fn addresses(host: &str) -> Vec<IpAddr> {
    match tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((host, 0))).await {
        Ok(Ok(found)) => found.map(|addr| addr.ip()).collect(),
        _ => Vec::new(),
    }
}

/// What a build's gateway would say, which knows this host's own addresses and its installation's, too.
async fn trouble(host: String, addrs: &[IpAddr], floor: &HostFloor) -> Option<Trouble> {
    if addrs.is_empty() {
        return Some(Trouble::Unresolved(host));
    }
    let checked = floor.check(&host, addrs, RESOLVE_TIMEOUT).await;
    // The gateway dials the first address that is fine, so one is enough.
    if checked.iter().any(|(_, verdict)| verdict.is_ok()) {
        return None;
    }
    checked
        .into_iter()
        .find_map(|(addr, verdict)| Some(Trouble::Special(host.clone(), addr, verdict.err()?)))
}

fn verdict(count: usize, troubles: &[Trouble]) -> Check {
    let name = "registry-names";
    let Some(first) = troubles.first() else {
        return pass(
            name,
            format!("all {count} resolve into ranges that builds may reach"),
        );
    };
    let more = match troubles.len() - 1 {
        0 => String::new(),
        more => format!(" (and {more} more like it)"),
    };
    match first {
        Trouble::Unresolved(host) => warn(
            name,
            format!("{host} does not resolve{more}"),
            "builds that need it will fail: check the host's DNS",
        ),
        Trouble::Special(host, addr, range) if range.may_be_excepted() => warn(
            name,
            match range {
                SpecialRange::Own => format!(
                    "{host} resolves to {addr}, an address of this host or its installation{more}"
                ),
                _ => format!("{host} resolves to {addr}, in a special-purpose range{more}"),
            },
            format!(
                "if that is your mirror, allow it in registries.toml: [[exception]] host = \"{host}\" range = \"{addr}/{}\"; \
                 `kiln registries discover` proposes it",
                if addr.is_ipv4() { 32 } else { 128 }
            ),
        ),
        Trouble::Special(host, addr, _) => warn(
            name,
            format!("{host} resolves to {addr}, which builds can never reach{more}"),
            "serve it at an address that is neither loopback nor link-local",
        ),
    }
}

fn ca_bundle(operator: &Operator) -> Check {
    let name = "ca-bundle";
    if operator.config.network.ca_bundle == Some(false) {
        return pass(name, "switched off in kiln.toml");
    }
    let bundle = match &operator.registries {
        Some(registries) if registries.ca.is_some() => registries.ca_bundle(),
        _ => {
            let env: BTreeMap<String, String> = environment::all().into_iter().collect();
            ca::load(&ca::named_by(&env, &[]))
        }
    };
    match bundle {
        Ok(None) => pass(
            name,
            "none named: builds trust what their base images trust",
        ),
        Ok(Some(bundle)) => {
            let sources: Vec<&str> = bundle
                .sources
                .iter()
                .map(|source| source.setting.as_str())
                .collect();
            let found = format!(
                "{} certificates, named by {}",
                bundle.certificates,
                sources.join(", ")
            );
            match &operator.registries {
                Some(registries) if registries.ca.is_none() => warn(
                    name,
                    found,
                    "builds do not get it yet: run `kiln registries discover`",
                ),
                _ => pass(name, found),
            }
        }
        Err(error) => fail(
            name,
            chain(&error),
            "correct the setting, or set network.ca_bundle = false in kiln.toml",
        ),
    }
}

#[cfg(test)]
mod tests {
    use kiln_core::network::RangeException;
    use kiln_machine::driver::CheckLevel;
    use kiln_network::OwnPlaces;

    use super::*;

    const HOST: &str = "mirror.example.org";

    async fn found(addrs: &[&str], except: &[&str]) -> Option<Trouble> {
        let exceptions = except.iter().map(|range| RangeException {
            host: HOST.to_owned(),
            range: range.parse().expect("range"),
        });
        let floor = HostFloor::new(exceptions.collect());
        let addrs: Vec<IpAddr> = addrs
            .iter()
            .map(|addr| addr.parse().expect("address"))
            .collect();
        trouble(HOST.to_owned(), &addrs, &floor).await
    }

    #[tokio::test]
    async fn private_addresses_need_an_exception_and_loopback_has_none() {
        let private = found(&["10.1.2.3"], &[]).await.expect("trouble");
        let hint = verdict(3, &[private]).hint.expect("a hint");
        assert!(
            hint.contains("[[exception]] host = \"mirror.example.org\" range = \"10.1.2.3/32\""),
            "{hint}"
        );
        assert_eq!(found(&["10.1.2.3"], &["10.0.0.0/8"]).await, None);
        assert_eq!(found(&["10.1.2.3", "8.8.8.8"], &[]).await, None);
        let unresolved = Trouble::Unresolved(HOST.to_owned());
        assert_eq!(found(&[], &[]).await, Some(unresolved));
        let here = found(&["127.0.0.1"], &["127.0.0.0/8"])
            .await
            .expect("trouble");
        assert!(verdict(1, &[here]).found.contains("never reach"));
        assert_eq!(verdict(2, &[]).level, CheckLevel::Pass);
    }

    #[tokio::test]
    async fn what_is_this_hosts_or_its_installations_is_refused_as_the_gateway_does() {
        // As `network.own` of kiln.toml says, which is read for every command.
        OwnPlaces::of_process().set("test of doctor", ["9.9.9.10"]);
        let own = found(&["9.9.9.10"], &[]).await.expect("trouble");
        let check = verdict(1, &[own]);
        assert!(check.found.contains("this host or its"), "{}", check.found);
        assert!(check.hint.is_some_and(|hint| hint.contains("9.9.9.10/32")));
        assert_eq!(found(&["9.9.9.10"], &["9.9.9.10/32"]).await, None);
        // Whatever address this host has towards others, public or not.
        let outward = std::net::UdpSocket::bind("0.0.0.0:0").expect("socket");
        if outward.connect("192.0.2.250:9").is_ok() {
            let own = outward.local_addr().expect("address").ip();
            let trouble = found(&[&own.to_string()], &[]).await;
            assert_eq!(
                trouble,
                Some(Trouble::Special(HOST.to_owned(), own, SpecialRange::Own))
            );
        }
    }
}
