//! Where ended logs go: a folder, or a bucket that speaks S3.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::prefix::PrefixStore;
use object_store::{
    BackoffConfig, ObjectStore, ObjectStoreExt as _, PutMode, PutPayload, RetryConfig,
};

use super::LogError;
use super::http::Connector;

/// Most times a request to a bucket is tried again.
const RETRIES_MAX: usize = 4;
/// After this long a request to a bucket is not tried again.
const RETRY_FOR: Duration = Duration::from_secs(30);

/// Where ended logs go.
#[derive(Clone, Debug)]
pub enum ObjectTarget {
    /// A folder of this host. Only one controller may use it.
    Folder(PathBuf),
    /// A bucket.
    S3(S3Target),
}

/// A bucket that speaks S3.
#[derive(Clone)]
pub struct S3Target {
    /// Its name.
    pub bucket: String,
    /// Folder within it; empty for none.
    pub prefix: String,
    /// Region, as signatures name it.
    pub region: String,
    /// Where the service is, `https://host[:port]`; none means Amazon's own for the region.
    pub endpoint: Option<String>,
    /// Who asks. None: what the host's instance or container service gives.
    pub credentials: Option<S3Credentials>,
    /// Permits `http://` to another host than this one.
    pub allow_http: bool,
    /// Certificates (PEM) to trust besides the host's own.
    pub extra_roots: Option<Vec<u8>>,
}

/// Key of a bucket.
#[derive(Clone)]
pub struct S3Credentials {
    /// Public half.
    pub access_key_id: String,
    /// Secret half.
    pub secret_access_key: String,
    /// Of a temporary key.
    pub session_token: Option<String>,
}

impl fmt::Debug for S3Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Credentials")
            .field("access_key_id", &self.access_key_id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for S3Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Target")
            .field("bucket", &self.bucket)
            .field("prefix", &self.prefix)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl S3Target {
    /// From `s3://bucket/prefix?endpoint=https://host:port&region=name`. The region is `us-east-1` when none is named.
    ///
    /// # Errors
    /// [`LogError::Target`] when it is not one.
    pub fn from_url(url: &str, credentials: Option<S3Credentials>) -> Result<Self, LogError> {
        let wrong = |why: &str| LogError::Target {
            why: format!("{why}: write s3://bucket/prefix?endpoint=https://host:port&region=name"),
        };
        let rest = url
            .strip_prefix("s3://")
            .ok_or_else(|| wrong("it is not an s3:// URL"))?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
        if bucket.is_empty() || !bucket.bytes().all(legal) {
            return Err(wrong("it names no bucket"));
        }
        if !prefix.bytes().all(|b| legal(b) || b == b'/') || prefix.contains("..") {
            return Err(wrong(
                "its folder has characters that are not letters, digits, - . _ /",
            ));
        }
        let mut target = Self {
            bucket: bucket.to_owned(),
            prefix: prefix.trim_matches('/').to_owned(),
            region: "us-east-1".to_owned(),
            endpoint: None,
            credentials,
            allow_http: false,
            extra_roots: None,
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("endpoint", value)) if value.contains("://") => {
                    target.endpoint = Some(value.trim_end_matches('/').to_owned());
                }
                Some(("region", value)) if !value.is_empty() => {
                    target.region = value.to_owned();
                }
                _ => return Err(wrong("it has a parameter that is not endpoint or region")),
            }
        }
        Ok(target)
    }

    fn check_endpoint(&self) -> Result<(), LogError> {
        let Some(endpoint) = &self.endpoint else {
            return Ok(());
        };
        let uri: http::Uri = endpoint.parse().map_err(|_| LogError::Target {
            why: format!("{endpoint:?} is not a URL"),
        })?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let local = host == "localhost"
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|addr| addr.is_loopback());
        match uri.scheme_str() {
            Some("https") => Ok(()),
            Some("http") if local || self.allow_http => Ok(()),
            _ => Err(LogError::Target {
                why: format!("{endpoint:?} is not https"),
            }),
        }
    }
}

/// Opens the place where ended logs go.
pub(crate) fn open(target: &ObjectTarget) -> Result<Arc<dyn ObjectStore>, LogError> {
    match target {
        ObjectTarget::Folder(dir) => {
            std::fs::create_dir_all(dir).map_err(LogError::io("create", dir))?;
            let store = LocalFileSystem::new_with_prefix(dir)
                .map_err(LogError::objects("open the folder"))?
                .with_fsync(true)
                .with_automatic_cleanup(true);
            Ok(Arc::new(store))
        }
        ObjectTarget::S3(s3) => {
            let store = open_amazon(s3)?;
            if s3.prefix.is_empty() {
                return Ok(Arc::new(store));
            }
            Ok(Arc::new(PrefixStore::new(store, s3.prefix.as_str())))
        }
    }
}

