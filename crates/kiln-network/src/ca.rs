//! Which certificate authorities the operator's machine trusts, as its own settings name them.
//!
//! Company proxies re-sign TLS; then every tool on the host is told of a CA file, each by a variable or setting of
//! its own. This module reads the files those settings name, checks that they are certificates and nothing else
//! (a private key in such a file must not travel into machines), and joins them into one bundle.
//! Not a TLS library: it never judges a certificate, it only tells that bytes are one.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_core::Digest;

/// Most bytes of one CA file, and of the joined bundle.
pub const BUNDLE_BYTES_MAX: usize = 4 << 20;
/// Most settings that are looked at.
const SETTINGS_MAX: usize = 32;

/// Variables that name a CA file, in the order their files are joined.
pub const VARIABLES: &[&str] = &[
    "SSL_CERT_FILE",
    "NODE_EXTRA_CA_CERTS",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "PIP_CERT",
    "GIT_SSL_CAINFO",
    "NPM_CONFIG_CAFILE",
    "npm_config_cafile",
];

/// The only variable whose file is added to the usual roots instead of replacing them.
const ADDS: &str = "NODE_EXTRA_CA_CERTS";

/// Where distributions keep their own bundle; read only beside a setting that adds to it.
pub const SYSTEM_BUNDLES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// One setting that names a CA file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaSetting {
    /// The variable or tool setting, for example `SSL_CERT_FILE` or `npm cafile`.
    pub setting: String,
    /// The file it names.
    pub path: PathBuf,
}

/// The joined certificates.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaBundle {
    /// Certificates in PEM, each once, nothing else.
    pub pem: Vec<u8>,
    /// How many.
    pub certificates: usize,
    /// SHA-256 of `pem`.
    pub digest: Digest,
    /// The settings that named them.
    pub sources: Vec<CaSetting>,
}

/// Why a CA file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// It cannot be read.
    #[error("{setting} names the CA file {path:?}, which cannot be read")]
    Read {
        /// The setting.
        setting: String,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is read, but is not a PEM file of certificates.
    #[error("{setting} names the CA file {path:?}, which is not a file of certificates")]
    Content {
        /// The setting.
        setting: String,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: PemError,
    },
    /// All together are too large.
    #[error(
        "the CA files named by this host's settings are larger than {BUNDLE_BYTES_MAX} bytes together"
    )]
    TooLong,
}

/// Why bytes are not PEM certificates.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PemError {
    /// Larger than [`BUNDLE_BYTES_MAX`].
    #[error("it is larger than {BUNDLE_BYTES_MAX} bytes")]
    TooLong,
    /// A private key, which must never travel.
    #[error("line {line} begins a private key")]
    PrivateKey {
        /// Counted from 1.
        line: usize,
    },
    /// A block of another kind.
    #[error("line {line} begins a {label:?}, not a certificate")]
    Label {
        /// Counted from 1.
        line: usize,
        /// The block's label.
        label: String,
    },
    /// A block that does not end, or is not base64 of one DER sequence.
    #[error("the certificate beginning on line {line} is broken")]
    Broken {
        /// Counted from 1.
        line: usize,
    },
    /// No block at all.
    #[error("it holds no certificate")]
    Empty,
}

/// The CA files an environment names, in a fixed order, then those of tool settings (`npm cafile`, `pip cert`,
/// `git http.sslCAInfo`) that the caller asked for.
#[must_use]
pub fn named_by(env: &BTreeMap<String, String>, tools: &[CaSetting]) -> Vec<CaSetting> {
    let of_env = VARIABLES.iter().filter_map(|name| {
        let path = env.get(*name).filter(|path| !path.is_empty())?;
        Some(CaSetting {
            setting: (*name).to_owned(),
            path: PathBuf::from(path),
        })
    });
    of_env
        .chain(tools.iter().cloned())
        .take(SETTINGS_MAX)
        .collect()
}

/// Reads and joins the named files. `Ok(None)` when nothing is named: the host trusts what everybody trusts.
/// When the only thing named adds to the usual roots, the distribution's own bundle is joined too.
///
/// # Errors
/// When a named file is missing or is not a file of certificates: silently leaving it out would only fail later.
pub fn load(settings: &[CaSetting]) -> Result<Option<CaBundle>, CaError> {
    load_with(settings, SYSTEM_BUNDLES)
}

