//! `kiln image`: the names of images that a server keeps.

use kiln_controller::api::{ImageView, List};
use kiln_core::{ByteSize, Digest};
use kiln_worker::host::now_unix_ms;
use serde_json::{Value, json};

use super::table::{Table, left, right, wide};
use super::{home_queue, when};
use crate::args::{OwnerArgs, ServerArgs, StoredImageCommand};
use crate::error::Result;
use crate::server::{Server, escaped};
use crate::show::Screen;

/// Names of a page.
const PAGE: u32 = 500;
/// Characters of a digest that are shown.
const DIGEST: usize = 12;

pub(super) async fn run(verb: StoredImageCommand, said: &ServerArgs, screen: Screen) -> Result<u8> {
    let asked = home_queue::ask(said).await?;
    let answered = answer(verb, &asked.server, screen).await;
    asked.done().await;
    answered.map(|()| 0)
}

async fn answer(verb: StoredImageCommand, server: &Server, screen: Screen) -> Result<()> {
    match verb {
        StoredImageCommand::List { owner } => list(server, &owner, screen).await,
        StoredImageCommand::Rm { names, owner } => {
            for name in names {
                let path = format!("/v1/images/{}{}", escaped(&name), of(&owner, '?'));
                server.delete::<Value>(&path).await?;
                let event = json!({ "event": "removed", "image": name });
                screen.data(&event, || format!("{name} has no name here any more"));
            }
            Ok(())
        }
    }
}

fn of(owner: &OwnerArgs, mark: char) -> String {
    let tenant = owner.tenant.as_ref();
    let tenant = tenant.map(|tenant| format!("{mark}tenant={}", escaped(tenant)));
    tenant.unwrap_or_default()
}

async fn list(server: &Server, owner: &OwnerArgs, screen: Screen) -> Result<()> {
    let (mut images, mut after): (Vec<ImageView>, Option<String>) = (Vec::new(), None);
    loop {
        let mut path = format!("/v1/images?limit={PAGE}{}", of(owner, '&'));
        if let Some(after) = &after {
            path.push_str(&format!("&after={}", escaped(after)));
        }
        let page: List<ImageView> = server.get(&path).await?;
        if screen.json() {
            for image in &page.items {
                screen.data(image, String::new);
            }
        } else {
            images.extend(page.items);
        }
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    if screen.json() {
        return Ok(());
    }
    match images.as_slice() {
        [] => screen.note("the server keeps no images of this tenant"),
        images => screen.text(&table(images, now_unix_ms(), screen.width())),
    }
    Ok(())
}

fn table(images: &[ImageView], now_unix_ms: u64, width: Option<usize>) -> String {
    let columns = [
        wide("REPOSITORY"),
        left("TAG"),
        left("DIGEST"),
        right("SIZE"),
        left("NAMED"),
    ];
    let mut table = Table::new(&columns).within(width);
    for image in images {
        let digest: Option<Digest> = image.digest.parse().ok();
        let named = image.named_unix_ms.map(|at| when::ago(at, now_unix_ms));
        table.row([
            image.repository.clone(),
            image.tag.clone(),
            digest
                .map(|digest| digest.short(DIGEST))
                .unwrap_or_default(),
            ByteSize(image.bytes).to_string(),
            named.unwrap_or_default(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_fit_eighty_columns() {
        let image = ImageView {
            repository: format!("t/acme/{}", "a-long-name".repeat(6)),
            tag: "1.4".to_owned(),
            digest: Digest::of(b"m").to_string(),
            bytes: 61 << 20,
            named_unix_ms: Some(0),
        };
        let text = table(&[image], 10_000, Some(super::super::table::WIDTH));
        let mut lines = text.lines();
        assert!(lines.all(|line| line.chars().count() <= super::super::table::WIDTH));
        assert!(
            text.contains(&Digest::of(b"m").short(12).to_string()),
            "{text}"
        );
    }
}
