//! One conformance suite for both engines: every test runs on SQLite and on a real PostgreSQL that the suite starts itself.

mod claims;
mod controllers;
mod crash;
mod doors;
mod expiry;
mod files;
mod images;
mod jobs;
mod model;
mod own;
mod people;
mod pipelines;
mod races;
mod secrets;
mod support;
mod webhooks;

/// Runs each test on both engines.
macro_rules! on_both {
    ($($name:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name($crate::support::World::sqlite().await).await;
            })+
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name($crate::support::World::postgres().await).await;
            })+
        }
    };
}
pub(crate) use on_both;