fn load_with(settings: &[CaSetting], system: &[&str]) -> Result<Option<CaBundle>, CaError> {
    if settings.is_empty() {
        return Ok(None);
    }
    let mut settings = settings.to_vec();
    if settings.iter().all(|named| named.setting == ADDS)
        && let Some(path) = system.iter().find(|path| Path::new(path).is_file())
    {
        settings.push(CaSetting {
            setting: "the system's own bundle".to_owned(),
            path: PathBuf::from(path),
        });
    }
    let mut seen_files = HashSet::new();
    let mut seen = HashSet::new();
    let mut pem = Vec::new();
    for named in &settings {
        if !seen_files.insert(named.path.clone()) {
            continue;
        }
        let bytes = read_bounded(&named.path).map_err(|source| CaError::Read {
            setting: named.setting.clone(),
            path: named.path.clone(),
            source,
        })?;
        let certificates = certificates(&bytes).map_err(|source| CaError::Content {
            setting: named.setting.clone(),
            path: named.path.clone(),
            source,
        })?;
        for der in certificates {
            let digest = Digest::of(&der);
            if seen.insert(digest) {
                append_pem(&mut pem, &der);
            }
        }
        if pem.len() > BUNDLE_BYTES_MAX {
            return Err(CaError::TooLong);
        }
    }
    Ok(Some(CaBundle {
        certificates: seen.len(),
        digest: Digest::of(&pem),
        pem,
        sources: settings,
    }))
}

/// One byte more than allowed, so that the parser sees that it is too long.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(BUNDLE_BYTES_MAX as u64 + 1)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn append_pem(pem: &mut Vec<u8>, der: &[u8]) {
    pem.extend_from_slice(b"-----BEGIN CERTIFICATE-----\n");
    for line in STANDARD.encode(der).as_bytes().chunks(64) {
        pem.extend_from_slice(line);
        pem.push(b'\n');
    }
    pem.extend_from_slice(b"-----END CERTIFICATE-----\n");
}

/// The DER of every certificate of a PEM file (RFC 7468); text between blocks is passed over.
///
/// # Errors
/// When a block is no certificate or broken, or there is none.
pub fn certificates(bytes: &[u8]) -> Result<Vec<Vec<u8>>, PemError> {
    if bytes.len() > BUNDLE_BYTES_MAX {
        return Err(PemError::TooLong);
    }
    let mut found = Vec::new();
    let mut block: Option<(usize, Vec<u8>)> = None;
    for (at, line) in bytes.split(|b| *b == b'\n').enumerate() {
        let line_number = at + 1;
        let line = line.trim_ascii();
        match &mut block {
            None => {
                let label = line
                    .strip_prefix(b"-----BEGIN ")
                    .and_then(|rest| rest.strip_suffix(b"-----"));
                match label {
                    None => {}
                    Some(b"CERTIFICATE") => block = Some((line_number, Vec::new())),
                    Some(label) if label.ends_with(b"PRIVATE KEY") => {
                        return Err(PemError::PrivateKey { line: line_number });
                    }
                    Some(label) => {
                        return Err(PemError::Label {
                            line: line_number,
                            label: String::from_utf8_lossy(label).chars().take(60).collect(),
                        });
                    }
                }
            }
            Some((begun, base64)) => {
                if line == b"-----END CERTIFICATE-----" {
                    let der = STANDARD.decode(&base64).ok().filter(|der| is_sequence(der));
                    found.push(der.ok_or(PemError::Broken { line: *begun })?);
                    block = None;
                } else {
                    base64.extend_from_slice(line);
                }
            }
        }
    }
    match (block, found.is_empty()) {
        (Some((line, _)), _) => Err(PemError::Broken { line }),
        (None, true) => Err(PemError::Empty),
        (None, false) => Ok(found),
    }
}

