//! The certificates that listeners show: to workers one of the controller's own authority, which they pinned when they joined; to people the
//! operator's own when there is one. Both are renewed while the server runs: its own before it ends, the operator's when the files change.
//!
//! Who asks is told by the handshake's ALPN (RFC 7301): workers offer [`ALPN`]. It chooses a certificate, it proves nothing.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use kiln_proto::fleet::ALPN;
use rustix::fs::OFlags;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::authority::{Authority, SERVER_LIFE, ServerIdentity, not_after_ms};
use super::tls::TlsError;
use crate::state::Controller;

/// How often the operator's files are looked at, and the own certificate's age.
pub const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Most names of a certificate.
pub(crate) const NAMES_MAX: usize = 64;
/// Longest file of a certificate or key, bytes.
const FILE_MAX: u64 = 1 << 20;

/// The operator's certificate and key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The chain, its own certificate first, PEM.
    pub chain: PathBuf,
    /// The private key, PEM.
    pub key: PathBuf,
}

/// Why the operator's files cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// One is not there, is no file, or cannot be read.
    #[error("{path:?} cannot be read")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// What it should hold is not in it.
    #[error("{path:?} holds no {what} in PEM")]
    Nothing {
        /// Which.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// Everybody on this host can be this server.
    #[error(
        "{0:?} can be read or changed by everybody on this host: chmod o= it, and think about replacing the key"
    )]
    Open(PathBuf),
    /// The key is another certificate's.
    #[error("the key in {key:?} is not that of the certificate in {chain:?}")]
    Apart {
        /// The certificate.
        chain: PathBuf,
        /// The key.
        key: PathBuf,
    },
    /// The certificate's time is over, or not come.
    #[error("the certificate in {path:?} is good from {from} to {to}, not now")]
    NotNow {
        /// Which.
        path: PathBuf,
        /// Its first moment.
        from: String,
        /// Its last.
        to: String,
    },
    /// It is of a kind that cannot be used.
    #[error("the certificate in {path:?} and its key cannot be used")]
    Kind {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
}

/// The certificates that listeners show now.
#[derive(Debug)]
pub struct Shown {
    own: RwLock<Arc<CertifiedKey>>,
    /// The operator's, and the bytes it was made of.
    given: RwLock<Option<(Arc<CertifiedKey>, Bytes)>>,
    files: Option<IdentityFiles>,
    names: Vec<String>,
    renew_at_ms: RwLock<u64>,
}

/// Chain and key, as they are in the files.
type Bytes = (Vec<u8>, Vec<u8>);

impl Shown {
    /// What a server of these names shows, with the operator's certificate for people when there is one.
    ///
    /// # Errors
    /// When a name is not one, or the operator's files cannot be used.
    pub fn new(
        authority: &Authority,
        mut names: Vec<String>,
        files: Option<IdentityFiles>,
        now_ms: u64,
    ) -> Result<Self, TlsError> {
        let given = match &files {
            None => None,
            Some(files) => {
                let bytes = files.read()?;
                let certified = files.certified(&bytes, now_ms)?;
                // Workers go where people go.
                names.extend(certified.cert.first().map(names_of).unwrap_or_default());
                Some((Arc::new(certified), bytes))
            }
        };
        let mut seen = std::collections::BTreeSet::new();
        names.retain(|name| seen.insert(name.clone()));
        Ok(Self {
            own: RwLock::new(Arc::new(own(authority, &names, now_ms)?)),
            given: RwLock::new(given),
            files,
            names,
            renew_at_ms: RwLock::new(renew_at(now_ms)),
        })
    }

    /// Looks whether the files have changed and the own certificate grows old. What cannot be used is told and changes nothing.
    pub fn look(&self, authority: &Authority, now_ms: u64) {
        let due = {
            let at = self.renew_at_ms.read();
            *at.unwrap_or_else(PoisonError::into_inner) <= now_ms
        };
        if due {
            match own(authority, &self.names, now_ms) {
                Ok(fresh) => {
                    *self.own.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
                    let mut at = self
                        .renew_at_ms
                        .write()
                        .unwrap_or_else(PoisonError::into_inner);
                    *at = renew_at(now_ms);
                }
                Err(error) => tracing::error!(%error, "this server's certificate is not renewed"),
            }
        }
        let Some(files) = &self.files else { return };
        match self.changed(files, now_ms) {
            Ok(false) => {}
            Ok(true) => {
                tracing::warn!(chain = %files.chain.display(), "the certificate of --tls-cert was changed: it is shown from now on")
            }
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the certificate of --tls-cert is not taken; the one before is shown still"
                )
            }
        }
    }

    fn changed(&self, files: &IdentityFiles, now_ms: u64) -> Result<bool, FilesError> {
        let bytes = files.read()?;
        let same = {
            let known = self.given.read().unwrap_or_else(PoisonError::into_inner);
            known.as_ref().is_some_and(|(_, known)| *known == bytes)
        };
        if same {
            return Ok(false);
        }
        let fresh = Arc::new(files.certified(&bytes, now_ms)?);
        *self.given.write().unwrap_or_else(PoisonError::into_inner) = Some((fresh, bytes));
        Ok(true)
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let worker = hello
            .alpn()
            .is_some_and(|mut offered| offered.any(|protocol| protocol == ALPN));
        if !worker {
            let given = self.given.read().unwrap_or_else(PoisonError::into_inner);
            if let Some((given, _)) = given.as_ref() {
                return Some(Arc::clone(given));
            }
        }
        let own = self.own.read().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(&own))
    }
}

