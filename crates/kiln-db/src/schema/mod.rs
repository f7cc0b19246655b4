//! The schema: forward-only steps, one text for both engines.
//!
//! Marks: `{int}` a whole number of 64 bits, `{serial}` a number the database counts up, `{strict}` the end of a table.
//! A change of the schema is a new step at the end, never an edit of an old one; COMPATIBILITY.md names the version.

use crate::engine::{Tx, args};
use crate::error::DbError;

/// Steps in order; the schema's version is how many were taken.
const STEPS: &[&str] = &[
    include_str!("001-first.sql"),
    include_str!("002-controllers.sql"),
    include_str!("003-pipelines.sql"),
    include_str!("004-webhook-overlap.sql"),
    include_str!("005-images.sql"),
    include_str!("006-secrets.sql"),
    include_str!("007-rules.sql"),
    include_str!("008-kept.sql"),
];
/// What PostgreSQL needs besides, step by step.
const STEPS_POSTGRES: &[&str] = &[
    include_str!("001-first.postgres.sql"),
    "",
    "",
    "",
    "",
    "",
    "",
    "",
];

/// The schema that this build writes.
pub const VERSION: u32 = 8;

const _: () = assert!(STEPS.len() == VERSION as usize && STEPS_POSTGRES.len() == STEPS.len());

/// The script that takes one step, in an engine's words.
fn step(index: usize, postgres: bool) -> String {
    let (int, serial, strict) = if postgres {
        (
            "bigint",
            "bigint generated always as identity primary key",
            "",
        )
    } else {
        ("integer", "integer primary key autoincrement", " strict")
    };
    let mut script = STEPS[index]
        .replace("{int}", int)
        .replace("{serial}", serial)
        .replace("{strict}", strict);
    if postgres {
        script.push_str(STEPS_POSTGRES[index]);
    }
    script
}

/// The version a database has: 0 when it is empty.
pub(crate) async fn version(tx: &mut Tx) -> Result<u32, DbError> {
    let known = if tx.is_postgres() {
        "select count(*) as n from information_schema.tables where table_schema = current_schema() and table_name = 'meta'"
    } else {
        "select count(*) as n from sqlite_master where type = 'table' and name = 'meta'"
    };
    let row = tx.row(known, args![]).await?;
    if row.ok_or(DbError::missing("n"))?.int("n")? == 0 {
        return Ok(0);
    }
    let sql = "select value from meta where key = 'schema'";
    let row = tx.row(sql, args![]).await?;
    row.ok_or(DbError::missing("schema"))?.parse("value")
}

/// The newest version that is known, with a later step that a test may bring.
pub(crate) fn known(later: Option<&'static str>) -> u32 {
    VERSION + u32::from(later.is_some())
}

/// Takes the steps that are missing, and the `later` one of a test. In one transaction.
pub(crate) async fn migrate(tx: &mut Tx, later: Option<&'static str>) -> Result<u32, DbError> {
    if tx.is_postgres() {
        // Two controllers that start at once take turns.
        tx.row(
            "select 1 as one from pg_advisory_xact_lock(7215906371)",
            args![],
        )
        .await?;
    }
    let from = version(tx).await?;
    let known = known(later);
    if from >= known {
        return Ok(from);
    }
    for index in from as usize..STEPS.len() {
        tx.script(step(index, tx.is_postgres())).await?;
    }
    if let Some(later) = later {
        tx.script(later.to_owned()).await?;
    }
    let sql = "insert into meta (key, value) values ('schema', $1)
        on conflict (key) do update set value = excluded.value";
    tx.exec(sql, args![known.to_string()]).await?;
    Ok(known)
}
