//! Durable state of a controller: the queue, leases, workers, tenants, tokens, events, webhooks, audit rows.
//!
//! The only room that knows SQL. SQLite for one controller, PostgreSQL for several; one conformance suite for both.
