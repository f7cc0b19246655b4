//! Where results live: registry with per-repository blob links, job records, receipts.
