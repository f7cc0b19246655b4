//! Reading and writing the two files.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::config::{Base, Bases};
use super::pulled::Pulled;

/// Largest `bases.toml` or `bases.lock.json`, bytes.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Why the bases of a host cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum BasesError {
    /// The file cannot be read or written.
    #[error("{action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("{path}, line {line}: {what}")]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// Where, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
}

impl BasesError {
    /// Which file it is about.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Io { path, .. } | Self::Invalid { path, .. } => path,
        }
    }
}

impl Bases {
    /// The built-in names, then the generated file, then the operator's file; a missing file is an empty one.
    ///
    /// # Errors
    /// When one of the files exists and cannot be read or is wrong.
    pub fn load(generated: &Path, operator: &Path) -> Result<Self, BasesError> {
        let mut bases = Self::builtin();
        if let Some(text) = read(generated)? {
            bases.merge(Self::parse_json(&text, generated)?);
        }
        if let Some(text) = read(operator)? {
            bases.merge(Self::parse_toml(&text, operator)?);
        }
        bases.use_pulled(&Pulled::load(&Pulled::path(generated))?);
        Ok(bases)
    }

    /// Reads `bases.toml`; `path` is for messages.
    ///
    /// # Errors
    /// [`BasesError::Invalid`] with the line.
    pub fn parse_toml(text: &str, path: &Path) -> Result<Self, BasesError> {
        let bases: Self = toml::from_str(text).map_err(|e| BasesError::Invalid {
            path: path.to_owned(),
            line: line_of(text, e.span().map_or(0, |span| span.start)),
            what: e.message().to_owned(),
        })?;
        let checked = bases.check();
        checked.map_err(|(about, what)| BasesError::Invalid {
            path: path.to_owned(),
            line: line_of(text, text.find(&about).unwrap_or(0)),
            what,
        })
    }

    /// Reads the generated file; `path` is for messages.
    ///
    /// # Errors
    /// [`BasesError::Invalid`] with the line.
    pub fn parse_json(text: &str, path: &Path) -> Result<Self, BasesError> {
        let bases: Self = serde_json::from_str(text).map_err(|e| BasesError::Invalid {
            path: path.to_owned(),
            line: e.line(),
            what: format!("not what kiln writes there ({e})"),
        })?;
        bases.check().map_err(|(about, what)| BasesError::Invalid {
            path: path.to_owned(),
            line: line_of(text, text.find(&about).unwrap_or(0)),
            what,
        })
    }

    /// Writes the generated file: whole or not at all.
    ///
    /// # Errors
    /// [`BasesError::Io`]; the old file is then still there.
    pub fn save_generated(&self, path: &Path) -> Result<(), BasesError> {
        save_json(self, path)
    }

    /// Writes the operator's file (`kiln bases add`): whole or not at all. Comments of an older file are lost, so
    /// callers append to it instead where they can.
    ///
    /// # Errors
    /// [`BasesError::Io`]; the old file is then still there.
    pub fn save_operator(&self, path: &Path) -> Result<(), BasesError> {
        let text = toml::to_string_pretty(self).map_err(io::Error::other);
        let result = text.and_then(|text| replace(path, &text));
        result.map_err(|source| BasesError::Io {
            action: "write",
            path: path.to_owned(),
            source,
        })
    }

    /// What types cannot say: (a text to find the line by, what is wrong).
    fn check(self) -> Result<Self, (String, String)> {
        if self.schema != Self::SCHEMA {
            let what = format!(
                "schema {} is not known to this kiln (it knows {})",
                self.schema,
                Self::SCHEMA
            );
            return Err(("schema".to_owned(), what));
        }
        for image in &self.images {
            if image.reference.digest.is_none() {
                let what = format!("{}: `ref` must carry a digest (@sha256:…)", image.name);
                return Err((image.reference.to_string(), what));
            }
        }
        for base in &self.bases {
            check_base(base)?;
        }
        Ok(self)
    }
}

fn check_base(base: &Base) -> Result<(), (String, String)> {
    let legal = |text: &str| {
        !text.is_empty()
            && text.len() <= 64
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    if !legal(&base.name) || !legal(&base.version) {
        let what = "name and version are 1 to 64 letters, digits, '.', '_' and '-'".to_owned();
        return Err((base.version.clone(), what));
    }
    for image in [&base.build, &base.run] {
        if image.digest.is_none() {
            let what = format!(
                "{} {}: {image} must carry a digest (@sha256:…)",
                base.name, base.version
            );
            return Err((image.to_string(), what));
        }
    }
    Ok(())
}

/// Writes a value as JSON: whole or not at all.
pub(super) fn save_json(value: &impl serde::Serialize, path: &Path) -> Result<(), BasesError> {
    let text = serde_json::to_string_pretty(value).map_err(io::Error::other);
    let result = text.and_then(|text| replace(path, &(text + "\n")));
    result.map_err(|source| BasesError::Io {
        action: "write",
        path: path.to_owned(),
        source,
    })
}

pub(super) fn read(path: &Path) -> Result<Option<String>, BasesError> {
    let error = |source| BasesError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    };
    match std::fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(error(e)),
        Ok(meta) if meta.len() > FILE_BYTES_MAX => {
            let what = format!("larger than {FILE_BYTES_MAX} bytes");
            return Err(error(io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        Ok(_) => {}
    }
    std::fs::read_to_string(path).map(Some).map_err(error)
}

/// Writes beside the file, syncs, renames.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let beside = dir.join(name);
    let written = std::fs::File::create(&beside).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| std::fs::rename(&beside, path));
    if renamed.is_err() {
        // The error that matters is the one above; the half-written file is only litter.
        let _ = std::fs::remove_file(&beside);
    }
    renamed
}

/// The line, from 1, of a byte offset.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    let end = offset.min(text.len());
    text.as_bytes()[..end]
        .iter()
        .filter(|&&b| b == b'\n')
        .count()
        + 1
}
