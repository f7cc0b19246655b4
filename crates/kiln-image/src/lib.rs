//! What goes into machines and images: machine image recipe, runtime bases, cache heads, source plans.

pub mod bake;
pub mod bases;
pub mod build_config;
pub mod context;
pub mod dockerfile;
pub mod git_tree;
pub mod given;
pub mod heads;
pub mod plan;
pub mod sealed;
