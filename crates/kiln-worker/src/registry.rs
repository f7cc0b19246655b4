//! The registry as an attempt's guest reaches it, and its quarantine.

use std::sync::Arc;

use kiln_core::network::REGISTRY_HOST;
use kiln_core::{AttemptId, Lease};
use kiln_network::gateway::{BoxedDuplex, GuestService, Services};
use kiln_store::host::HostRegistry;
use kiln_store::registry::{AttemptAuthority, Authority, LeaseTable, RepoName};

/// Port of kiln's registry inside a guest: plain HTTP, because the channel is the identity.
pub const REGISTRY_PORT: u16 = 80;

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
