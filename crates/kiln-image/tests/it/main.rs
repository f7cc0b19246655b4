//! Plans of whole folders: the examples, fixtures, and folders that have none.

mod near_misses;
mod plans;
mod site;