/// Keeps what is shown fresh until `stop`.
pub(crate) async fn keep_fresh(shown: Arc<Shown>, controller: Controller, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let (shown, controller) = (Arc::clone(&shown), controller.clone());
        let now_ms = crate::fleet::who::now_unix_ms();
        let looked =
            tokio::task::spawn_blocking(move || shown.look(controller.access.authority(), now_ms))
                .await;
        if let Err(error) = looked {
            tracing::error!(%error, "certificates were not looked at");
        }
    }
}

impl IdentityFiles {
    fn read(&self) -> Result<Bytes, FilesError> {
        let (chain, _) = read(&self.chain)?;
        let (key, mode) = read(&self.key)?;
        if mode & 0o007 != 0 {
            return Err(FilesError::Open(self.key.clone()));
        }
        Ok((chain, key))
    }

    fn certified(&self, (chain, key): &Bytes, now_ms: u64) -> Result<CertifiedKey, FilesError> {
        let nothing = |path: &PathBuf, what| FilesError::Nothing {
            path: path.clone(),
            what,
        };
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
        let chain = chain.map_err(|_| nothing(&self.chain, "certificate"))?;
        let first = chain
            .first()
            .ok_or_else(|| nothing(&self.chain, "certificate"))?;
        let (_, first) =
            X509Certificate::from_der(first).map_err(|_| nothing(&self.chain, "certificate"))?;
        let from_ms = u64::try_from(first.validity().not_before.timestamp()).unwrap_or(0) * 1000;
        if now_ms < from_ms || not_after_ms(&first) <= now_ms {
            return Err(FilesError::NotNow {
                path: self.chain.clone(),
                from: first.validity().not_before.to_string(),
                to: first.validity().not_after.to_string(),
            });
        }
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| nothing(&self.key, "unencrypted private key"))?;
        certified(ServerIdentity { chain, key }).map_err(|source| match source {
            rustls::Error::InconsistentKeys(_) => FilesError::Apart {
                chain: self.chain.clone(),
                key: self.key.clone(),
            },
            source => FilesError::Kind {
                path: self.chain.clone(),
                source,
            },
        })
    }
}

/// The content of a file and its mode. A pipe in its place does not hold up the start.
fn read(path: &Path) -> Result<(Vec<u8>, u32), FilesError> {
    let failed = |source| FilesError::Read {
        path: path.to_owned(),
        source,
    };
    let file: File = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(std::io::Error::other("it is no file")));
    }
    if metadata.len() > FILE_MAX {
        return Err(failed(std::io::Error::other("it is too long")));
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok((bytes, metadata.mode()))
}

fn certified(identity: ServerIdentity) -> Result<CertifiedKey, rustls::Error> {
    let provider = rustls::crypto::ring::default_provider();
    CertifiedKey::from_der(identity.chain, identity.key, &provider)
}

fn own(authority: &Authority, names: &[String], now_ms: u64) -> Result<CertifiedKey, TlsError> {
    let identity = authority.server_identity(names, now_ms)?;
    certified(identity).map_err(TlsError::Identity)
}

/// When a certificate made now is renewed: at half of its life.
fn renew_at(now_ms: u64) -> u64 {
    let half = u64::try_from(SERVER_LIFE.as_millis() / 2).unwrap_or(u64::MAX);
    now_ms.saturating_add(half)
}

/// The names and addresses that a certificate is for, those with a `*` left out.
fn names_of(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) if !name.contains('*') => {
            kiln_core::network::normal_host(name).map(|name| name.to_string())
        }
        GeneralName::IPAddress(bytes) => match <[u8; 4]>::try_from(*bytes) {
            Ok(four) => Some(std::net::IpAddr::from(four).to_string()),
            Err(_) => Some(std::net::IpAddr::from(<[u8; 16]>::try_from(*bytes).ok()?).to_string()),
        },
        _ => None,
    };
    let all = names.value.general_names.iter();
    all.filter_map(name).take(NAMES_MAX).collect()
}

#[cfg(test)]
mod tests;
