//! Trees and files between host and simulated guest, kept in memory.

use std::io::Read as _;
use std::path::{Component, Path};
use std::sync::Arc;

use kiln_proto::msg::{GetTree, GuestError, GuestErrorCode, Place, PutFile, PutTree, TreeReport};
use kiln_proto::{Inbound, Stream, write_msg};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::disk::Files;
use super::fault::{Lie, Step};
use super::guest::Guest;
use super::orders::{invalid, place_path};

/// Bytes of one tree, whatever the order allows: it is kept in memory.
const TREE_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Reset code of a tree that cannot be sent.
const RESET_TREE: u16 = kiln_proto::mux::CODE_FIRST_FREE;

pub(super) async fn serve_put(guest: &Arc<Guest>, inbound: Inbound) {
    let mut stream = inbound.stream;
    let order = serde_json::from_slice::<PutTree>(&inbound.payload);
    let met = guest.meet(Step::PutTree, stream.id()).await;
    let result = match (met, order) {
        (Err(refusal), _) => Err(refusal),
        (_, Err(error)) => Err(invalid(&error.to_string())),
        (_, Ok(order)) => put(guest, &order, &mut stream).await,
    };
    reply(guest, stream, result).await;
}

async fn put(
    guest: &Guest,
    order: &PutTree,
    stream: &mut Stream,
) -> Result<TreeReport, GuestError> {
    let tar = read_all(stream, TREE_BYTES_MAX).await?;
    let (files, report) = unpack(&tar, order)?;
    let mut memory = guest.memory();
    let below = format!("{}/", report.path);
    memory.files.retain(|path, _| !path.starts_with(&below));
    memory.files.extend(files);
    Ok(report)
}

/// Checks and unpacks a tar.
fn unpack(tar: &[u8], order: &PutTree) -> Result<(Files, TreeReport), GuestError> {
    let path = place_path(&order.place);
    let mut report = TreeReport {
        path: path.clone(),
        entries: 0,
        bytes: 0,
    };
    let mut files = Files::new();
    let broken = |error: std::io::Error| invalid(&format!("not a tar: {error}"));
    let over = |what: &str| GuestError {
        code: GuestErrorCode::LimitExceeded,
        message: format!("the tree has more than the allowed {what}"),
    };
    let mut archive = tar::Archive::new(tar);
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        report.entries += 1;
        report.bytes += entry.size();
        if report.entries > order.entries_max {
            return Err(over("entries"));
        }
        if report.bytes > order.bytes_max {
            return Err(over("bytes"));
        }
        let name = entry.path().map_err(broken)?.into_owned();
        let name = safe(&name)?;
        if entry.header().entry_type().is_file() {
            let mut content = Vec::new();
            entry.read_to_end(&mut content).map_err(broken)?;
            files.insert(format!("{path}/{name}"), content);
        }
    }
    Ok((files, report))
}

/// A path that stays below its place.
fn safe(name: &Path) -> Result<String, GuestError> {
    let plain = name
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    let text = name.to_str().map(|text| text.trim_start_matches("./"));
    match text {
        Some(text) if plain => Ok(text.trim_end_matches('/').to_owned()),
        _ => Err(GuestError {
            code: GuestErrorCode::UnsafePath,
            message: format!("{name:?} would leave its place"),
        }),
    }
}

pub(super) async fn serve_file(guest: &Arc<Guest>, inbound: Inbound) {
    let mut stream = inbound.stream;
    let order = serde_json::from_slice::<PutFile>(&inbound.payload);
    let met = guest.meet(Step::PutFile, stream.id()).await;
    let result = match (met, order) {
        (Err(refusal), _) => Err(refusal),
        (_, Err(error)) => Err(invalid(&error.to_string())),
        (_, Ok(order)) => put_file(guest, &order, &mut stream).await,
    };
    reply(guest, stream, result).await;
}

