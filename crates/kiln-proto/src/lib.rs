//! The wire between host and guest: frames, streams, orders and reports.
