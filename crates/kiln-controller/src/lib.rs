//! The one decision-making server: takes requests, keeps them, decides who runs them, and tells how it went.
//!
//! Assembly: it knows the database, the scheduler and the stores; it starts no machine.
