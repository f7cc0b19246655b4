//! Joins a fresh discovery with the file the operator has, keeping the operator's values, comments and order.
//!
//! The existing text is cut at its section headers; only untouched sections are replaced, new ones are appended.
//! The result is read again and must mean exactly what was intended, else nothing is changed.

use super::file::{Block, HEADER, Registries, RegistriesError, Runtime, Sealed, VERSION};

/// Why a discovery could not be joined with the existing file.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The existing file is not legal.
    #[error("the existing registries.toml cannot be read; correct it or move it away")]
    Existing(#[source] RegistriesError),
    /// The text could not be changed without changing its meaning.
    #[error(
        "registries.toml is written in a form that cannot be changed automatically; use [runtime.NAME] sections, or move it away"
    )]
    Form,
}

/// The new text of the file: what the operator has, refreshed where nobody touched it.
/// Exceptions are only ever added, and only where no entry for that host covers the range's address already.
///
/// # Errors
/// When the existing text is not legal or cannot be changed safely. Nothing is lost then.
pub fn merge(existing: Option<&str>, found: &Registries) -> Result<String, MergeError> {
    let found = found.clone().sealed();
    let Some(text) = existing.filter(|text| !text.trim().is_empty()) else {
        return Ok(found.render());
    };
    let old = Registries::parse(text).map_err(MergeError::Existing)?;
    let want = intended(&old, &found);
    let mut pieces = Pieces::cut(text);
    let (old_blocks, want_blocks) = (singles(&old), singles(&want));
    for block in &want_blocks {
        match old_blocks.iter().find(|old| old.header == block.header) {
            Some(old) if old == block => {}
            Some(_) => pieces.replace(block)?,
            None => pieces.append(block),
        }
    }
    for gone in &old_blocks {
        if !want_blocks.iter().any(|block| block.header == gone.header) {
            pieces.remove(&gone.header)?;
        }
    }
    let known = old.exception.len();
    let added = Registries {
        exception: want.exception[known..].to_vec(),
        ..Registries::default()
    };
    for block in added.blocks() {
        pieces.append(&block);
    }
    let text = pieces.join();
    match Registries::parse(&text) {
        Ok(read) if read == want => Ok(text),
        _ => Err(MergeError::Form),
    }
}

/// What the file shall mean afterwards.
fn intended(old: &Registries, found: &Registries) -> Registries {
    let mut want = old.clone();
    want.version = VERSION;
    want.ca = refreshed(old.ca.as_ref(), found.ca.as_ref());
    want.proxy = refreshed(old.proxy.as_ref(), found.proxy.as_ref());
    for runtime in Runtime::ALL {
        let Some(fresh) = found.runtime.get(&runtime) else {
            continue;
        };
        let before = old.runtime.get(&runtime);
        // Not knowing is no reason to forget.
        let worse = fresh.needs_base && before.is_some_and(|before| !before.needs_base);
        if before.is_none_or(Sealed::is_untouched) && !worse {
            want.runtime.insert(runtime, fresh.clone());
        }
    }
    for exception in &found.exception {
        let covered = want.exception.iter().any(|known| {
            known.host.eq_ignore_ascii_case(&exception.host) && known.range == exception.range
        });
        if !covered {
            want.exception.push(exception.clone());
        }
    }
    want
}

fn refreshed<T: Sealed>(old: Option<&T>, found: Option<&T>) -> Option<T> {
    match old {
        Some(old) if !old.is_untouched() => Some(old.clone()),
        _ => found.cloned(),
    }
}

/// The sections that appear once.
fn singles(file: &Registries) -> Vec<Block> {
    let blocks = file.blocks().into_iter();
    blocks
        .filter(|block| !block.header.starts_with("[["))
        .collect()
}

/// A text cut at its section headers. The first piece is what stands before any header; comments directly above a
/// header belong to its section.
struct Pieces(Vec<String>);

impl Pieces {
    fn cut(text: &str) -> Self {
        let mut pieces = vec![String::new()];
        let mut above = String::new();
        for line in text.split_inclusive('\n') {
            let bare = line.trim();
            let last = pieces.len() - 1;
            if bare.starts_with('[') {
                pieces.push(std::mem::take(&mut above) + line);
            } else if bare.is_empty() || bare.starts_with('#') {
                above.push_str(line);
            } else {
                pieces[last].push_str(&above);
                above.clear();
                pieces[last].push_str(line);
            }
        }
        let last = pieces.len() - 1;
        pieces[last].push_str(&above);
        Self(pieces)
    }

    fn find(&self, header: &str) -> Result<usize, MergeError> {
        let compact = |line: &str| {
            let line = line.split('#').next().unwrap_or_default();
            line.chars()
                .filter(|c| !c.is_whitespace())
                .collect::<String>()
        };
        let is_it = |piece: &String| piece.lines().any(|line| compact(line) == header);
        self.0.iter().position(is_it).ok_or(MergeError::Form)
    }

