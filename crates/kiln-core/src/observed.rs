//! What the host itself saw and did: the raw material of provenance. Never a field copied from the guest.

use serde::{Deserialize, Serialize};

use crate::network::EgressEvent;
use crate::{AttemptId, Digest, ImageRef, TenantName};

/// Written beside an image at stage 8. Unsigned until the supply-chain work.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Observed {
    /// Schema of this record.
    pub schema: u32,
    /// The attempt.
    pub attempt: AttemptId,
    /// Its tenant.
    pub tenant: TenantName,
    /// Digest of the source tree, computed by the host before it left.
    pub source: Digest,
    /// The commit the tree came from, when the host proved one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git: Option<GitCommit>,
    /// Digest of the Dockerfile used.
    pub dockerfile: Digest,
    /// Every FROM, resolved to a digest by the host before boot.
    pub bases: Vec<(String, ImageRef)>,
    /// Digest of the network policy in its canonical JSON form.
    pub policy: Digest,
    /// Machine image the machine was started from.
    pub machine_image: String,
    /// Template it was cloned from, if any.
    pub template: Option<String>,
    /// Cache head it forked: its id.
    pub head: Option<String>,
    /// Every decision of the gateway.
    pub egress: Vec<EgressEvent>,
    /// Digest of the image manifest the host read and verified.
    pub manifest: Digest,
    /// Layers and config as the host verified them: (digest, bytes).
    pub blobs: Vec<(Digest, u64)>,
    /// The earlier attempt whose image this one names again, because everything that decides the result was the same. Then nothing
    /// ran: there is no template, no head and no egress here, and that attempt's record tells how the image was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repeats: Option<AttemptId>,
    /// Start and end, milliseconds since the Unix epoch, by the host's clock.
    pub started_unix_ms: u64,
    /// See `started_unix_ms`.
    pub ended_unix_ms: u64,
}

/// A git commit whose objects the host hashed itself. That the URL's server names it by the ref is the server's word.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GitCommit {
    /// Where it was fetched from.
    pub url: String,
    /// The ref that was asked for; `HEAD` without one.
    pub reference: String,
    /// Id of the commit.
    pub commit: String,
    /// Id of its tree.
    pub tree: String,
}

impl Observed {
    /// The schema this version writes.
    pub const SCHEMA: u32 = 1;
}

/// Proof of storage: what was stored, where.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Receipt {
    /// References that now name the image.
    pub tags: Vec<ImageRef>,
    /// The image manifest.
    pub manifest: Digest,
    /// Compressed bytes of config and layers.
    pub size: u64,
    /// Digest of the stored [`Observed`] record.
    pub observed: Digest,
    /// Cache head that this build committed, if it did.
    pub head: Option<String>,
}
