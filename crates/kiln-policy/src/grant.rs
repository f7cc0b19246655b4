//! What the operator lets a tenant's policies ask for: `policy.toml` in the configuration directory. A policy can only stay below it.
//!
//! ```toml
//! [tenant.local]
//! open = false                            # may a phase be open to every name
//! learn = false                           # may a phase learn
//! hosts = ["*.example.org", "db.example.net:5432"]   # without the key: any name
//! git = ["git.example.org/public/*", { repository = "git.example.org/team/*", secret = "git-token", user = "ci" }]
//! max = { cpus = 4, memory = "8G" }
//! trusted_refs = ["git.example.org/team/app@refs/heads/main"]  # on a server: whose jobs are trusted, see `trust`
//! trusted_uploads = false
//! ```
//!
//! `git` is what the git gateway may read, with which of the tenant's secrets; without the key: any repository whose host may be named, as
//! anybody reads it. The first entry that fits decides. `[tenant."*"]` holds for tenants without a table of their own. Without a file: any named host, nothing open, no learning.

use std::collections::BTreeMap;

use kiln_core::git_gateway::{GIT_USER, GitCredential, is_git_user};
use kiln_core::network::Protocol;
use kiln_core::secret::{Repository, RepositoryPattern};
use kiln_core::{AllowRule, ByteSize, TenantName};
use serde::Deserialize;
use toml::Spanned;

use crate::diagnostic::{Diagnostic, Diagnostics, Place, shown};
use crate::trust::TrustedRef;

/// The operator's file, in the configuration directory.
pub const GRANT_FILE: &str = "policy.toml";
/// Largest file, bytes.
pub const GRANT_BYTES_MAX: usize = 1 << 20;
/// The table of tenants without one.
const ANYBODY: &str = "*";

#[derive(Deserialize, Debug, Default)]
#[serde(default, deny_unknown_fields)]
struct RawFile {
    tenant: BTreeMap<String, RawGrant>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default, deny_unknown_fields)]
struct RawGrant {
    open: Option<Spanned<bool>>,
    learn: Option<Spanned<bool>>,
    hosts: Option<Spanned<Vec<Spanned<String>>>>,
    git: Option<Spanned<Vec<Spanned<toml::Value>>>>,
    max: RawMax,
    trusted_refs: Vec<Spanned<String>>,
    trusted_uploads: bool,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default, deny_unknown_fields)]
struct RawMax {
    cpus: Option<u32>,
    memory: Option<Spanned<String>>,
    timeout: Option<Spanned<String>>,
    disk: Option<Spanned<String>>,
    upload: Option<Spanned<String>>,
    download: Option<Spanned<String>>,
    connections: Option<u32>,
    disk_rate: Option<Spanned<String>>,
    processes: Option<u32>,
    open_files: Option<u32>,
    output: Option<Spanned<String>>,
}

/// A host that an operator grants: with a port that port alone and what it says, or by default, speaks; else every port, speaking anything.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GrantedHost {
    pub(crate) pattern: AllowRule,
    pub(crate) any_port: bool,
    /// Line of the file.
    pub line: u32,
}

impl GrantedHost {
    /// What a rule of one port and this grant have in common.
    pub(crate) fn and(&self, rule: &AllowRule) -> Option<AllowRule> {
        match self.any_port {
            false => self.pattern.and(rule),
            true => {
                let port = AllowRule::of_pattern(self.pattern.host(), rule.ports()).ok()?;
                port.with_protocol(rule.protocol()?).and(rule)
            }
        }
    }

    /// As it is written.
    #[must_use]
    pub fn text(&self) -> String {
        match self.any_port {
            true => self.pattern.host().to_owned(),
            false => self.pattern.to_string(),
        }
    }
}

/// Repositories that an operator grants, and what the host shows their server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GrantedGit {
    /// Which.
    pub pattern: RepositoryPattern,
    /// The credential; none: they are read as anybody reads them.
    pub credential: Option<GitCredential>,
    /// Line of the file.
    pub line: u32,
}

