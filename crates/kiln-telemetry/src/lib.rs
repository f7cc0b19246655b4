//! Every metric and span name, and log set-up, in one place.
