//! `kiln backup`: a copy of this home's queue while it is served, and putting one back while it is not.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use http::{Method, header};
use http_body_util::BodyExt as _;
use kiln_controller::backup::{PutBackError, put_back};
use kiln_controller::server::StartError;
use kiln_core::{ByteSize, FailureClass};
use kiln_db::RestoreError;
use serde_json::json;

use super::home_queue;
use super::operator::Operator;
use super::table::counted;
use crate::args::{BackupCommand, ServerArgs};
use crate::error::{CliError, Result, chain};
use crate::server::Server;
use crate::show::{Screen, ShownPath as _};

pub(super) async fn run(verb: BackupCommand, said: &ServerArgs, screen: Screen) -> Result<u8> {
    match verb {
        BackupCommand::Create { file } => {
            let asked = home_queue::ask(said).await?;
            let size = create(&asked.server, &file).await;
            asked.done().await;
            let size = size?;
            let told = json!({ "event": "backed-up", "file": file, "bytes": size });
            screen.data(&told, || {
                format!("wrote {} ({})", file.shown(), ByteSize(size))
            });
        }
        BackupCommand::Restore { file, replace } => {
            let operator = Operator::load()?;
            let back = put_back(&operator.home.controller(), &file, replace).await;
            let back = back.map_err(|error| refused(&error))?;
            let told = json!({
                "event": "restored", "incarnation": back.restored.incarnation,
                "leases_ended": back.restored.leases_ended, "replaced": back.replaced,
            });
            screen.data(&told, || {
                let ended = back.restored.leases_ended;
                let kept = match &back.replaced {
                    Some(path) => format!("\nwhat was there is kept as {}", path.shown()),
                    None => String::new(),
                };
                let ended = counted(ended, "job");
                format!(
                    "restored {}; {ended} that ran then will begin again{kept}",
                    file.shown()
                )
            });
        }
    }
    Ok(0)
}

fn failed(doing: &str, path: &Path, error: &io::Error) -> CliError {
    let text = format!("could not {doing} {}: {error}", path.shown());
    CliError::new(FailureClass::Infrastructure, text)
}

/// Streams a backup into a file that nobody else may read; gives its size. Under its name it is whole.
async fn create(server: &Server, file: &Path) -> Result<u64> {
    if file.exists() {
        return Err(CliError::usage(format!("{} exists already", file.shown())));
    }
    let answer = server.send(Method::GET, "/private/backup", crate::server::empty(), &[]);
    let answer = answer.await.map_err(|error| match error.class {
        // No other door has this route.
        FailureClass::Usage if error.message.contains("no route") => {
            error.hint("a backup is taken on the server's own host, over its private socket")
        }
        _ => error,
    })?;
    let said = answer.headers().get(header::CONTENT_LENGTH);
    let said: Option<u64> = said.and_then(|length| length.to_str().ok()?.parse().ok());
    let part = Part(PathBuf::from(format!("{}.part", file.display())));
    let mut out = part.create()?;
    let mut body = answer.into_body();
    let mut size: u64 = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| CliError::infrastructure(&error))?;
        if let Ok(bytes) = frame.into_data() {
            size += bytes.len() as u64;
            let written = out.write_all(&bytes);
            written.map_err(|error| failed("write", &part.0, &error))?;
        }
    }
    if said != Some(size) {
        let text = "the backup broke off before it was whole";
        return Err(CliError::new(FailureClass::Infrastructure, text));
    }
    let kept = out.sync_all().and_then(|()| fs::hard_link(&part.0, file));
    kept.map_err(|error| failed("keep", file, &error))?;
    Ok(size)
}

/// The file under another name while it is not whole; that name goes in any case.
struct Part(PathBuf);

impl Part {
    fn create(&self) -> Result<File> {
        let _of_a_killed_one = fs::remove_file(&self.0);
        let made = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.0);
        made.map_err(|error| failed("write", &self.0, &error))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _gone = fs::remove_file(&self.0);
    }
}

fn refused(error: &PutBackError) -> CliError {
    let (class, hint) = match error {
        PutBackError::Folder(StartError::Taken(_)) => (
            FailureClass::Usage,
            Some("stop the server first: what it does meanwhile would be lost"),
        ),
        PutBackError::Exists(_) => (
            FailureClass::Usage,
            Some("--replace puts the backup in its place and keeps it under another name"),
        ),
        PutBackError::Backup(RestoreError::NotGood(_)) => (FailureClass::Usage, None),
        _ => (FailureClass::Infrastructure, None),
    };
    let told = CliError::new(class, chain(error));
    match hint {
        Some(hint) => told.hint(hint),
        None => told,
    }
}