/// The keys of an entry of `git` that is not only a pattern.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct RawGit {
    repository: String,
    secret: Option<String>,
    user: Option<String>,
}

/// The most that a policy may ask for; none means that the operator says nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Maxima {
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory.
    pub memory: Option<ByteSize>,
    /// Wall time in milliseconds.
    pub timeout_ms: Option<u64>,
    /// Disk.
    pub disk: Option<ByteSize>,
    /// Bits per second from the machine.
    pub upload_bits: Option<u64>,
    /// Bits per second to the machine.
    pub download_bits: Option<u64>,
    /// Connections at once.
    pub connections: Option<u32>,
    /// Bytes per second of the disks that it may write.
    pub disk_rate: Option<ByteSize>,
    /// Processes at once.
    pub processes: Option<u32>,
    /// Files that one process has open at once.
    pub open_files: Option<u32>,
    /// Bytes of output.
    pub output: Option<ByteSize>,
}

/// What one tenant's policies may ask for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Grant {
    /// Every name may be reached where a policy asks for it.
    pub open: bool,
    /// A policy may learn.
    pub learn: bool,
    /// Hosts that may be named; none means any.
    pub hosts: Option<Vec<GrantedHost>>,
    /// Repositories that may be named; none means any whose host may be.
    pub git: Option<Vec<GrantedGit>>,
    /// The most of everything countable.
    pub max: Maxima,
    /// Refs of repositories of which a trusted token's jobs are trusted.
    pub trusted_refs: Vec<TrustedRef>,
    /// So are its jobs whose source, or all of whose work, came with the request.
    pub trusted_uploads: bool,
    pub(crate) open_line: Option<u32>,
    pub(crate) learn_line: Option<u32>,
    pub(crate) hosts_line: Option<u32>,
    pub(crate) git_line: Option<u32>,
}

impl Grant {
    /// Whether a repository may be read, by which line, and with what credential.
    pub(crate) fn repository(
        &self,
        repository: &Repository,
    ) -> Option<(u32, Option<&GitCredential>)> {
        if let Some(git) = &self.git {
            let entry = git.iter().find(|one| one.pattern.matches(repository))?;
            return Some((entry.line, entry.credential.as_ref()));
        }
        let Some(hosts) = &self.hosts else {
            return Some((1, None));
        };
        // Whom a policy may reach plainly, it may read plainly.
        let rule = AllowRule::new(repository.host(), &[repository.port()]).ok()?;
        let rule = rule.with_protocol(Protocol::Tls);
        let host = hosts
            .iter()
            .find(|host| host.and(&rule).is_some_and(|both| both == rule))?;
        Some((host.line, None))
    }

    /// The line that has the git gateway serve this host.
    pub(crate) fn gateway_serves(&self, rule: &AllowRule) -> Option<&GrantedGit> {
        let host = |one: &GrantedGit| {
            let authority = one.pattern.authority();
            let host = authority
                .split_once(':')
                .map_or(authority, |(host, _)| host);
            rule.matches(host)
        };
        self.git.iter().flatten().find(|one| host(one))
    }

    /// Credentials that the operator named, each with what it is for.
    pub fn credentials(&self) -> impl Iterator<Item = (&RepositoryPattern, &GitCredential)> {
        let all = self.git.iter().flatten();
        all.filter_map(|one| Some((&one.pattern, one.credential.as_ref()?)))
    }
}

/// The operator's file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Grants {
    /// The file's name, as people know it; none when there is no file.
    pub file: Option<String>,
    tenants: BTreeMap<String, Grant>,
}

