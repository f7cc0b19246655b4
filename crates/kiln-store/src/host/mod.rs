//! The registry as host code uses it, whichever kiln process owns it.
//!
//! The first process that opens a registry owns its store and loopback port, under a file lock, and
//! serves a private unix socket; later ones attach to that socket and have the same interface
//! ([`HostRegistry`]). When the owner goes away, the next operation of an attached process makes that
//! process the owner. Guests' connections are served the same way from both ([`HostRegistry::serve_connection`]).

mod ask;
mod call;
mod error;
mod owner;
mod proxy;
mod relay;
mod remote;
mod socket;
mod streams;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_core::Digest;
use serde::{Deserialize, Serialize};
use tokio::sync::RwLock;
use tokio::time::Instant;

pub use self::call::{About, LoopbackState};
pub use self::error::HostError;
pub use self::streams::BlobStream;

use self::call::{Call, Reply};
use self::owner::Owner;
use self::remote::{ConnectError, Remote, unexpected};
use crate::registry::{
    Adopted, AttemptAuthority, Authority, Collected, LoopbackConfig, OpenError, Reference,
    RepoName, Scrubbed, Secret, Stats, Store, StoreConfig,
};

/// How long to wait for a process that owns the store and does not answer yet, or is just ending.
pub const ATTACH_WAIT_MAX: Duration = Duration::from_secs(15);
/// Longest wait for the doors of an owner that steps down.
const STEP_DOWN_MAX: Duration = Duration::from_millis(500);
/// Between two looks at who owns the store. The lock itself cannot be waited for with a deadline.
const ATTACH_POLL: Duration = Duration::from_millis(20);
/// How often one operation looks for a new owner before it gives up.
const OWNERS_MAX: u32 = 4;

/// How a process wants its registry.
#[derive(Clone, Debug, Default)]
pub struct HostConfig {
    /// Limits of the store.
    pub store: StoreConfig,
    /// The loopback door; `None` serves host code and guests only. Counts for the owner alone.
    pub loopback: Option<LoopbackConfig>,
}

/// A registry, owned or attached to. Clones share it; the last one dropped lets go of it.
#[derive(Clone, Debug)]
pub struct HostRegistry {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    config: HostConfig,
    role: RwLock<Role>,
}

/// This process's part.
#[derive(Clone, Debug)]
enum Role {
    Owner(Arc<Owner>),
    Attached(Remote),
}

/// An image that leaves quarantine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Publish {
    /// Where it was pushed.
    pub from: RepoName,
    /// Its manifest, by digest: the one that was verified.
    pub manifest: Digest,
    /// Where it goes.
    pub to: RepoName,
    /// Tags it gets there.
    pub tags: Vec<String>,
}

/// What was published.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Published {
    /// The manifest.
    pub manifest: Digest,
    /// Bytes of manifest, config and layers.
    pub bytes: u64,
}

impl HostRegistry {
    /// Opens the registry in `dir`, as its owner when nobody is, else attached to the owner.
    /// The owner's doors run on the async runtime this is called from.
    ///
    /// # Errors
    /// A store that cannot be opened, or an owner that does not answer within [`ATTACH_WAIT_MAX`].
    pub async fn open_or_attach(dir: &Path, config: HostConfig) -> Result<Self, HostError> {
        let role = find_role(dir, &config).await?;
        Ok(Self {
            shared: Arc::new(Shared {
                dir: dir.to_owned(),
                config,
                role: RwLock::new(role),
            }),
        })
    }

    /// Whether this process owns the registry at this moment.
    pub async fn is_owner(&self) -> bool {
        matches!(self.role().await, Role::Owner(_))
    }

    /// Lets go of the registry if this process owns it, so that another process may: to be called before this one is suspended. The next
    /// request owns it again or attaches. Machines that are served just now keep it here.
    pub async fn step_down(&self) {
        let mut role = self.shared.role.write().await;
        if !matches!(*role, Role::Owner(_)) {
            return;
        }
        *role = Role::Attached(Remote::new(&self.shared.dir));
        // Its doors close when the runtime drops their tasks.
        let end = Instant::now() + STEP_DOWN_MAX;
        while socket::connect(&self.shared.dir).await.is_ok() && Instant::now() < end {
            tokio::time::sleep(ATTACH_POLL).await;
        }
    }

    /// Directory of the registry.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// User name and secret for the loopback door.
    ///
    /// # Errors
    /// A secret file that is missing, exposed or malformed.
    pub fn credentials(&self) -> Result<(&'static str, Secret), HostError> {
        let secret = Secret::load(&self.shared.dir.join("token"))?;
        Ok((crate::registry::loopback::USER, secret))
    }

