//! Other registries, as this host's user pushes to them and pulls bases from them: OCI distribution-spec v1.1, with the credentials that
//! docker and podman keep.
//!
//! A client only, and only for host code: no guest ever comes here. Requests block and run on a blocking thread;
//! blobs stream from the store in constant memory. Credentials are never logged and never sent anywhere but to the
//! registry they were kept for and to the token server it names.
//! Read next: [`RemoteRegistry`] (push and pull), `credentials` (where a login is found), `challenge` (how a registry asks).

mod certs;
mod challenge;
mod client;
mod credentials;
mod error;
mod helper;
mod http;
mod offering;
mod pull;
mod push;
mod target;

pub use certs::CertificateSources;
pub use credentials::{Credential, CredentialSources, CredentialsError};
pub use error::RemoteError;
pub use http::{ProxyServer, RemoteConfig};
pub use pull::{PULL_BYTES_MAX, PullEvent, Pulled};
pub use push::{PushEvent, Pushed, RemoteRegistry};
pub use target::Target;

/// For the fuzz targets: challenges, locations and files of logins.
pub(crate) fn fuzz_remote(text: &str, bytes: &[u8]) {
    let _any = challenge::choose([text].into_iter());
    let from = ureq::http::Uri::from_static("https://r.example.org/v2/a/blobs/uploads/");
    if let Some(uri) = http::located(&from, text) {
        assert_eq!(
            uri.scheme_str(),
            Some("https"),
            "never from TLS to plain HTTP"
        );
    }
    if let Ok(reference) = "r.example.org/team/app:1".parse() {
        credentials::fuzz_logins(bytes, &Target::source(&reference));
    }
}
