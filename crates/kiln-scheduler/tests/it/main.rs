//! What must hold for every plan.