/// How a bucket is reached.
pub(crate) fn connector(s3: &S3Target) -> Result<Connector, LogError> {
    Connector::new(s3.extra_roots.as_deref())
}

/// Opens a bucket, all of it.
pub(crate) fn open_amazon(s3: &S3Target) -> Result<AmazonS3, LogError> {
    s3.check_endpoint()?;
    let http = s3.endpoint.as_ref().is_some_and(|e| e.starts_with("http:"));
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(&s3.bucket)
        .with_region(&s3.region)
        .with_allow_http(http)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_retry(RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: RETRIES_MAX,
            retry_timeout: RETRY_FOR,
        })
        .with_http_connector(connector(s3)?);
    if let Some(endpoint) = &s3.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    if let Some(key) = &s3.credentials {
        builder = builder
            .with_access_key_id(&key.access_key_id)
            .with_secret_access_key(&key.secret_access_key);
        if let Some(token) = &key.session_token {
            builder = builder.with_token(token);
        }
    }
    builder
        .build()
        .map_err(LogError::objects("set up the bucket"))
}

/// Whether "write only if nobody has" means what it says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConditionalPut {
    /// It does: of two writers one is refused.
    Honest,
    /// The store takes the second write as well: some servers accept the condition and ignore it.
    Ignored,
    /// The store refuses the condition.
    Unsupported,
}

/// Asks the store, by doing it: writes an object, and writes it again on the condition that it is not there.
pub(super) async fn probe(store: &dyn ObjectStore) -> Result<ConditionalPut, LogError> {
    let mut id = [0; 8];
    getrandom::fill(&mut id).map_err(|error| LogError::Io {
        what: "read",
        path: "the system's random source".into(),
        source: std::io::Error::other(error.to_string()),
    })?;
    let key = Key::from(format!("probe/{}", hex::encode(id)));
    let put = |text: &'static [u8]| {
        store.put_opts(&key, PutPayload::from_static(text), PutMode::Create.into())
    };
    let answer = match put(b"first").await {
        Err(
            object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. },
        ) => {
            return Ok(ConditionalPut::Unsupported);
        }
        Err(error) => return Err(LogError::objects("write to")(error)),
        Ok(_) => match put(b"second").await {
            Err(
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. },
            ) => Ok(ConditionalPut::Honest),
            Err(error) => Err(LogError::objects("write to")(error)),
            Ok(_) => Ok(ConditionalPut::Ignored),
        },
    };
    store
        .delete(&key)
        .await
        .map_err(LogError::objects("delete from"))?;
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_buckets() {
        let target = S3Target::from_url(
            "s3://kiln-logs/eu/one?endpoint=https://s3.example.org:8333&region=eu-1",
            None,
        )
        .unwrap();
        assert_eq!(target.bucket, "kiln-logs");
        assert_eq!(target.prefix, "eu/one");
        assert_eq!(target.region, "eu-1");
        assert_eq!(
            target.endpoint.as_deref(),
            Some("https://s3.example.org:8333")
        );
        for bad in [
            "",
            "s3://",
            "http://b",
            "s3:///x",
            "s3://b/../x",
            "s3://b/a b",
            "s3://b?x=1",
            "s3://b?endpoint=nothing",
            "s3://b?region=",
        ] {
            assert!(S3Target::from_url(bad, None).is_err(), "{bad}");
        }
    }

    #[test]
    fn plain_http_is_for_this_host_only() {
        let with = |endpoint: &str, allow_http| {
            let mut target = S3Target::from_url("s3://b", None).unwrap();
            target.endpoint = Some(endpoint.to_owned());
            target.allow_http = allow_http;
            target.check_endpoint().is_ok()
        };
        assert!(with("http://127.0.0.1:8333", false));
        assert!(with("http://[::1]:8333", false));
        assert!(!with("http://s3.example.org", false));
        assert!(!with("http://127.0.0.1.example.org", false));
        assert!(!with("ftp://s3.example.org", true));
        assert!(with("http://s3.example.org", true));
    }

    #[tokio::test]
    async fn a_folder_keeps_the_condition() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&ObjectTarget::Folder(dir.path().to_owned())).unwrap();
        assert_eq!(probe(&*store).await.unwrap(), ConditionalPut::Honest);
    }

    #[test]
    fn secrets_are_not_printed() {
        let credentials = S3Credentials {
            access_key_id: "public".into(),
            secret_access_key: "hush".into(),
            session_token: Some("hush".into()),
        };
        let target = S3Target::from_url("s3://b", Some(credentials)).unwrap();
        assert!(!format!("{target:?}{:?}", target.credentials).contains("hush"));
    }
}