    /// Serves the registry to the peer of one connection, a machine's channel above all, until it
    /// ends. Works attached too; then writes are checked here and carried out by the owner.
    ///
    /// # Errors
    /// What broke the connection; the registry is unharmed.
    pub async fn serve_connection(
        &self,
        io: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
        authority: Authority,
    ) -> Result<(), hyper::Error> {
        proxy::serve(self.clone(), io, authority).await
    }

    /// Whether the host's disk has too little room for the store to take anything more. What a guest says of its push decides nothing.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let least = self.shared.config.store.free_bytes_min;
        rustix::fs::statvfs(&self.shared.dir)
            .is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) < least)
    }

    async fn role(&self) -> Role {
        self.shared.role.read().await.clone()
    }

    /// After the owner was found gone: becomes the owner, or attaches to whoever did.
    async fn next_owner(&self) -> Result<Role, HostError> {
        let mut role = self.shared.role.write().await;
        if let Role::Attached(remote) = &*role
            && remote.about().await.is_err()
        {
            *role = find_role(&self.shared.dir, &self.shared.config).await?;
        }
        Ok(role.clone())
    }

    /// Runs one call, on the next owner if the present one goes away. Every call may be made twice
    /// with the effect of once.
    async fn call(&self, call: Call) -> Result<Reply, HostError> {
        let mut role = self.role().await;
        for _ in 0..OWNERS_MAX {
            let remote = match role {
                Role::Owner(owner) => {
                    let done = tokio::task::spawn_blocking(move || owner::run(&owner, call));
                    return done.await.map_err(HostError::gone)?;
                }
                Role::Attached(remote) => remote,
            };
            let answer = match remote.connect().await {
                Ok(connection) => connection.call(&call).await,
                Err(ConnectError::Absent(why)) => Err(HostError::gone(why.0)),
                Err(ConnectError::Refused(error)) => Err(error),
            };
            match answer {
                Err(HostError::OwnerGone { .. }) => role = self.next_owner().await?,
                answer => return answer,
            }
        }
        Err(HostError::OwnerGone { source: None })
    }

    /// Who owns the registry, and its loopback door.
    ///
    /// # Errors
    /// No owner can be reached or become.
    pub async fn about(&self) -> Result<About, HostError> {
        match self.call(Call::About).await? {
            Reply::About(about) => Ok(about),
            other => Err(unexpected(&other)),
        }
    }

    /// The digest of the manifest that a tag or digest names.
    ///
    /// # Errors
    /// Not found, or the host failed.
    pub async fn resolve(
        &self,
        repo: &RepoName,
        reference: &Reference,
    ) -> Result<Digest, HostError> {
        let (repo, reference) = (repo.clone(), reference.to_string());
        match self.call(Call::Resolve { repo, reference }).await? {
            Reply::Digest(digest) => Ok(digest),
            other => Err(unexpected(&other)),
        }
    }

    /// Points a tag at a manifest of the repository.
    ///
    /// # Errors
    /// The manifest is not there.
    pub async fn tag(&self, repo: &RepoName, tag: &str, digest: &Digest) -> Result<(), HostError> {
        self.done(Call::Tag {
            repo: repo.clone(),
            tag: tag.to_owned(),
            digest: *digest,
        })
        .await
    }

    /// Lets `to` read a blob of `from`. Gives its size in bytes.
    ///
    /// # Errors
    /// The blob is not in `from`.
    pub async fn mount(
        &self,
        from: &RepoName,
        to: &RepoName,
        digest: &Digest,
    ) -> Result<u64, HostError> {
        let (from, to, digest) = (from.clone(), to.clone(), *digest);
        match self.call(Call::Mount { from, to, digest }).await? {
            Reply::Bytes(bytes) => Ok(bytes),
            other => Err(unexpected(&other)),
        }
    }

    /// Repositories at and below `tree`, or all, in lexical order.
    ///
    /// # Errors
    /// The host failed.
    pub async fn list_repositories(
        &self,
        tree: Option<&RepoName>,
    ) -> Result<Vec<RepoName>, HostError> {
        let tree = tree.cloned();
        match self.call(Call::Repositories { tree }).await? {
            Reply::Repositories(names) => Ok(names),
            other => Err(unexpected(&other)),
        }
    }

    /// Tags of a repository, in lexical order.
    ///
    /// # Errors
    /// No such repository.
    pub async fn list_tags(&self, repo: &RepoName) -> Result<Vec<String>, HostError> {
        let repo = repo.clone();
        match self.call(Call::Tags { repo }).await? {
            Reply::Tags(tags) => Ok(tags),
            other => Err(unexpected(&other)),
        }
    }

    /// Removes a tag, or a manifest with its tags. Bytes go at the next collection.
    ///
    /// # Errors
    /// Not found. (After a change of owner in between, that may mean it was removed just now.)
    pub async fn delete(&self, repo: &RepoName, reference: &Reference) -> Result<(), HostError> {
        let (repo, reference) = (repo.clone(), reference.to_string());
        self.done(Call::DeleteManifest { repo, reference }).await
    }

    /// Removes every repository at and below a name, such as a job's quarantine.
    ///
    /// # Errors
    /// Not found, as for [`Self::delete`].
    pub async fn delete_tree(&self, tree: &RepoName) -> Result<(), HostError> {
        self.done(Call::DeleteTree { tree: tree.clone() }).await
    }

    /// Collects what no manifest and no repository refers to and is older than `grace`.
    ///
    /// # Errors
    /// Another collection is running, or the host failed.
    pub async fn gc(&self, grace: Duration) -> Result<Collected, HostError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        match self.call(Call::Gc { grace_ms }).await? {
            Reply::Collected(collected) => Ok(collected),
            other => Err(unexpected(&other)),
        }
    }

    /// Reads every stored byte again and sets aside what is corrupt.
    ///
    /// # Errors
    /// The host failed.
    pub async fn scrub(&self) -> Result<Scrubbed, HostError> {
        match self.call(Call::Scrub).await? {
            Reply::Scrubbed(report) => Ok(report),
            other => Err(unexpected(&other)),
        }
    }

    /// Counts what is stored.
    ///
    /// # Errors
    /// The host failed.
    pub async fn stats(&self) -> Result<Stats, HostError> {
        match self.call(Call::Stats).await? {
            Reply::Stats(stats) => Ok(stats),
            other => Err(unexpected(&other)),
        }
    }

    /// Moves a verified image out of quarantine: checks every content, links it in the target, then
    /// sets the tags. With an attempt given, its lease is checked first and again before the tags.
    ///
    /// # Errors
    /// Something is missing or corrupt, or the lease is over; then no tag was set.
    pub async fn publish(
        &self,
        publish: &Publish,
        attempt: Option<&AttemptAuthority>,
    ) -> Result<Published, HostError> {
        let attempt = attempt.cloned().map(Authority::Attempt);
        let check = || attempt.as_ref().map_or(Ok(()), Authority::check_live);
        check()?;
        let adopted = self
            .adopt(&publish.from, &publish.to, &publish.manifest)
            .await?;
        for tag in &publish.tags {
            check()?;
            self.tag(&publish.to, tag, &publish.manifest).await?;
        }
        Ok(Published {
            manifest: publish.manifest,
            bytes: adopted.bytes,
        })
    }

    /// Makes an image of one repository readable in another, untagged.
    ///
    /// # Errors
    /// Something is missing or corrupt.
    pub async fn adopt(
        &self,
        from: &RepoName,
        to: &RepoName,
        digest: &Digest,
    ) -> Result<Adopted, HostError> {
        let (from, to, digest) = (from.clone(), to.clone(), *digest);
        match self.call(Call::Adopt { from, to, digest }).await? {
            Reply::Adopted(adopted) => Ok(adopted),
            other => Err(unexpected(&other)),
        }
    }

    async fn done(&self, call: Call) -> Result<(), HostError> {
        match self.call(call).await? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

/// Owner if nobody is, else attached.
async fn find_role(dir: &Path, config: &HostConfig) -> Result<Role, HostError> {
    let deadline = Instant::now() + ATTACH_WAIT_MAX;
    let remote = Remote::new(dir);
    loop {
        let (path, limits) = (dir.to_owned(), config.store.clone());
        let opened = tokio::task::spawn_blocking(move || Store::open(&path, limits)).await;
        match opened.map_err(HostError::gone)? {
            Ok(store) => {
                let owner = Owner::start(store, config).await?;
                return Ok(Role::Owner(Arc::new(owner)));
            }
            Err(OpenError::Owned { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        match remote.about().await {
            Ok(_) => return Ok(Role::Attached(remote)),
            Err(ConnectError::Absent(_) | ConnectError::Refused(HostError::OwnerGone { .. })) => {}
            Err(ConnectError::Refused(error)) => return Err(error),
        }
        if Instant::now() >= deadline {
            return Err(HostError::OwnerSilent {
                dir: dir.to_owned(),
            });
        }
        tokio::time::sleep(ATTACH_POLL).await;
    }
}