/// Whether the bytes are exactly one DER SEQUENCE.
fn is_sequence(der: &[u8]) -> bool {
    let Some((&[0x30, first], rest)) = der.split_first_chunk::<2>() else {
        return false;
    };
    match first {
        0..=0x7f => rest.len() == usize::from(first),
        0x81..=0x84 => {
            let count = usize::from(first - 0x80);
            let Some((len, content)) = rest.split_at_checked(count) else {
                return false;
            };
            let len = len
                .iter()
                .fold(0_usize, |len, b| (len << 8) | usize::from(*b));
            content.len() == len
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pem(content: &[u8]) -> Vec<u8> {
        let mut der = vec![0x30, u8::try_from(content.len()).expect("short")];
        der.extend(content);
        let mut out = Vec::new();
        append_pem(&mut out, &der);
        out
    }

    fn setting(name: &str, path: &Path) -> CaSetting {
        CaSetting {
            setting: name.to_owned(),
            path: path.to_owned(),
        }
    }

    #[test]
    fn files_are_joined_and_each_certificate_kept_once() {
        let dir = tempfile::tempdir().expect("dir");
        let (a, b) = (dir.path().join("a.pem"), dir.path().join("b.pem"));
        std::fs::write(
            &a,
            [b"# comment\n".to_vec(), pem(b"one"), pem(b"two")].concat(),
        )
        .expect("a");
        std::fs::write(&b, [pem(b"two"), pem(b"three")].concat()).expect("b");
        let settings = [
            setting("SSL_CERT_FILE", &a),
            setting("pip cert", &a),
            setting("X", &b),
        ];
        let bundle = load_with(&settings, &[]).expect("legal").expect("named");
        assert_eq!(bundle.certificates, 3);
        assert_eq!(
            bundle.pem,
            [pem(b"one"), pem(b"two"), pem(b"three")].concat()
        );
        assert_eq!(bundle.digest, Digest::of(&bundle.pem));
        assert_eq!(load_with(&[], &[]).expect("legal"), None);
    }

    #[test]
    fn a_file_that_only_adds_brings_the_systems_own_along() {
        let dir = tempfile::tempdir().expect("dir");
        let (a, b) = (dir.path().join("a.pem"), dir.path().join("b.pem"));
        std::fs::write(&a, pem(b"one")).expect("a");
        std::fs::write(&b, pem(b"two")).expect("b");
        let system = [b.to_str().expect("text")];
        let only = [setting(ADDS, &a)];
        let count = |settings: &[CaSetting]| {
            let bundle = load_with(settings, &system).expect("legal");
            bundle.expect("named").certificates
        };
        assert_eq!(count(&only), 2);
        assert_eq!(count(&[only[0].clone(), setting("SSL_CERT_FILE", &a)]), 1);
    }

    #[test]
    fn what_is_not_a_certificate_is_refused_with_its_line() {
        let key = b"x\n-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n";
        assert_eq!(certificates(key), Err(PemError::PrivateKey { line: 2 }));
        let other = b"-----BEGIN TRUSTED CERTIFICATE-----\n";
        assert!(matches!(
            certificates(other),
            Err(PemError::Label { line: 1, .. })
        ));
        assert_eq!(certificates(b"hello"), Err(PemError::Empty));
        let cut = pem(b"one");
        assert_eq!(
            certificates(&cut[..cut.len() - 10]),
            Err(PemError::Broken { line: 1 })
        );
        let rubbish = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert_eq!(certificates(rubbish), Err(PemError::Broken { line: 1 }));
        assert_eq!(
            certificates(&vec![b'\n'; BUNDLE_BYTES_MAX + 1]),
            Err(PemError::TooLong)
        );
    }

    #[test]
    fn a_named_file_that_is_missing_is_an_error() {
        let missing = [setting("PIP_CERT", Path::new("/nonexistent/ca.pem"))];
        assert!(matches!(load(&missing), Err(CaError::Read { .. })));
        let folder = [setting("PIP_CERT", Path::new("/"))];
        assert!(matches!(load(&folder), Err(CaError::Read { .. })));
    }

    #[test]
    fn variables_come_first_and_in_order() {
        let env = [
            ("PIP_CERT", "/p"),
            ("SSL_CERT_FILE", "/s"),
            ("CURL_CA_BUNDLE", ""),
        ];
        let env = env.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let named = named_by(&env, &[setting("npm cafile", Path::new("/n"))]);
        let names: Vec<&str> = named.iter().map(|named| named.setting.as_str()).collect();
        assert_eq!(names, ["SSL_CERT_FILE", "PIP_CERT", "npm cafile"]);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = certificates(&bytes);
            let _ = is_sequence(&bytes);
        }

        #[test]
        fn certificates_round_trip(contents in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..100), 1..5)) {
            let all: Vec<u8> = contents.iter().flat_map(|content| pem(content)).collect();
            let back = certificates(&all).expect("legal");
            prop_assert_eq!(back.len(), contents.len());
            for (der, content) in back.iter().zip(&contents) {
                prop_assert_eq!(&der[2..], &content[..]);
            }
        }
    }
}
