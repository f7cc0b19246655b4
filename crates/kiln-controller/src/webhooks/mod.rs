//! Webhooks: what happened to a job is told to those who asked, at least once, signed, and to nobody else.
//!
//! A row of the outbox is written in the transaction of the change it tells of (`kiln-db`); [`Courier`] sends it. The body is the row's:
//! what is signed is what is sent, over all tries. A receiver is an address somebody else chose, so it is checked like one a guest
//! chose: the name is resolved once a try, special-purpose ranges are refused unless the operator excepted them, and the address that
//! passed is the one that is dialled. No proxy, no redirect; of the answer only the status is used.
//!
//! Signatures follow the Standard Webhooks specification 1.0: headers `webhook-id`, `webhook-timestamp`, `webhook-signature`; secrets
//! `whsec_…`. Start at [`Courier::run`].

mod courier;
mod destination;
mod outbox;
mod post;
mod signature;

#[cfg(test)]
mod database_tests;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use database_tests::job as job_for_tests;

pub use courier::{BACKOFF_S, Courier, CourierOptions};
pub use destination::{Destination, DestinationRefused, ReceiverPolicy};
pub use outbox::Outbox;
pub use post::{Duplex, HostNetwork, Network, PostError};
pub use signature::{Secret, Signer, sign_with};
