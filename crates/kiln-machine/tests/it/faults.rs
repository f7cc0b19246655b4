//! Every trouble at every step of a simulated machine's life.