impl Grants {
    /// Reads the operator's file.
    ///
    /// # Errors
    /// What is wrong with it, with lines.
    pub fn parse(file: &str, text: &str) -> Result<Self, Diagnostics> {
        let mut reader = GrantReader {
            text,
            wrong: Vec::new(),
        };
        let fail = |wrong| Diagnostics::new(file, text, wrong);
        if text.len() > GRANT_BYTES_MAX {
            let message = format!("the file has more than {GRANT_BYTES_MAX} bytes");
            return Err(fail(vec![Diagnostic::of_file(message)]));
        }
        let raw: RawFile = toml::from_str(text).map_err(|error| {
            let message = error.message().to_owned();
            let one = match error.span() {
                Some(span) => Diagnostic::at(reader.place(span), message),
                None => Diagnostic::of_file(message),
            };
            fail(vec![one])
        })?;
        let mut tenants = BTreeMap::new();
        for (name, raw) in raw.tenant {
            if name != ANYBODY && name.parse::<TenantName>().is_err() {
                let message = format!("{:?} is not the name of a tenant", shown(&name));
                reader.wrong.push(Diagnostic::of_file(message));
            }
            let grant = reader.grant(raw);
            tenants.insert(name, grant);
        }
        if !reader.wrong.is_empty() {
            return Err(fail(reader.wrong));
        }
        Ok(Self {
            file: Some(file.to_owned()),
            tenants,
        })
    }

    /// What a tenant's policies may ask for.
    #[must_use]
    pub fn of(&self, tenant: &TenantName) -> Grant {
        let own = self.tenants.get(tenant.as_str());
        own.or_else(|| self.tenants.get(ANYBODY))
            .cloned()
            .unwrap_or_default()
    }
}

fn git_entry(raw: RawGit) -> Result<(RepositoryPattern, Option<GitCredential>), String> {
    let wrong = |error: kiln_core::secret::ParseSecretError| error.to_string();
    let pattern: RepositoryPattern = raw.repository.parse().map_err(wrong)?;
    // Its host is one that a repository could have.
    let host: Result<Repository, _> = format!("{}/x", pattern.authority()).parse();
    host.map_err(wrong)?;
    if let Some(user) = raw.user.as_ref().filter(|user| !is_git_user(user)) {
        return Err(format!("{:?} cannot be the user of a login", shown(user)));
    }
    let credential = match (raw.secret, raw.user) {
        (None, Some(_)) => return Err("a user without a secret logs in nowhere".to_owned()),
        (None, None) => None,
        (Some(secret), user) => Some(GitCredential {
            secret: secret.parse().map_err(wrong)?,
            user: user.unwrap_or_else(|| GIT_USER.to_owned()),
        }),
    };
    Ok((pattern, credential))
}

struct GrantReader<'a> {
    text: &'a str,
    wrong: Vec<Diagnostic>,
}