    /// Replaces a section's values, keeping its comments.
    fn replace(&mut self, block: &Block) -> Result<(), MergeError> {
        let at = self.find(&block.header)?;
        let kept = |line: &&str| line.trim().is_empty() || line.trim().starts_with('#');
        let old: Vec<&str> = self.0[at].split_inclusive('\n').collect();
        let head = old.iter().take_while(|line| kept(line)).count();
        let tail = old[head..].iter().filter(|line| kept(line));
        let new = [
            old[..head].concat(),
            block.text.clone(),
            tail.copied().collect::<String>(),
        ];
        self.0[at] = new.concat();
        Ok(())
    }

    fn remove(&mut self, header: &str) -> Result<(), MergeError> {
        let at = self.find(header)?;
        self.0.remove(at);
        Ok(())
    }

    fn append(&mut self, block: &Block) {
        let last = self.0.len() - 1;
        if !self.0[last].is_empty() && !self.0[last].ends_with('\n') {
            self.0[last].push('\n');
        }
        self.0.push(format!("\n{}", block.text));
    }

    fn join(self) -> String {
        let text = self.0.concat();
        if text.trim().is_empty() {
            HEADER.to_owned()
        } else {
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::{ExceptionSection, RuntimeSection};
    use super::*;

    fn section(host: &str) -> RuntimeSection {
        RuntimeSection {
            index: Some(format!("https://{host}/").try_into().expect("url")),
            hosts: vec![format!("{host}:443").parse().expect("rule")],
            source: "a test".to_owned(),
            ..RuntimeSection::default()
        }
    }

    fn found(node: &str, python: &str) -> Registries {
        Registries {
            runtime: [
                (Runtime::Node, section(node)),
                (Runtime::Python, section(python)),
            ]
            .into(),
            exception: vec![ExceptionSection {
                host: node.to_owned(),
                range: "10.0.0.0/24".parse().expect("range"),
                allow: true,
                source: "a test".to_owned(),
            }],
            ..Registries::default()
        }
    }

    #[test]
    fn untouched_sections_are_refreshed_and_edited_ones_kept() {
        let first = merge(None, &found("a.example.org", "b.example.org")).expect("new");
        let again = merge(Some(&first), &found("a.example.org", "b.example.org")).expect("same");
        assert_eq!(first, again, "discovering twice changes nothing");

        let edited = first
            .replace(
                "hosts = [\"a.example.org:443\"]",
                "hosts = [\"mine.example.org:443\"] # ours",
            )
            .replace(
                "[runtime.python]",
                "# about python\n[runtime.python] # here\n# inside",
            );
        let next = merge(Some(&edited), &found("c.example.org", "d.example.org")).expect("merged");
        let read = Registries::parse(&next).expect("legal");
        assert_eq!(read.rules(Runtime::Node)[0].host(), "mine.example.org");
        assert_eq!(read.index(Runtime::Node), Some("https://a.example.org/"));
        assert_eq!(read.index(Runtime::Python), Some("https://d.example.org/"));
        for comment in ["# ours", "# about python", "# inside"] {
            assert!(next.contains(comment), "{comment}: {next}");
        }
        assert_eq!(read.exception.len(), 2);
    }

    #[test]
    fn a_refused_exception_is_not_proposed_again_and_own_sections_stay() {
        let mine = "version = 1\n[runtime.node]\nhosts = [\"mine.example.org\"]\n\n\
            [[exception]]\nhost = \"a.example.org\"\nrange = \"10.0.0.0/24\"\nallow = false\n";
        let next = merge(Some(mine), &found("a.example.org", "b.example.org")).expect("merged");
        assert!(next.starts_with(mine), "{next}");
        let read = Registries::parse(&next).expect("legal");
        assert!(read.exceptions().is_empty());
        assert_eq!(read.index(Runtime::Python), Some("https://b.example.org/"));
    }

    #[test]
    fn not_knowing_does_not_forget_and_gone_settings_go() {
        let with_ca = Registries {
            ca: Some(super::super::file::CaSection {
                files: vec!["/etc/ca.pem".into()],
                ..Default::default()
            }),
            ..found("a.example.org", "b.example.org")
        };
        let first = merge(None, &with_ca).expect("new");
        let mut later = found("a.example.org", "b.example.org");
        later.runtime.insert(
            Runtime::Node,
            RuntimeSection {
                needs_base: true,
                ..RuntimeSection::default()
            },
        );
        let read = Registries::parse(&merge(Some(&first), &later).expect("merged")).expect("legal");
        assert_eq!(read.index(Runtime::Node), Some("https://a.example.org/"));
        assert_eq!(read.ca, None);
    }

    #[test]
    fn a_form_that_cannot_be_changed_is_refused_not_damaged() {
        let first = found("a.example.org", "b.example.org").sealed();
        let seal = first.runtime[&Runtime::Node].seal.clone().expect("sealed");
        let inline = format!(
            "version = 1\nruntime.node = {{ index = \"https://a.example.org/\", hosts = [\"a.example.org:443\"], source = \"a test\", seal = \"{seal}\" }}\n"
        );
        let result = merge(Some(&inline), &found("c.example.org", "d.example.org"));
        assert!(matches!(result, Err(MergeError::Form)), "{result:?}");
        assert!(matches!(
            merge(Some("version = 1\nx = 2"), &first),
            Err(MergeError::Existing(_))
        ));
    }
}