async fn put_file(
    guest: &Guest,
    order: &PutFile,
    stream: &mut Stream,
) -> Result<TreeReport, GuestError> {
    let content = read_all(stream, order.bytes_max.min(TREE_BYTES_MAX)).await?;
    let report = TreeReport {
        path: place_path(&order.place),
        entries: 1,
        bytes: content.len() as u64,
    };
    let mut memory = guest.memory();
    memory.secret_issued |= matches!(order.place, Place::Secret { .. });
    memory.files.insert(report.path.clone(), content);
    Ok(report)
}

async fn reply(guest: &Guest, mut stream: Stream, mut result: Result<TreeReport, GuestError>) {
    if let Ok(report) = &mut result
        && guest.lies(Lie::TreeReport)
    {
        report.bytes += 1;
        report.entries += 1;
    }
    if write_msg(&mut stream, &result).await.is_ok() {
        // The host may have gone: then nobody misses the end.
        let _ = stream.shutdown().await;
    }
}

async fn read_all(stream: &mut Stream, max: u64) -> Result<Vec<u8>, GuestError> {
    let mut bytes = Vec::new();
    stream
        .take(max + 1)
        .read_to_end(&mut bytes)
        .await
        .map_err(|error| GuestError {
            code: GuestErrorCode::System,
            message: error.to_string(),
        })?;
    if bytes.len() as u64 > max {
        return Err(GuestError {
            code: GuestErrorCode::LimitExceeded,
            message: format!("more than {max} bytes came"),
        });
    }
    Ok(bytes)
}

pub(super) async fn serve_get(guest: &Arc<Guest>, inbound: Inbound) {
    let mut stream = inbound.stream;
    let order = serde_json::from_slice::<GetTree>(&inbound.payload);
    let met = guest.meet(Step::GetTree, stream.id()).await;
    let packed = match (met, order) {
        (Err(refusal), _) => Err(refusal),
        (_, Err(error)) => Err(invalid(&error.to_string())),
        (_, Ok(order)) => pack(guest, &order),
    };
    match packed {
        Ok(tar) => {
            if stream.write_all(&tar).await.is_ok() {
                let _ = stream.shutdown().await;
            }
        }
        Err(error) => stream.reset(RESET_TREE, &error.message),
    }
}

fn pack(guest: &Guest, order: &GetTree) -> Result<Vec<u8>, GuestError> {
    let below = format!("{}/", order.path.trim_end_matches('/'));
    let files: Vec<(String, Vec<u8>)> = {
        let memory = guest.memory();
        let inside = memory.files.iter();
        inside
            .filter_map(|(path, content)| {
                Some((path.strip_prefix(&below)?.to_owned(), content.clone()))
            })
            .collect()
    };
    if files.is_empty() {
        return Err(GuestError {
            code: GuestErrorCode::NotFound,
            message: format!("{} does not exist", order.path),
        });
    }
    let bytes: usize = files.iter().map(|(_, content)| content.len()).sum();
    if bytes as u64 > order.bytes_max || files.len() as u64 > order.entries_max {
        return Err(GuestError {
            code: GuestErrorCode::LimitExceeded,
            message: "the tree is larger than allowed".to_owned(),
        });
    }
    build_tar(&files, guest.lies(Lie::HostileTree)).map_err(|error| GuestError {
        code: GuestErrorCode::System,
        message: error.to_string(),
    })
}

fn build_tar(files: &[(String, Vec<u8>)], hostile: bool) -> std::io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, content.as_slice())?;
    }
    if hostile {
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        builder.append_link(&mut link, "out", "/etc")?;
        append_raw(&mut builder, b"out/kiln-escaped")?;
        append_raw(&mut builder, b"../kiln-escaped")?;
        append_raw(&mut builder, b"/tmp/kiln-escaped")?;
    }
    builder.into_inner()
}

/// Appends a file under a name that the builder itself would refuse.
fn append_raw(builder: &mut tar::Builder<Vec<u8>>, name: &[u8]) -> std::io::Result<()> {
    let mut header = tar::Header::new_old();
    let field = &mut header.as_old_mut().name;
    field[..name.len()].copy_from_slice(name);
    header.set_size(1);
    header.set_mode(0o644);
    header.set_cksum();
    builder.append(&header, &b"x"[..])
}
