//! Names of images as people write them, and where they lie in kiln's registry.

use kiln_core::{ImageRef, TenantName};

use crate::error::{CliError, Result};

/// `name:tag` within the embedded tenant: `t/local/name:tag`; full names stay.
///
/// # Errors
/// For names of other registries, other tenants, or with a digest.
pub(crate) fn in_tenant(reference: &ImageRef) -> Result<ImageRef> {
    if reference.registry.is_some() || reference.digest.is_some() {
        return Err(CliError::usage(format!(
            "--tag {reference}: write a name and an optional tag, for example shop:1.4"
        ))
        .hint("use --push to send the image to another registry"));
    }
    let tree = format!("t/{}/", TenantName::local());
    let repository = if reference.repository.starts_with(&tree) {
        reference.repository.clone()
    } else if reference.repository.starts_with("t/") || reference.repository.starts_with("shared/")
    {
        return Err(CliError::usage(format!(
            "--tag {reference}: only names below {tree} can be written"
        )));
    } else {
        format!("{tree}{}", reference.repository)
    };
    let tag = reference.tag.clone().or_else(|| Some("latest".to_owned()));
    Ok(ImageRef {
        registry: None,
        repository,
        tag,
        digest: None,
    })
}

/// An image to run or remove: as [`in_tenant`], but digests and `shared/` are fine too.
pub(crate) fn existing(reference: &ImageRef) -> Result<ImageRef> {
    if reference.registry.is_some() {
        return Err(CliError::usage(format!(
            "{reference}: only images in kiln's own registry can be used here"
        ))
        .hint("`kiln registry list` shows them"));
    }
    let full = ["t/", "shared/"]
        .iter()
        .any(|tree| reference.repository.starts_with(tree));
    let repository = if full {
        reference.repository.clone()
    } else {
        format!("t/{}/{}", TenantName::local(), reference.repository)
    };
    let tag = match (&reference.tag, &reference.digest) {
        (None, None) => Some("latest".to_owned()),
        (tag, _) => tag.clone(),
    };
    Ok(ImageRef {
        registry: None,
        repository,
        tag,
        digest: reference.digest,
    })
}

/// A name from a folder's name.
pub(crate) fn of_folder(folder: &str) -> ImageRef {
    kiln_worker::prepare::image_of(&TenantName::local(), folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ImageRef {
        text.parse().expect("legal")
    }

    #[test]
    fn tags_stay_within_the_tenant() {
        assert_eq!(
            in_tenant(&parse("shop:1.4")).expect("legal").to_string(),
            "t/local/shop:1.4"
        );
        assert_eq!(
            in_tenant(&parse("t/local/shop"))
                .expect("legal")
                .to_string(),
            "t/local/shop:latest"
        );
        for bad in ["t/other/x", "shared/node:20", "registry.example.org/x"] {
            assert!(in_tenant(&parse(bad)).is_err(), "{bad}");
        }
        assert_eq!(
            existing(&parse("shared/node:20-run"))
                .expect("legal")
                .to_string(),
            "shared/node:20-run"
        );
    }

    #[test]
    fn folders_give_names() {
        assert_eq!(of_folder("My App_2").repository, "t/local/my-app-2");
        assert_eq!(of_folder("...").repository, "t/local/app");
    }
}
