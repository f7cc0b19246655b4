//! The registry as an attempt's guest reaches it, and its quarantine.

use std::sync::Arc;
use std::time::Duration;

use kiln_core::network::REGISTRY_HOST;
use kiln_core::{AttemptId, Lease};
use kiln_network::gateway::{BoxedDuplex, GuestService, Services};
use kiln_store::host::HostRegistry;
use kiln_store::registry::{AttemptAuthority, Authority, LeaseTable, RepoName};

/// Port of kiln's registry inside a guest: plain HTTP, because the channel is the identity.
pub const REGISTRY_PORT: u16 = 80;

/// Longest wait, at the end of a process that owns the registry, for what others are pushing through it.
pub const OTHERS_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause between two looks whether they have finished: the store does not tell.
const OTHERS_POLL: Duration = Duration::from_millis(100);

/// Access to the host's registry, shared by all attempts of this process.
#[derive(Clone, Debug)]
pub struct RegistryAccess {
    /// The registry.
    pub host: HostRegistry,
}

struct AttemptDoor {
    registry: HostRegistry,
    authority: Authority,
}

impl GuestService for AttemptDoor {
    fn serve(
        &self,
        stream: BoxedDuplex,
    ) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + 'static>> {
        let (registry, authority) = (self.registry.clone(), self.authority.clone());
        Box::pin(async move {
            // What broke one connection is the guest's to see; the registry is unharmed.
            let _ended = registry.serve_connection(stream, authority).await;
        })
    }
}

impl RegistryAccess {
    /// kiln's own names as one attempt sees them. What lies in `sources` it need not push again.
    #[must_use]
    pub fn services_for(
        &self,
        lease: &Lease,
        leases: &Arc<LeaseTable>,
        sources: Vec<RepoName>,
    ) -> Services {
        let authority = self.authority(lease, leases).with_sources(sources);
        self.services_as(Authority::Attempt(authority))
    }

    /// kiln's own names for a machine with this authority.
    #[must_use]
    pub fn services_as(&self, authority: Authority) -> Services {
        let door = AttemptDoor {
            registry: self.host.clone(),
            authority,
        };
        Services::default().with(REGISTRY_HOST, REGISTRY_PORT, Arc::new(door))
    }

    /// What one attempt may do.
    #[must_use]
    pub fn authority(&self, lease: &Lease, leases: &Arc<LeaseTable>) -> AttemptAuthority {
        AttemptAuthority::new(lease.clone(), Arc::clone(leases) as _)
    }

    /// Before a process that owns the registry ends: waits until nobody uploads through it, because sessions end with
    /// their owner. Gives up after [`OTHERS_TIMEOUT`]; then the others begin their uploads again.
    pub async fn let_others_finish(&self) {
        let idle = async {
            while self.host.is_owner().await {
                match self.host.stats().await {
                    Ok(stats) if stats.uploads > 0 => tokio::time::sleep(OTHERS_POLL).await,
                    _ => return,
                }
            }
        };
        let _gave_up = tokio::time::timeout(OTHERS_TIMEOUT, idle).await;
    }

    /// Removes what an attempt pushed and nobody published.
    pub async fn discard_quarantine(&self, attempt: &AttemptId) {
        let tree = RepoName::quarantine(attempt);
        if let Err(error) = self.host.delete_tree(&tree).await
            && !error.is_not_found()
        {
            tracing::warn!(%attempt, error = crate::orders::chain(&error), "quarantine was not removed");
        }
    }
}
