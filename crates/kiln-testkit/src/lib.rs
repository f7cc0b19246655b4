//! Test support: builders, temp homes, golden-file helpers. Development only.