impl GrantReader<'_> {
    fn place(&self, span: std::ops::Range<usize>) -> Place {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let inside = self.text.get(span.clone()).unwrap_or_default();
        Place {
            line: number(before.matches('\n').count() + 1),
            column: number(before[line_start..].chars().count() + 1),
            len: number(
                inside
                    .lines()
                    .next()
                    .unwrap_or_default()
                    .chars()
                    .count()
                    .max(1),
            ),
        }
    }

    fn grant(&mut self, raw: RawGrant) -> Grant {
        let open = raw.open.as_ref().is_some_and(|open| *open.get_ref());
        if let (true, Some(hosts)) = (open, &raw.hosts) {
            let place = self.place(hosts.span());
            let wrong = Diagnostic::at(place, "`hosts` bounds nothing where `open = true`");
            self.wrong.push(wrong.hint("remove one of them"));
        }
        let hosts_line = raw
            .hosts
            .as_ref()
            .map(|hosts| self.place(hosts.span()).line);
        let line = |said: &Spanned<bool>| self.place(said.span()).line;
        let open_line = raw.open.as_ref().map(line);
        let learn_line = raw.learn.as_ref().map(line);
        let hosts = raw.hosts.map(|hosts| {
            let hosts = hosts.into_inner();
            hosts
                .into_iter()
                .filter_map(|host| self.host(&host))
                .collect()
        });
        let git_line = raw.git.as_ref().map(|git| self.place(git.span()).line);
        let git = raw.git.map(|git| {
            let git = git.into_inner();
            git.iter().filter_map(|one| self.git(one)).collect()
        });
        let max = Maxima {
            cpus: raw.max.cpus,
            memory: self.size(raw.max.memory),
            timeout_ms: self.with_unit(
                raw.max.timeout,
                &[("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)],
                "a time such as 10m",
            ),
            disk: self.size(raw.max.disk),
            upload_bits: self.rate(raw.max.upload),
            download_bits: self.rate(raw.max.download),
            connections: raw.max.connections,
            disk_rate: self.size(raw.max.disk_rate),
            processes: raw.max.processes,
            open_files: raw.max.open_files,
            output: self.size(raw.max.output),
        };
        Grant {
            open,
            learn: raw.learn.is_some_and(|learn| *learn.get_ref()),
            hosts,
            git,
            max,
            trusted_refs: self.trusted_refs(&raw.trusted_refs),
            trusted_uploads: raw.trusted_uploads,
            open_line,
            learn_line,
            hosts_line,
            git_line,
        }
    }

    fn host(&mut self, text: &Spanned<String>) -> Option<GrantedHost> {
        let place = self.place(text.span());
        match text.get_ref().parse::<AllowRule>() {
            Ok(pattern) => Some(GrantedHost {
                any_port: !text.get_ref().contains(':'),
                pattern,
                line: place.line,
            }),
            Err(error) => {
                self.wrong.push(Diagnostic::at(place, error.to_string()));
                None
            }
        }
    }

    fn git(&mut self, entry: &Spanned<toml::Value>) -> Option<GrantedGit> {
        let place = self.place(entry.span());
        let read = match entry.get_ref() {
            toml::Value::String(text) => git_entry(RawGit {
                repository: text.clone(),
                secret: None,
                user: None,
            }),
            other => RawGit::deserialize(other.clone())
                .map_err(|error| error.message().to_owned())
                .and_then(git_entry),
        };
        match read {
            Ok((pattern, credential)) => Some(GrantedGit {
                pattern,
                credential,
                line: place.line,
            }),
            Err(error) => {
                let hint = "write \"HOST/PATH\", or { repository = \"HOST/PATH\", secret = \"NAME\", user = \"NAME\" }";
                self.wrong.push(Diagnostic::at(place, error).hint(hint));
                None
            }
        }
    }

    fn trusted_refs(&mut self, entries: &[Spanned<String>]) -> Vec<TrustedRef> {
        let mut read = Vec::new();
        for entry in entries {
            match entry.get_ref().parse() {
                Ok(one) => read.push(one),
                Err(error) => {
                    let place = self.place(entry.span());
                    let hint = "for example \"git.example.org/team/app@refs/heads/main\"";
                    self.wrong.push(Diagnostic::at(place, error).hint(hint));
                }
            }
        }
        read
    }

    fn size(&mut self, text: Option<Spanned<String>>) -> Option<ByteSize> {
        let text = text?;
        match text.get_ref().parse() {
            Ok(size) => Some(size),
            Err(error) => {
                let place = self.place(text.span());
                let error: kiln_core::size::ParseSizeError = error;
                self.wrong.push(Diagnostic::at(place, error.to_string()));
                None
            }
        }
    }

    fn rate(&mut self, text: Option<Spanned<String>>) -> Option<u64> {
        let units = [
            ("bit", 1),
            ("kbit", 1_000),
            ("Mbit", 1_000_000),
            ("Gbit", 1_000_000_000),
        ];
        self.with_unit(text, &units, "a rate such as 10Mbit")
    }

    fn with_unit(
        &mut self,
        text: Option<Spanned<String>>,
        units: &[(&str, u64)],
        what: &str,
    ) -> Option<u64> {
        let text = text?;
        let value = crate::read::with_unit(text.get_ref(), units);
        if value.is_none() {
            let place = self.place(text.span());
            let message = format!("{:?} is not {what}", shown(text.get_ref()));
            self.wrong.push(Diagnostic::at(place, message));
        }
        value
    }
}
