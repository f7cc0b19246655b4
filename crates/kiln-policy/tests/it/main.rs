//! Policies as files: what is legal means this, what is not is refused with these words.

mod golden;
mod grants;
mod laws;
