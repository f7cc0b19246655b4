//! Folders without a plan: each error names what to add.
