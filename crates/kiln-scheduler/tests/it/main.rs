//! What must hold for every plan.

mod build;
mod check;
mod placement;
mod properties;
mod reasons;
mod rounds;
mod simulation;
